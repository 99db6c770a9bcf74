"""drop-blocks where outputs are no floats, blocks lie in others, or nothing is finite without a block."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcompress.cli.main import main
from onnxcompress.errors import CompressError, InputError, OptionError
from onnxcompress.evaluation.inspection import inspect_model
from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import find_blocks
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model, save
from onnxcompress.optimize.block_drop.figures import DropBlocksFigures
from onnxcompress.optimize.block_drop.repair import Repair
from onnxcompress.optimize.block_drop.score_file import read_scores
from onnxcompress.optimize.block_drop.subsets import cheapest_sets
from onnxcompress.optimize.reconstruction.feature_loss import Matched
from onnxcompress.passes.base import run
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.drop_channels import DropChannels
from onnxcompress.runtime.session import session
from tests.helpers.brief import few_rounds
from tests.helpers.folding import graph, weight
from tests.helpers.results import figures_of

FEW: dict[str, Any] = {"effort": "fast", "inputs": "procedural", "synthetic": 40, "steps": 3}
STEM = "s0 = Conv<pads=[1,1,1,1]>(x, w) s = Relu(s0)"
BLOCK = """ {a}0 = Conv<pads=[1,1,1,1]>({x}, v) {a}1 = Relu({a}0) {a}2 = Conv<pads=[1,1,1,1]>({a}1, u)
    {a} = Add({x}, {a}2)"""
TWO = STEM + BLOCK.format(a="a", x="s") + BLOCK.format(a="b", x="a")
HEADS = {
    "classes": ("o = Conv(b, h) y = ArgMax<axis=1, keepdims=0>(o)", "int64[N,8,8] y"),
    "a mask": ("o = Conv(b, h) y = Greater(o, zero)", "bool[N,4,8,8] y"),
    "pixels": ("o = Conv(b, h) c = Clip(o, zero, top) r = Round(c) y = Cast<to=2>(r)", "uint8[N,4,8,8] y"),
}
"""What is behind the last float tensor that can be matched, `o` or `c`, and the output."""


@pytest.fixture(scope="module", autouse=True)
def brief() -> Iterator[None]:
    """Latency from a few rounds."""
    with pytest.MonkeyPatch.context() as patch:
        few_rounds(patch)
        yield


def network(body: str, output: str = "float[N,8,8,8] y", **more: np.ndarray) -> Model:
    arrays = {
        "w": weight(8, 3, 3, 3),
        "v": weight(8, 8, 3, 3, seed=1) / 9,
        "u": weight(8, 8, 3, 3, seed=2) / 9,
    }
    arrays |= {"h": weight(4, 8, 1, 1, seed=3), "zero": np.float32(0), "top": np.float32(9), **more}
    used = {
        name: value
        for name, value in arrays.items()
        if name in body.replace(",", " ").replace(")", " ").split()
    }
    used |= {name: value for name, value in arrays.items() if f"({name}" in body}
    return Model.from_proto(graph(f"(float[N,3,8,8] x) => ({output})", body, used))


@pytest.mark.filterwarnings("ignore::onnxcompress.errors.CompressWarning")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("one", [DropBlocks(blocks=1, **FEW), DropChannels(macs_reduction=15, **FEW)])
def test_outputs_that_are_no_floats_are_matched_in_front_of_them(
    one: DropBlocks | DropChannels, head: str
) -> None:
    tail, output = HEADS[head]
    model = network(f"{TWO} {tail}", output)
    feature = model.analysis(Topology).feature()
    assert feature is not None
    assert feature.name == ("c" if head == "pixels" else "o")
    (result,) = run([one], model)
    assert result.modified


@pytest.mark.filterwarnings("ignore::onnxcompress.errors.CompressWarning")
def test_layers_in_front_of_classes_lose_something(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tail, output = HEADS["classes"]
    save(network(f"{TWO} {tail}", output), tmp_path / "n.onnx")
    command = ["sensitivity", str(tmp_path / "n.onnx"), "--inputs", "procedural", "--synthetic", "8"]
    assert main([*command, "--no-cache", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows
    assert min(row["error"] for row in rows) > 0


@pytest.mark.parametrize(
    ("name", "reason"), [("y", "holds no floats"), ("x", "is an input"), ("q", "is no tensor")]
)
@pytest.mark.parametrize("one", [DropBlocks(blocks=1, **FEW), DropChannels(macs_reduction=15, **FEW)])
def test_a_feature_that_cannot_be_matched_is_refused(
    one: DropBlocks | DropChannels, name: str, reason: str
) -> None:
    tail, output = HEADS["classes"]
    with pytest.raises(OptionError, match=reason):
        run([replace(one, feature=name)], network(f"{TWO} {tail}", output))
    with pytest.raises(OptionError, match=reason):
        replace(one, feature=name).preview(network(f"{TWO} {tail}", output))


def test_a_dry_run_looks_at_the_blocks_in_front_of_the_feature() -> None:
    ask = DropBlocks(blocks=1, feature="a", **FEW)
    model = network(f"{TWO} y = Relu(b)")
    assert "name a later --feature" in str([str(refusal) for refusal in ask.preview(model)])
    with pytest.raises(OptionError, match="depend on 1 blocks, not on b"):
        replace(ask, blocks=2).preview(model)
    with pytest.raises(OptionError, match="--drop 'b': the features 'a' do not depend on it"):
        replace(ask, blocks=None, drop=("b",)).preview(model)


@pytest.mark.filterwarnings("ignore::onnxcompress.errors.CompressWarning")
@pytest.mark.parametrize("target", [{"blocks": 1}, {"latency_reduction": 3.0}])
def test_a_block_without_which_nothing_is_finite_stays(target: dict[str, Any]) -> None:
    """The square root is of numbers near 20 with it, and of negative ones without."""
    needed = """n0 = Conv<pads=[1,1,1,1]>(s0, v) n1 = Add(n0, twenty) n = Add(s0, n1) s = Sqrt(n)"""
    body = STEM.replace(" s = Relu(s0)", "") + f" {needed}" + TWO.removeprefix(STEM) + " y = Relu(b)"
    model = network(body, w=weight(8, 3, 3, 3) / 9, twenty=np.full((8, 1, 1), 20, np.float32))
    assert len(find_blocks(model).blocks) == 3
    (result,) = run([DropBlocks(**target, **FEW)], model)
    assert "n" not in {change.node for change in result.changes}
    rows = figures_of(result, DropBlocksFigures).blocks
    assert [row.recoverability == float("inf") for row in rows] == [True, False, False]


@pytest.mark.filterwarnings("ignore::onnxcompress.errors.CompressWarning")
@pytest.mark.parametrize("fewest", [20, 200])
def test_pooled_features_of_few_images_are_not_matched(
    fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Matched] = []
    original = Repair.__init__

    def repair(self: Repair, *arguments: Any, **named: Any) -> None:
        seen.append(arguments[4])
        original(self, *arguments, **named)

    monkeypatch.setattr(Repair, "__init__", repair)
    monkeypatch.setattr("onnxcompress.optimize.reconstruction.levels.FEWEST_POOLED", fewest)
    body = f"{TWO} p = GlobalAveragePool(b) y = Conv(p, h)"
    run([DropBlocks(blocks=1, **FEW)], network(body, "float[N,4,1,1] y"))
    assert [bool(matched.pooled) for matched in seen] == [fewest == 20]


def test_sets_have_no_block_without_which_nothing_is_finite() -> None:
    found = list(cheapest_sets([float("inf"), 2.0, 1.0], [0.5, 0.2, 0.2], 0.3, 4))
    assert found == [(1, 2)]


NESTED = STEM + "".join(
    f" i{k}0 = Conv<pads=[1,1,1,1]>({x}, v) i{k} = Add({x}, i{k}0) o{k} = Add({x}, i{k})"
    for k, x in ((0, "s"), (1, "o0"))
)


@pytest.mark.filterwarnings("ignore::onnxcompress.errors.CompressWarning")
def test_blocks_inside_others_do_not_count_twice() -> None:
    model = network(f"{NESTED} y = Relu(o1)")
    assert len(find_blocks(model).blocks) == 4
    (result,) = run([DropBlocks(blocks=3, **FEW)], model)
    assert str(figures_of(result, DropBlocksFigures).target_missed).startswith(
        "2 blocks dropped, 3 asked for"
    )
    found = inspect_model(network(f"{NESTED} y = Relu(o1)"), "n", 0)
    assert [s.exit for s in found.chain if s.droppable] == ["o0", "o1"]
    assert sum(s.macs for s in found.chain) == found.macs
    with pytest.raises(OptionError, match="'i0': it lies inside 'o0', which goes as a whole"):
        run([DropBlocks(drop=("i0", "o0"), **FEW)], network(f"{NESTED} y = Relu(o1)"))


def test_a_block_keeps_the_type() -> None:
    body = (
        STEM
        + """ c = Cast<to=10>(s) a = Conv<pads=[1,1,1,1]>(c, k) t = Concat<axis=1>(a, a)
        d = Conv<pads=[1,1,1,1]>(t, k) e = Cast<to=1>(d) y = Relu(e)"""
    )
    model = network(body, "float[N,4,8,8] y", k=weight(4, 8, 3, 3, seed=4, dtype=np.float16))
    assert not find_blocks(model).blocks


def test_a_clip_whose_bound_is_computed_from_data_stays() -> None:
    """Behind the block it may cut more than the Relu in front of it does."""
    body = STEM + BLOCK.format(a="a", x="s") + " m = ReduceMax<keepdims=0>(x) y0 = Clip(a, , m) y = Neg(y0)"
    model = network(body)
    drop_blocks(model, ["a"])
    assert [node.op for node in model.graph.nodes].count("Clip") == 1


@pytest.mark.parametrize(
    "row",
    [
        {"recoverability": float("nan")},
        {"latency_share": ["a", "b", "c"]},
        {"latency_share": [0.1, 0, float("nan")]},
    ],
)
def test_scores_that_are_no_numbers_are_refused(row: dict[str, Any], tmp_path: Path) -> None:
    whole = {"exit": "a", "latency_share": [0.1, 0.1, 0.1], "recoverability": 0.1, "score": 1.0} | row
    (tmp_path / "s.json").write_text(json.dumps({"of": {}, "blocks": [whole]}))
    with pytest.raises(InputError, match="not a file of block scores"):
        read_scores(tmp_path / "s.json", {}, ["a"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"drop": ("a",), "scores": "s.json"}, "--drop scores nothing"),
        ({"blocks": 1, "scores": "."}, "is a folder"),
    ],
)
def test_scores_are_a_file_that_is_used(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        DropBlocks(**options).check()


def test_threads_are_not_more_than_a_machine_can_use() -> None:
    model = network(f"{STEM} y = Relu(s)")
    with pytest.raises(CompressError, match="threads: 99999; expected"):
        session(model, threads=99999)
