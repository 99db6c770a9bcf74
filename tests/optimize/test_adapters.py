"""Folding an adapter is exact: compared with the adapter as a 1×1 convolution of its own."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from onnxcompress.optimize.block_drop.adapters import fold_after, fold_before  # noqa: E402

GRAPH = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,6,9,9] x) => (float[N,6,5,5] y) {
  h = Conv(x, before) z = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(h, w, b) y = Conv(z, after, a) }"""


def test_folded_adapters_give_the_same_outputs() -> None:
    rng = np.random.default_rng(0)
    explicit = onnx.parser.parse_model(GRAPH)
    shapes = {"before": (6, 6, 1, 1), "w": (6, 6, 3, 3), "b": (6,), "after": (6, 6, 1, 1), "a": (6,)}
    values = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    x = rng.normal(0, 1, (2, 6, 9, 9)).astype(np.float32)
    tensors = {name: torch.from_numpy(value) for name, value in values.items()}
    weight = fold_before(tensors["w"], tensors["before"][..., 0, 0])
    weight, bias = fold_after(weight, tensors["b"], tensors["after"][..., 0, 0], tensors["a"])
    assert bias is not None
    eye = np.eye(6, dtype=np.float32)[..., None, None]
    folded = values | {
        "w": weight.numpy(),
        "b": bias.numpy(),
        "before": eye,
        "after": eye,
        "a": 0 * values["a"],
    }
    wanted, got = _run(explicit, values, x), _run(explicit, folded, x)
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


def _run(proto: onnx.ModelProto, values: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in values.items())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(None, {"x": x})[0])
