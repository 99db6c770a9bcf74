"""Patterns of nodes: what fits them, and that passes leave alone exactly what they are told to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.cli.main import main
from onnxcompress.errors import OptionError
from onnxcompress.graph.node_selection import NodeSelection, fits, read_patterns
from onnxcompress.model import Model
from onnxcompress.passes import Pass
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.quantize import Quantize
from onnxcompress.pipeline.recipe import parse_recipe
from onnxcompress.quantization.ort_fusion import fused_counts
from onnxcompress.sensitivity.float_layers import float_layers
from onnxcompress.sensitivity.rows import Row
from tests.helpers.folding import graph, weight


def network() -> onnx.ModelProto:
    """Layers `/body/a`, `/body/b`, one without a name that gives `c`, and `/head[0]/fc`."""
    body = """[/body/a] a = Conv<pads = [1,1,1,1]>(x, wa) ra = Relu(a)
        [/body/b] b = Conv<pads = [1,1,1,1]>(ra, wb) [/body/sum] s = Add(b, ra)
        c = Conv(s, wc) [/pool] p = GlobalAveragePool(c) f = Flatten(p) [/head[0]/fc] y = Gemm(f, wd)"""
    arrays = {
        "wa": weight(8, 3, 3, 3),
        "wb": weight(8, 8, 3, 3, seed=1),
        "wc": weight(8, 8, 1, 1, seed=2),
        "wd": weight(8, 5, seed=3),
    }
    plain, names = body, {}
    for name, output in (("/body/a", "a"), ("/body/b", "b"), ("/body/sum", "s"), ("/pool", "p")):
        plain, names[output] = plain.replace(f"[{name}] ", ""), name
    plain, names["y"] = plain.replace("[/head[0]/fc] ", ""), "/head[0]/fc"
    proto = graph("(float[N,3,8,8] x) => (float[N,5] y)", plain, arrays)
    for node in proto.graph.node:
        node.name = names.get(node.output[0], "")
    return proto


LAYERS = {"wa": "/body/a", "wb": "/body/b", "wc": "c", "wd": "/head[0]/fc"}


@pytest.mark.parametrize(
    ("pattern", "name", "op", "fitting"),
    [
        ("/a/conv", "/a/conv", "Conv", True),
        ("/a/conv", "/a/conv2", "Conv", False),
        ("/a/*", "/a/b/conv", "Conv", True),
        ("/a/conv?", "/a/conv2", "Conv", True),
        ("/A/*", "/a/b", "Conv", False),
        ("/head[0]/fc", "/head[0]/fc", "Gemm", True),  # the very name, before it is read as a pattern
        ("re:conv[0-9]$", "/a/conv2", "Conv", True),
        ("re:^conv", "/a/conv2", "Conv", False),
        ("op:Conv", "x", "Conv", True),
        ("op:Conv", "x", "ConvTranspose", False),
        ("op:*Pool", "x", "MaxPool", True),
    ],
)
def test_patterns(pattern: str, name: str, op: str, fitting: bool) -> None:
    assert fits(pattern, name, op) is fitting


def test_a_file_holds_a_pattern_a_line(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("# of the head\n\n/head/*\n  re:a{1,2}  \n/head/*\n")
    assert read_patterns(["x", f"@{file}"], "--exclude") == ("x", "/head/*", "re:a{1,2}")
    with pytest.raises(OptionError, match=r"--exclude @.*none.txt: cannot be read"):
        Quantize(exclude=(f"@{tmp_path / 'none.txt'}",))
    with pytest.raises(OptionError, match=r"--include 're:\(': not a regular expression"):
        Quantize(include=("re:(",))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("/body/d", "did you mean '/body/"),
        ("op:Cnov", "did you mean 'op:Conv'?"),
        ("op:Zzz", "operators are "),
        ("re:^head.0./fc", "did you mean '/head[0]/fc'?"),
        ("nothing alike", "`onnxcompress sensitivity` lists the layers"),
    ],
)
def test_a_pattern_that_fits_nothing_is_an_error(pattern: str, words: str) -> None:
    model = Model.from_proto(network())
    for selection in (NodeSelection(exclude=(pattern,)), NodeSelection(include=("op:*", pattern))):
        with pytest.raises(OptionError, match="no node fits") as caught:
            selection.check(model)
        assert words in str(caught.value)


def quantized(model: Model) -> set[str]:
    """Layers whose weight comes from a DequantizeLinear."""
    return {
        node.name or node.outputs[0].name
        for node in model.graph.nodes
        if node.op in ("Conv", "Gemm") and any(t.inputs and t.inputs[0].op == "DequantizeLinear"
                                               and t.name.startswith("w") for t in node.inputs)
    }  # fmt: skip


def pruned(model: Model) -> set[str]:
    """Layers whose weight has zeros."""
    tensors = model.graph.tensors()
    return {
        layer for w, layer in LAYERS.items() if np.count_nonzero(tensors[w].values) < tensors[w].values.size
    }


def halved(model: Model) -> set[str]:
    """Layers with a float16 weight."""
    tensors = model.graph.tensors()
    return {layer for w, layer in LAYERS.items() if w in tensors and tensors[w].dtype == np.float16}


PASSES: list[tuple[Callable[..., Pass], Callable[[Model], set[str]]]] = [
    (lambda **chosen: Quantize(synthetic=8, inputs="procedural", effort="fast", **chosen), quantized),
    (lambda **chosen: Prune(sparsity=0.3, scope="layer", reconstruct=False, **chosen), pruned),
    (lambda **chosen: HalfPrecision(max_error=0.5, **chosen), halved),
]
ALL = set(LAYERS.values())


@pytest.mark.parametrize(("make", "changed"), PASSES, ids=["quantize", "prune", "fp16"])
@pytest.mark.parametrize(
    ("chosen", "layers"),
    [
        ({}, ALL),
        ({"exclude": ("/body/b",)}, ALL - {"/body/b"}),
        ({"exclude": ("c", "op:Gemm")}, {"/body/a", "/body/b"}),
        ({"include": ("/body/*",)}, {"/body/a", "/body/b"}),
        ({"include": ("op:Conv",), "exclude": ("re:a$",)}, {"/body/b", "c"}),
    ],
)
def test_a_pass_leaves_alone_what_it_is_told_to(
    make: Callable[..., Pass],
    changed: Callable[[Model], set[str]],
    chosen: dict[str, Any],
    layers: set[str],
) -> None:
    model = Model.from_proto(network())
    pass_ = make(**chosen)
    previewed = {r.node for r in pass_.preview(model) if "--" in r.rule}
    result = pass_.apply(model)
    assert changed(model) == layers
    assert {r.node for r in result.refusals if r.node in ALL} >= ALL - layers
    assert previewed & ALL == ALL - layers  # a dry run says so, too


def test_operators_between_layers_can_be_left_alone() -> None:
    """They read floats: between two quantized tensors runtimes would fuse them all the same."""
    model = Model.from_proto(network())
    Quantize(synthetic=8, inputs="procedural", effort="fast", exclude=("/body/sum", "/pool")).apply(model)
    between = [n for n in model.graph.nodes if n.op in ("Add", "GlobalAveragePool")]
    assert not {t.inputs[0].op for n in between for t in n.inputs} & {"DequantizeLinear"}
    assert not {"QLinearAdd", "QLinearGlobalAveragePool"} & fused_counts(model).fused.keys()
    assert quantized(model) == ALL


@pytest.mark.parametrize("make", [make for make, _ in PASSES], ids=["quantize", "prune", "fp16"])
def test_a_pass_and_its_dry_run_refuse_a_slip(make: Callable[..., Pass]) -> None:
    for act in ("preview", "apply"):
        with pytest.raises(OptionError, match="did you mean '/body/a'"):
            getattr(make(exclude=("/body/aa",)), act)(Model.from_proto(network()))


def test_a_recipe_names_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("op:Gemm\n")
    text = "passes: [{quantize: {exclude: ['@list.txt', /head]}}]"
    (pass_,) = parse_recipe(text, str(tmp_path / "r.yaml")).passes
    assert isinstance(pass_, Quantize)
    assert pass_.exclude == ("op:Gemm", "/head")


def rows() -> list[Row]:
    errors = {"a": (0.1, 0.02, 5.0), "b": (0.5, 0.2, 5.0), "c": (0.01, 0.0, 5.0)}
    kinds: list[tuple[Any, float]] = [("weight_bits", 8), ("activation_bits", 8), ("weight_bits", 4)]
    return [
        Row(name, "Conv", name, 1, kind, value, error, None)
        for name, costs in errors.items()
        for (kind, value), error in zip(kinds, costs, strict=True)
    ]


@pytest.mark.parametrize(
    ("allowed", "names", "left"),
    [
        (1.0, (), 0.83),
        (0.2, ("b",), 0.13),
        (0.13, ("b",), 0.13),
        (0.05, ("b", "a"), 0.01),
        (1e-9, ("b", "a", "c"), 0),
    ],
)
def test_the_fewest_layers_stay_that_keep_the_allowed_loss(
    allowed: float, names: tuple[str, ...], left: float
) -> None:
    found = float_layers(rows(), allowed)
    assert found.names == names
    assert found.whole == pytest.approx(0.83)  # 4 bits are the second value of their kind: not counted
    assert found.left == pytest.approx(left)


def test_sensitivity_prints_a_list_that_quantize_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, out = str(tmp_path / "net.onnx"), str(tmp_path / "o.onnx")
    onnx.save(network(), net)
    command = ["sensitivity", net, "--inputs", "procedural", "--synthetic", "9", "--max-loss", "0.0002"]
    assert main([*command, "--json"]) == 0
    names = json.loads(capsys.readouterr().out)["exclude"]
    assert main(command) == 0
    listed = capsys.readouterr().out
    assert [line for line in listed.splitlines() if not line.startswith("#")] == names
    assert 0 < len(names) < len(ALL)
    (tmp_path / "float.txt").write_text(listed)
    few = ["--synthetic", "4", "--inputs", "procedural", "-q"]
    assert main(["quantize", net, out, "--exclude", f"@{tmp_path / 'float.txt'}", *few]) == 0
    assert quantized(Model.from_proto(onnx.load(out))) == ALL - set(names)
    assert main([*command[:-1], "0"]) == 2


def test_an_empty_list_includes_nothing_and_is_refused(tmp_path: Path) -> None:
    """With no pattern at all everything may be changed: the opposite of what an empty list says."""
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(OptionError, match=r"--include @.*empty\.txt: it has no pattern"):
        Quantize(include=(f"@{tmp_path / 'empty.txt'}",))
    assert Quantize(exclude=(f"@{tmp_path / 'empty.txt'}",)).exclude == ()


@pytest.mark.parametrize("allowed", ["0", "-1", "nan"])
def test_a_loss_that_none_can_keep_is_refused_before_the_work(
    allowed: str, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured all the same")

    monkeypatch.setattr("onnxcompress.sensitivity.analysis.sensitivity", never)
    assert main(["sensitivity", str(models / "resnet20-fashion.onnx"), "--max-loss", allowed]) == 2
    assert f"--max-loss {allowed}: expected more than 0" in capsys.readouterr().err
