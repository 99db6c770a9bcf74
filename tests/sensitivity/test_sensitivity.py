"""sensitivity: a changed layer costs what onnxruntime says, workers change nothing; the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from onnxcompress.cli.main import main
from onnxcompress.errors import InputError, ModelError, OptionError
from onnxcompress.graph.edit import set_values
from onnxcompress.graph.query import read
from onnxcompress.model import Model, load
from onnxcompress.optimize.calibration import InputRequest, gather_inputs
from onnxcompress.optimize.reconstruction.context import CalibrationContext
from onnxcompress.optimize.reconstruction.gptq import nearest
from onnxcompress.optimize.reconstruction.saturation import SaturationBounds
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
from onnxcompress.quantization.qdq_plan import Bits, make_plan
from onnxcompress.runtime.inference import run as run_model
from onnxcompress.sensitivity.analysis import Sensitivity, sensitivity
from onnxcompress.sensitivity.layer_errors import Measuring, layer_errors
from onnxcompress.sensitivity.rows import Row, make_variants, read_rows
from tests.helpers.folding import Arrays, graph, norm, weight


def measured(model: Model, *arguments: Any, **options: Any) -> Sensitivity:
    """The sensitivities of a network as the command measures them: folded and canonicalized first."""
    own = model.copy()
    fold_and_canonicalize(own)
    return sensitivity(own, *arguments, **options)


RESNET = "resnet20-fashion.onnx"
BODY = """c = Conv<pads=[1, 1, 1, 1]>(x, w) n = BatchNormalization(c, g, b, m, v) r = Relu(n)
    d = Conv<group=4, pads=[1, 1, 1, 1]>(r, wd, cd) a = Add(r, d) k = MatMul(a, wm)
    q = GlobalAveragePool(k) s = Shape(x) i = Gather(s, zero) u = Unsqueeze(i, axis)
    t = Concat<axis=0>(u, rest) f = Reshape(q, t) y = Gemm<transB=1>(f, wg, cg) z = Relu(d)"""
PROCEDURAL = InputRequest(inputs="procedural", synthetic=40)
LEARNED = 27
"""Of 40 inputs: the last third is measured on."""


def small(batch: str = "N") -> Model:
    """Two outputs, a branch, a depthwise layer, a MatMul, a computed Reshape; 40 inputs are two batches."""
    arrays: Arrays = {"w": weight(4, 3, 3, 3), **norm(4), "wd": weight(4, 1, 3, 3, seed=1)}
    arrays |= {"cd": np.ones(4, "f4"), "wm": weight(8, 8, seed=3), "wg": weight(5, 4, seed=2)}
    arrays |= {"cg": np.arange(5, dtype="f4"), "zero": np.array(0), "axis": np.array([0])}
    arrays |= {"rest": np.array([-1])}
    text = f"(float[{batch},3,8,8] x) => (float[{batch},5] y, float[{batch},4,8,8] z)"
    return Model.from_proto(graph(text, BODY, arrays))


def by_weight(rows: list[Row]) -> dict[str, Row]:
    return {row.weight: row for row in rows}


def plain_error(model: Model, name: str, values: np.ndarray, x: np.ndarray) -> float:
    """As onnxruntime computes it."""
    before = run_model(model.to_proto(), {"x": x})
    changed = model.copy()
    set_values(changed.graph.tensors()[name], values)
    after = run_model(changed.to_proto(), {"x": x})
    return float(np.mean([np.square(after[n] - before[n]).mean() / before[n].var() for n in before]))


def other_classes(model: Model, name: str, values: np.ndarray, x: np.ndarray) -> float:
    """The share of inputs with another top-1 class."""
    changed = model.copy()
    set_values(changed.graph.tensors()[name], values)
    before, after = (run_model(one.to_proto(), {"x": x})["y"].argmax(1) for one in (model, changed))
    return float((before != after).mean())


@pytest.mark.parametrize("kind", ["bits", "sparsity"])
def test_a_layer_without_bias_costs_what_onnxruntime_says(kind: str) -> None:
    """A MatMul has no bias to correct: the error is of the rounded, or pruned, weight itself."""
    body = "f = Flatten(x) h = MatMul(f, w) r = Relu(h) y = MatMul(r, v)"
    arrays: Arrays = {"w": weight(48, 6), "v": weight(6, 5, seed=1)}
    model = Model.from_proto(graph("(float[N,3,4,4] x) => (float[N,5] y)", body, arrays))
    amounts = {"bits": (3,)} if kind == "bits" else {"bits": (), "sparsity": (0.4,)}
    found = by_weight(measured(model, PROCEDURAL, reconstruct=False, **amounts).rows)
    x = gather_inputs(model, PROCEDURAL).images.array()[LEARNED:]
    for layer in make_plan(model, Bits(8, None, None)).layers.values():
        own = read(model.graph.tensors()[layer.linear.weight_name])
        if kind == "bits":
            rounded = (
                nearest(torch.from_numpy(own.T[None].copy()), SaturationBounds(-4, 3), True)
                .weight[0]
                .T.numpy()
            )
        else:
            rounded = np.where(
                np.abs(own) > np.sort(np.abs(own).ravel())[round(0.4 * own.size) - 1], own, 0
            )
        expected = plain_error(model, layer.linear.weight_name, rounded, x)
        row = found[layer.linear.weight_name]
        assert expected > 1e-4
        assert row.error == pytest.approx(expected, rel=1e-3)
        assert row.changed == other_classes(model, layer.linear.weight_name, rounded, x)


def test_all_layers_of_a_branched_network_have_errors_that_fall_with_the_bits() -> None:
    found = measured(small(), PROCEDURAL, bits=(2, 4, 8), activation_bits=(4, 8), sparsity=(0.3, 0.8))
    weights = list(dict.fromkeys(row.weight for row in found.rows))
    assert len(weights) == 3  # of the MatMul the input has rank 4
    assert "multiplies" in found.refusals[0].rule
    assert len(found.rows) == 3 * 7
    for name in weights:
        rows = [row for row in found.rows if row.weight == name]
        errors = {(row.kind, row.value): row.error for row in rows}
        assert errors["weight_bits", 2] > errors["weight_bits", 4] > errors["weight_bits", 8] > 0
        assert errors["activation_bits", 4] > errors["activation_bits", 8] > 0
        assert errors["sparsity", 0.8] > errors["sparsity", 0.3] > 0
        assert all(row.changed is not None and 0 <= row.changed <= 1 for row in rows)
        assert len({row.parameters for row in rows}) == 1


def test_the_last_layer_moves_one_output_only() -> None:
    """z is made before the Gemm, so that the mean over both outputs is half of y's error."""
    model = small()
    fold_and_canonicalize(model)
    rows = by_weight(measured(model, PROCEDURAL, bits=(3,), reconstruct=False, stretch=False).rows)
    own = read(model.graph.tensors()["wg"])
    rounded = nearest(torch.from_numpy(own[None].copy()), SaturationBounds(-4, 3), True).weight[0].numpy()
    x = gather_inputs(model, PROCEDURAL).images.array()
    before = run_model(model.to_proto(), {"x": x})["y"]
    set_values(model.graph.tensors()["wg"], rounded)
    off = run_model(model.to_proto(), {"x": x})["y"] - before
    off -= off[:LEARNED].mean(0)  # as bias correction does
    off, before = off[LEARNED:], before[LEARNED:]
    assert rows["wg"].error == pytest.approx(np.square(off).mean() / before.var() / 2, rel=1e-3)


def test_places_that_moments_are_taken_at_follow_the_seed() -> None:
    """Of images of 20 x 20 pixels, of which 256 places are drawn."""
    body = "c = Conv<pads=[1,1,1,1]>(x, w, b) y = Relu(c)"
    arrays = {"w": weight(4, 3, 3, 3), "b": weight(4, seed=5)}
    model = Model.from_proto(graph("(float[N,3,20,20] x) => (float[N,4,20,20] y)", body, arrays))
    x = torch.randn(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    context = CalibrationContext(model, make_plan(model, Bits(8, None, None)), x, StatisticsAlignment(), 3)
    variants = make_variants((2,), (), ())
    first, again, other = (
        layer_errors(context, variants, Measuring(seed=seed))[0].error for seed in (0, 0, 1)
    )
    assert first == again != other
    assert other == pytest.approx(first, rel=0.1)


@pytest.mark.slow
def test_workers_and_the_model_stay_out_of_the_result(models: Path) -> None:
    model = load(models / RESNET)
    before = model.digest(), torch.get_num_threads()
    request = InputRequest(preprocess="fashion-mnist", inputs="layerwise", synthetic=8)
    found = [measured(model, request, (4,), (8,), (0.5,), workers=workers).rows for workers in (1, 3)]
    assert found[0] == found[1]
    assert len(found[0]) == 3 * sum(node.op in ("Conv", "Gemm") for node in model.graph.nodes)
    assert (model.digest(), torch.get_num_threads()) == before


@pytest.mark.slow
def test_reconstruction_costs_less_than_nearest(models: Path) -> None:
    model = load(models / RESNET)
    request = InputRequest(preprocess="fashion-mnist", inputs="layerwise", synthetic=8)
    sums = [
        sum(row.error for row in measured(model, request, (3,), reconstruct=one).rows)
        for one in (True, False)
    ]
    assert sums[0] < 0.5 * sums[1]


def test_a_layer_is_not_measured_on_what_it_was_rounded_by() -> None:
    """A Gemm has one row an image: on 27 rows of 64 inputs, rounding can be made exact nearly at will."""
    arrays: Arrays = {"w": weight(64, 64)}
    model = Model.from_proto(
        graph("(float[N,1,8,8] x) => (float[N,64] y)", "f = Flatten(x) y = Gemm(f, w)", arrays)
    )
    errors = [measured(model, PROCEDURAL, (3,), reconstruct=one).rows[0].error for one in (True, False)]
    assert errors[0] > 0.3 * errors[1]


def test_a_fixed_batch_is_kept() -> None:
    open_, fixed = (measured(small(batch), PROCEDURAL, bits=(4,)).rows for batch in ("N", "4"))
    for a, b in zip(open_, fixed, strict=True):
        assert a.error == pytest.approx(b.error, rel=0.3)  # other places give the moments
    with pytest.raises(InputError, match="fixes a batch of 64"):
        measured(small("64"), PROCEDURAL)


def test_what_cannot_be_measured_is_said() -> None:
    bare = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,3,8,8] y)", "y = Relu(x)", {}))
    with pytest.raises(ModelError, match="no layer with a constant float32 weight"):
        measured(bare, PROCEDURAL)
    for wrong in ({"bits": (9,)}, {"bits": (), "sparsity": (1.0,)}, {"bits": ()}, {"workers": -1}):
        with pytest.raises(OptionError):
            measured(bare, PROCEDURAL, **wrong)


# the command


def test_the_command_writes_json_that_is_read_back_and_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(small().to_proto(), path)
    arguments = ["sensitivity", str(path), "--inputs", "procedural", "--synthetic", "8"]
    assert main([*arguments, "--weight-bits", "3", "--sparsity", "0.5", "--json"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "rows.json").write_text(text)
    rows = read_rows(tmp_path / "rows.json", load(path).digest())
    assert [(row.kind, row.value) for row in rows[:3]] == [
        ("weight_bits", 3),
        ("activation_bits", 8),
        ("sparsity", 0.5),
    ]
    with pytest.raises(InputError, match="measured on another model"):
        read_rows(tmp_path / "rows.json", "other")
    with pytest.raises(InputError, match="not a sensitivity file"):
        read_rows(path, "other")
    for name in ("plot.png", "plot.svg"):
        assert main([*arguments, "--plot", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    assert "weight 8 bits" in out
    assert "input 8 bits" in out
    assert "measured on 8 procedural" in out
    assert np.asarray(Image.open(tmp_path / "plot.png").convert("L")).std() > 5
    drawn = (tmp_path / "plot.svg").read_bytes()
    assert main([*arguments, "--plot", str(tmp_path / "plot.svg")]) == 0
    assert (tmp_path / "plot.svg").read_bytes() == drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weight-bits", "4,x"], "--weight-bits '4,x': expected whole numbers"),
        (["--weight-bits", "1"], "--weight-bits 1: expected 2 to 8"),
        (["--sparsity", "50"], "expected a share between 0 and 1"),
        (["--weight-bits", "", "--activation-bits", ""], "nothing to measure"),
        (["--plot", "a.bmp"], "expected a name that ends in .png"),
        (["--plot", "none/a.png"], "cannot be written"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str], message: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sensitivity", str(models / RESNET), *arguments]) == 2
    assert message in capsys.readouterr().err
