"""The guard: wrong results are refused and not written, right ones pass, on inputs nothing learned from."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import click
import numpy as np
import onnx
import pytest

from onnxcompress.account import Change, Figures
from onnxcompress.cli.main import main
from onnxcompress.cli.pass_commands import command
from onnxcompress.errors import OptionError, ResultRefused
from onnxcompress.evaluation.guard import Floors, Guard
from onnxcompress.graph.edit import set_values
from onnxcompress.model import Model, load
from onnxcompress.optimize.unseen_inputs import COUNT, MANY
from onnxcompress.option_fields import option
from onnxcompress.passes import CATALOGUE
from onnxcompress.passes.base import Pass, PassResult, run
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.prune import Prune
from onnxcompress.pipeline import Pipeline
from onnxcompress.pipeline.cache import Cache
from onnxcompress.progress import Progress, silent
from tests.helpers.faults import FAULTS, Break
from tests.helpers.folding import graph, norm, weight

NET = "resnet20-fashion.onnx"
CRUDE = ["--no-reconstruct", "--sparsity", "0.9"]
"""Options with which pruning ruins the network."""


@dataclass(frozen=True)
class NoiseFigures(Figures):
    """How much of each layer is noise."""

    @property
    def layer_snr_db(self) -> dict[str, float]:
        return {"stem": 1.5, "head": 30.0}


@dataclass(frozen=True)
class Noise(Pass):
    """Add noise to the first weight; the seed is also that of what it would learn from."""

    name: ClassVar[str] = "noise"
    figures: ClassVar[type[Figures]] = NoiseFigures
    floors: ClassVar[Floors] = Floors(warn_db=1, refuse_db=0)

    strength: float = option(0.3, "Deviation of the noise over that of the weight.")
    images: str | None = option(None, "What it learns from.", file="read")
    count: int | None = option(None, "How many of them.")
    reference: str | None = option(None, "The model to come closer to.", file="read")
    seed: int = option(0, "Random seed.")

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[NoiseFigures]:
        weight = next(n for n in model.graph.nodes if n.op == "Conv").inputs[1]
        noise = np.random.default_rng(self.seed).normal(size=weight.values.shape) * weight.values.std()
        set_values(weight, (weight.values + self.strength * noise).astype(np.float32))
        model.touch()
        return PassResult([Change("weight", "noise")], measured=NoiseFigures())


@pytest.fixture
def net(models: Path) -> Model:
    return load(models / NET)


def detector() -> Model:
    """Four box columns with values of hundreds, and two scores between 0 and 1."""
    body = """
        c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k)
        r = Relu (c)
        p = GlobalAveragePool (r)
        f = Flatten (p)
        b = Gemm (f, wb)
        s = Gemm (f, ws)
        t = Sigmoid (s)
        y = Concat <axis = 1> (b, t)
    """
    arrays = {"k": weight(8, 3, 3, 3), "wb": 300 * weight(8, 4, seed=1), "ws": weight(8, 2, seed=2)}
    return Model.from_proto(graph("(float[N,3,16,16] x) => (float[N,6] y)", body, arrays))


@dataclass(frozen=True)
class CrushScores(Pass):
    """Give boxes and scores one scale, as one quantizer behind a Concat does."""

    name: ClassVar[str] = "crush-scores"

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[None]:
        node = next(n for n in model.graph.nodes if n.op == "Sigmoid")
        node.op, node.attrs = "Elu", {"alpha": 0.0}
        node.inputs[0].inputs[0].inputs[1].values *= 0
        model.touch()
        return PassResult([Change("y", "one scale")])


@pytest.mark.parametrize("layer", [1, -1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_pass_is_refused(net: Model, fault: str, layer: int) -> None:
    with pytest.raises(ResultRefused, match=r"nothing is written: output 'logits'.*--force writes it"):
        run([Break(fault, layer)], net, guard=Guard())


def test_scores_crushed_beside_boxes_are_refused() -> None:
    with pytest.raises(
        ResultRefused, match=r"signal to noise -?0\.\d dB\) in 2 channels from 4 on of dimension 1"
    ):
        run([CrushScores()], detector(), guard=Guard())


def test_right_passes_pass(net: Model) -> None:
    results = run([FoldBatchNorm(), Equalize(), Prune(sparsity=0.3, reconstruct=False)], net, guard=Guard())
    for one, result in zip((FoldBatchNorm(), Equalize()), results, strict=False):
        verdict = result.verdict(one, Guard())
        assert verdict is not None
        assert verdict.status == "kept"
        assert result.guard is not None
        assert result.guard.fidelity is not None
        assert result.guard.fidelity.furthest.max_rel < 1e-5


def test_a_pass_that_keeps_the_function_may_change_it_by_rounding_alone(net: Model) -> None:
    class Exact(Noise):
        preserves_function: ClassVar[bool] = True

    with pytest.raises(
        ResultRefused, match=r"of its largest magnitude, and the pass may change it by 0\.0001"
    ):
        run([Exact(strength=1e-3)], net, guard=Guard())
    run([Exact(strength=1e-7)], net, guard=Guard())


def test_without_a_guard_nothing_is_judged(net: Model) -> None:
    (result,) = run([Break("constant outputs", -1)], net)
    assert result.guard is None


def test_a_pass_with_a_reference_must_not_move_away_from_it(net: Model, models: Path) -> None:
    (result,) = run([Noise(0.3)], net, guard=Guard(force=True))
    away = Noise(0.6, reference=str(models / NET), seed=1)
    with pytest.raises(
        ResultRefused, match=r"outputs kept [-\d.]+ dB of the reference's before, and would keep"
    ):
        run([away], net.copy(), guard=Guard())
    back = Noise(-0.3, reference=str(models / NET))
    (result,) = run([back], net, guard=Guard())
    verdict = result.verdict(back, Guard())
    assert verdict is not None
    assert verdict.status == "kept"


def test_a_warning_names_layers_and_options_that_exist(net: Model) -> None:
    one = Noise(0.5)
    (result,) = run([one], net, guard=Guard(warn_snr=60))
    verdict = result.verdict(one, Guard(warn_snr=60))
    assert verdict is not None
    assert (verdict.status, verdict.advice) == (
        "warned",
        ("the layers that lose most: stem (1.5 dB), head (30.0 dB)",),
    )


@pytest.mark.parametrize("name", [entry.name for entry in CATALOGUE])
def test_what_is_hinted_at_is_an_option(name: str) -> None:
    from onnxcompress.passes import load_pass

    cls = load_pass(name)
    known = {
        flag for option in command(name).params if isinstance(option, click.Option) for flag in option.opts
    }
    changed = {"quantize": {"weight_bits": 4, "activation_bits": 4}}.get(name, {})
    for values in ({}, changed):
        hinted = re.findall(r"--[a-z-]+", " ".join(cls(**values).hints()))
        assert set(hinted) <= known


# inputs that nothing learned from


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """200 images, each with its number for its pixels."""
    file = tmp_path / "numbered.npz"
    x = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None, None], (200, 28, 28, 1))
    np.savez(file, x=x, y=np.arange(200) % 10)
    return file


def test_a_pass_with_many_images_leaves_some_out(net: Model, numbered: Path) -> None:
    chain = Pipeline([Noise(0.01, images=str(numbered)), Noise(0.01, images=str(numbered), count=20)])
    assert [p.options()["count"] for p in chain.keeping_aside(Guard()).passes] == [200 - COUNT, 20]
    assert chain.keeping_aside(Guard(verify=False)) == chain
    step = Pipeline(chain.passes[:1]).run(net, guard=Guard()).steps[0]
    assert step.pass_.options()["count"] == 200 - COUNT
    assert step.result.guard is not None
    assert step.result.guard.inputs == f"{COUNT} images of {numbered} that no pass learned from"
    few = numbered.with_name("few.npz")
    np.savez(few, x=np.zeros((MANY - 1, 28, 28, 1), np.uint8))
    assert Pipeline([Noise(images=str(few))]).keeping_aside(Guard()).passes[0].options()["count"] is None


# chains


def test_a_chain_is_judged_as_a_whole(net: Model) -> None:
    chain = Pipeline([Noise(0.3, seed=1), Noise(0.3, seed=2)])
    run_ = chain.run(net, guard=Guard())
    whole, single = run_.guard, run_.steps[1].result.guard
    assert whole is not None
    assert whole.fidelity is not None
    assert single is not None
    assert single.fidelity is not None
    together, alone = whole.fidelity.worst.judged_db, single.fidelity.worst.judged_db
    assert together < alone - 1
    with pytest.raises(ResultRefused, match="nothing is written: all passes together: output 'logits'"):
        chain.run(net, guard=Guard(min_snr=(together + alone) / 2))


def test_the_pass_of_a_chain_that_is_at_fault_is_named(net: Model) -> None:
    with pytest.raises(ResultRefused, match="pass 2 of 2, break: nothing is written"):
        Pipeline([FoldBatchNorm(), Break("a layer's sign")]).run(net, guard=Guard())


def test_a_refused_result_is_kept_in_the_cache_and_judged_anew(net: Model, tmp_path: Path) -> None:
    chain, cache = Pipeline([Break("a layer's sign")]), Cache(tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(ResultRefused):
            chain.run(net, cache=cache, guard=Guard())
    (step,) = chain.run(net, cache=cache, guard=Guard(force=True)).steps
    assert step.cached
    assert step.verdict is not None
    assert step.verdict.status == "forced"
    assert step.as_dict()["guard"]["outputs"][0]["name"] == "logits"


def test_a_result_of_the_cache_that_nobody_judged_is_judged(net: Model, tmp_path: Path) -> None:
    chain, cache = Pipeline([Break("a layer's sign")]), Cache(tmp_path / "cache")
    chain.run(net, cache=cache)
    with pytest.raises(ResultRefused):
        chain.run(net, cache=cache, guard=Guard())


# the command line


def test_a_refused_result_is_not_written(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.onnx"
    argv = ["prune", str(models / NET), str(out), "-q", *CRUDE]
    assert main(argv) == 1
    assert re.search(
        r"error: nothing is written: .* below 0 dB; try --sparsity 0.45", capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []
    out.write_bytes(b"as it was")
    assert main(argv) == 1
    assert out.read_bytes() == b"as it was"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "status"),
    [(["--force"], "forced"), (["--min-snr", "-20"], "warned"), (["--no-verify"], None)],
)
def test_the_user_has_the_last_word(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: str | None
) -> None:
    out = tmp_path / "out.onnx"
    argv = ["prune", str(models / NET), str(out), *CRUDE, *options]
    assert main([*argv, "--json"]) == 0
    guard = json.loads(capsys.readouterr().out)["guard"]
    assert (guard and guard["status"]) == status
    assert out.exists()
    assert main(argv) == 0
    assert ("WARNING" in capsys.readouterr().out) == (status is not None)


def test_a_recipe_says_how_it_is_judged(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("passes: [prune: {sparsity: 0.9, reconstruct: false}]\nguard: {min_snr: -20}\n")
    argv = ["run", str(recipe), str(models / NET), str(tmp_path / "o.onnx"), "--no-cache", "--json"]
    assert main(argv) == 0
    account = json.loads(capsys.readouterr().out)
    assert account["guard"] is None  # the one step says the same
    assert account["steps"][0]["guard"]["min_snr_db"] == -20
    assert main([*argv, "--min-snr", "3"]) == 1


def test_nothing_is_compared_and_options_of_the_guard_contradict() -> None:
    for guard in (Guard(verify=False, min_snr=3.0), Guard(verify=False, force=True)):
        with pytest.raises(OptionError, match="--no-verify: nothing is compared"):
            guard.check()


def test_what_onnxruntime_does_not_run_any_more_is_refused(net: Model) -> None:
    class Cut(Noise):
        def apply(self, model: Model, progress: Progress = silent) -> PassResult[NoiseFigures]:
            weight = [n for n in model.graph.nodes if n.op == "Conv"][1].inputs[1]
            weight.values = weight.values[:, :-1]
            model.touch()
            return PassResult([Change("weight", "an input channel cut off")])

    with pytest.raises(ResultRefused, match=r"nothing is written: .*the run failed"):
        run([Cut()], net, guard=Guard())


def test_what_never_ran_is_not_compared() -> None:
    body = "c = Conv (x, k) b = BatchNormalization (c, gb, bb, mb, vb) y = nobody.Twist (b)"
    arrays = {"k": weight(4, 3, 1, 1), **norm(4, "b")}
    proto = graph("(float[N,3,4,4] x) => (float[N,4,4,4] y)", body, arrays, domain="nobody")
    one = FoldBatchNorm()
    (result,) = run([one], Model.from_proto(proto), guard=Guard())
    assert result.modified
    verdict = result.verdict(one, Guard())
    assert verdict is not None
    assert (verdict.status, verdict.text.startswith("outputs not compared: ")) == ("not compared", True)


def test_inputs_that_become_float16_are_fed_as_such(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "half.onnx"
    assert main(["fp16", str(models / NET), str(out), "--float16-io", "--json"]) == 0
    assert onnx.load(out).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert json.loads(capsys.readouterr().out)["guard"]["status"] == "kept"
