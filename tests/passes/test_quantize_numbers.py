"""quantize: numbers beside which others are small. Biases of dead channels, numbers that a Pad writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxcompress.evaluation.guard import Guard
from onnxcompress.model import Model
from onnxcompress.passes.base import run
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.quantize import Quantize
from onnxcompress.runtime.inference import run as run_model
from tests.helpers.folding import graph, weight

FEW: dict[str, Any] = {"effort": "fast", "inputs": "procedural", "synthetic": 32}


def error(model: Model, one: Quantize | Prune, name: str = "y") -> np.ndarray:
    """Error of an output over its root mean square, for each of its channels."""
    x = np.random.default_rng(0).uniform(-1, 1, (8, 3, 8, 8)).astype(np.float32)
    before = run_model(model.to_proto(), {"x": x})[name]
    run([one], model, guard=Guard())
    after = run_model(model.to_proto(), {"x": x})[name]
    axes = tuple(axis for axis in range(before.ndim) if axis != 1)
    return np.asarray(np.abs(after - before).max(axes) / np.sqrt(np.square(before).mean()))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("size", [0, 1e-12, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize(
    ("layer", "shape", "at"),
    [
        ("c = Conv<pads=[1,1,1,1]>(r, v, b)", (6, 6, 3, 3), 0),
        ("c = Conv<pads=[1,1,1,1], group=6>(r, v, b)", (6, 1, 3, 3), 0),
        ("c = ConvTranspose<pads=[1,1,1,1]>(r, v, b)", (6, 6, 3, 3), 1),
        ("p = GlobalAveragePool(r) f = Flatten(p) c = Gemm<transB=1>(f, v, b)", (6, 6), 0),
    ],
)
def test_a_dead_channel_keeps_its_bias(
    layer: str, shape: tuple[int, ...], at: int, size: float, per_channel: bool
) -> None:
    """Such as γ near 0 leaves one: its weights are next to nothing, the bias is far beyond their grid."""
    v, b = weight(*shape, seed=1), weight(6, seed=2)
    np.moveaxis(v, at, 0)[3] *= size
    b[3] = 2.0
    kind = "float[N,6]" if len(shape) == 2 else "float[N,6,8,8]"
    body = f"a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a) {layer} y = Identity(c)"
    model = Model.from_proto(
        graph(f"(float[N,3,8,8] x) => ({kind} y)", body, {"w": weight(6, 3, 3, 3), "v": v, "b": b})
    )
    assert error(model, Quantize(**FEW, per_channel=per_channel))[3] < 0.02


@pytest.mark.parametrize("number", [-2.0, 20.0])
@pytest.mark.parametrize("opset", [10, 17])
@pytest.mark.parametrize("options", [{}, {"float_tensors": False}, {"activation_bits": 16}])
def test_a_number_around_an_image_has_room_on_its_grid(
    number: float, opset: int, options: dict[str, Any]
) -> None:
    pad = f"Pad<pads=[0,0,1,1,0,0,1,1], value={number}>(r)" if opset < 11 else "Pad(r, pads, number)"
    body = f"a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a) p = {pad} y = Conv(p, v)"
    arrays = {"w": weight(6, 3, 3, 3), "v": weight(4, 6, 3, 3, seed=1)}
    if opset >= 11:
        arrays |= {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "number": np.array(number, np.float32)}
    model = Model.from_proto(
        graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", body, arrays, opset=opset, ir=5)
    )
    assert error(model, Quantize(**FEW, **options)).max() < 0.15


def test_an_output_of_one_number_is_no_reason_to_stop_pruning() -> None:
    """Its values have no deviation."""
    body = "a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a) b = Conv(r, v) y = ReduceMean<keepdims=0>(b)"
    arrays = {"w": weight(6, 3, 3, 3), "v": weight(4, 6, 3, 3, seed=1)}
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float y)", body, arrays))
    (result,) = run([Prune(**FEW, sparsity=0.1)], model, guard=Guard())
    assert result.measured is not None
