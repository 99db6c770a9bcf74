"""Tuning a quantized network as a whole: what the student computes, its gradients, what is kept of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import Tensor

from onnxcompress.model import Model
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.ops import OWN_DOMAIN
from onnxcompress.optimize.reconstruction import quantized_tuning
from onnxcompress.optimize.reconstruction.context import CalibrationContext
from onnxcompress.optimize.reconstruction.quantize import QuantizationResults, Quantizer, Settings
from onnxcompress.optimize.reconstruction.quantized_tuning import (
    TuningData,
    fake_quantized,
    levels_of,
    tune_quantized,
    with_values,
)
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.passes.base import run
from onnxcompress.passes.quantize import Quantize
from onnxcompress.quantization.affine_grid import Grid, weight_limits
from onnxcompress.quantization.qdq_plan import Bits, make_plan
from onnxcompress.quantization.qdq_writer import emit
from tests.helpers.folding import graph, weight
from tests.helpers.processor import WIDE

BODY = """a = Conv<pads=[1,1,1,1]>(x, w1, b1) ar = Relu(a)
d = Conv<pads=[1,1,1,1],group=8>(ar, w2, b2) dr = Clip(d, zero, six)
e = Conv(dr, w3, b3) s = Add(e, ar)
t = ConvTranspose<strides=[2,2]>(s, w4, b4) tr = Relu(t)
p = GlobalAveragePool(tr) f = Flatten(p) y = Gemm(f, w5, b5)"""


def network() -> Model:
    """A dense, a depthwise and a pointwise convolution, a sum, a transposed one, a Gemm with transB 0."""
    arrays = {
        "w1": weight(8, 3, 3, 3), "b1": weight(8, seed=1), "w2": weight(8, 1, 3, 3, seed=2),
        "b2": weight(8, seed=3), "w3": weight(8, 8, 1, 1, seed=4), "b3": weight(8, seed=5),
        "w4": weight(8, 6, 2, 2, seed=6), "b4": weight(6, seed=7), "w5": weight(6, 5, seed=8),
        "b5": weight(5, seed=9), "zero": np.float32(0), "six": np.float32(6),
    }  # fmt: skip
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,5] y)", BODY, arrays))


def images(count: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


ASIDE = images(16, seed=2)


def fitted(bits: int = 4, per_channel: bool = True) -> tuple[CalibrationContext, QuantizationResults]:
    model = network()
    plan = make_plan(model, Bits(bits, bits, 8))
    context = CalibrationContext(model, plan, images(), StatisticsAlignment(), 8)
    worker = Quantizer(model, plan, Settings(batch=8, per_channel=per_channel))
    return context, worker.run(context.images)


def written(context: CalibrationContext, results: QuantizationResults) -> Tensor:
    """Outputs of the file on the images kept aside."""
    model, weights = context.model.copy(), {}
    plan = make_plan(model, Bits(4, 4, 8))
    own = dict(zip(plan.layers, context.plan.layers, strict=True))
    for key, layer in plan.layers.items():
        rounded = results.weights[own[key]]
        integers = np.empty(layer.linear.weight.shape, np.int32)
        view = layer.linear.view(integers)
        view[...] = rounded.integers.numpy().reshape(view.shape)
        low, high = weight_limits(layer.weight_bits)
        scale = rounded.scale.numpy().reshape(-1).astype(np.float32)
        weights[key] = integers, Grid(scale, 0, low, high, "int8")
    biases = {key: results.biases[own[key]].numpy() for key in plan.layers}
    emit(model, plan, results.grids, weights, biases, integer_bias=False)
    return outputs(Executor.from_model(model))


def outputs(executor: Executor) -> Tensor:
    return executor.run({"x": ASIDE}, ["y"])["y"].detach()


def error(found: Tensor) -> float:
    wanted = outputs(Executor.from_model(network()))
    return float((found - wanted).square().sum() / wanted.square().sum())


def test_the_student_computes_what_the_file_does() -> None:
    context, results = fitted()
    student = fake_quantized(context.model, context.plan, results)
    torch.testing.assert_close(outputs(student.executor), written(context, results), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_channel", [True, False])
def test_values_that_were_not_tuned_give_the_layers_back(per_channel: bool) -> None:
    context, results = fitted(per_channel=per_channel)
    student = fake_quantized(context.model, context.plan, results)
    same = with_values(results, context.plan, student, dict(student.executor.parameters))
    assert same.grids == results.grids
    for key, rounded in results.weights.items():
        assert torch.equal(same.weights[key].integers, rounded.integers)
        assert torch.equal(same.weights[key].scale, rounded.scale)
        assert torch.equal(same.biases[key], results.biases[key])


def test_what_has_eight_bits_keeps_its_grid() -> None:
    context, results = fitted()
    student = fake_quantized(context.model, context.plan, results)
    wide = {name for key, name in student.scales.items() if key[1] == 8}
    assert wide <= student.frozen
    assert {"w1", "w5"} <= student.frozen
    assert set(student.factors) == {"w2", "w3", "w4"}
    assert student.frozen.isdisjoint(student.factors.values())


def node_executor(**attributes: int) -> Executor:
    x, factor, unit = (gs.Variable(name, np.float32) for name in ("x", "f", "u"))
    out = gs.Variable("y", np.float32)
    node = gs.Node("FakeQuantize", "n", attributes, [x, factor, unit], [out], domain=OWN_DOMAIN)
    return Executor(gs.Graph([node], [x, factor, unit], [out], opset=17))


def test_rounding_passes_gradients_within_the_grid_and_scales_get_theirs() -> None:
    """Rows: within, beyond an end, beyond the other; expected: round(x/f) - x/f inside, the end outside."""
    x = torch.tensor([[0.6, 2.2], [9.0, -9.0]], requires_grad=True)
    f = torch.tensor([0.5, 1.0], requires_grad=True)
    u = torch.tensor([1.0, 2.0])
    run_ = node_executor(low=-4, high=3, axis=0)
    y = run_.run({"x": x, "f": f, "u": u}, ["y"])["y"]
    torch.testing.assert_close(y, torch.tensor([[0.5, 1.5], [6.0, -8.0]]))
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert f.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(f.grad, torch.tensor([(1 - 1.2) + 3, 2 * (3 - 4.0)]))


def tuned(steps: int, **named: Any) -> tuple[CalibrationContext, QuantizationResults, Any]:
    context, results = fitted()
    data = TuningData(ASIDE)
    found, outcome = tune_quantized(context, results, data, steps=steps, **named)
    return context, found, outcome


def test_tuned_layers_are_better_and_are_what_the_file_has() -> None:
    context, found, outcome = tuned(60)
    after = written(context, found)
    assert outcome.error < (0.8 if WIDE else 0.95) * outcome.error_before
    assert error(after) == pytest.approx(outcome.error, rel=1e-3)
    student = fake_quantized(context.model, context.plan, found)
    torch.testing.assert_close(outputs(student.executor), after, rtol=1e-4, atol=1e-4)
    for key, layer in context.plan.layers.items():
        low, high = weight_limits(layer.weight_bits)
        assert low <= float(found.weights[key].integers.amin())
        assert float(found.weights[key].integers.amax()) <= high


def test_where_no_step_is_better_the_fitted_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_tuning, "LEARNING_RATE", 10.0)
    context, results = fitted()
    found, outcome = tune_quantized(context, results, TuningData(ASIDE), steps=5)
    assert outcome.discarded
    assert found is results


def test_the_same_seed_gives_the_same_layers() -> None:
    _, first, _ = tuned(6, seed=3)
    _, second, _ = tuned(6, seed=3)
    assert [*map(str, first.grids.values())] == [*map(str, second.grids.values())]
    for a, b in zip(first.weights.values(), second.weights.values(), strict=True):
        assert torch.equal(a.integers, b.integers)
        assert torch.equal(a.scale, b.scale)


def test_levels_are_what_layers_and_sums_of_the_trunk_give() -> None:
    assert levels_of(network()) == ["a", "s"]


def test_the_graph_of_the_float_network_stays_as_it_is() -> None:
    context, results = fitted()
    fake_quantized(context.model, context.plan, results)
    torch.testing.assert_close(
        outputs(Executor.from_model(context.model)), outputs(Executor.from_model(network()))
    )


@pytest.mark.parametrize(
    ("options", "tunes"),
    [
        ({}, True),
        ({"steps": 0}, False),
        ({"effort": "fast"}, False),
        ({"activation_bits": 8}, False),
        ({"activation_bits": 0}, False),
        ({"reconstruct": False}, False),
    ],
)
def test_the_pass_tunes_where_activations_have_few_bits(
    options: dict[str, Any], tunes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "weight_bits": 4,
        "activation_bits": 4,
        "inputs": "procedural",
        "steps": 3,
    } | options
    if "effort" in options:
        del given["steps"]
    model = network()
    (result,) = run([Quantize(synthetic=32, preprocess="mean=0.5 std=0.5 size=8", **given)], model)
    measured: Any = result.measured
    assert (measured.tuning is not None) == tunes
    if tunes:
        assert measured.tuning.held_out == 4
        assert measured.seconds.tuning is not None
