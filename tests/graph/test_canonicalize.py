"""The canonical form computes what the graph did."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcompress.graph.canonicalize import canonicalize
from onnxcompress.model import Model
from onnxcompress.passes.quantize import Quantize
from onnxcompress.runtime.inference import random_feeds, run
from tests.helpers.folding import feeds, graph, outputs, weight


def test_a_computed_target_with_allowzero_becomes_one_that_copies_the_batch() -> None:
    """With `allowzero` a 0 in the target would be a size of 0."""
    body = """s = Shape(x) n = Gather(s, zero) k = Unsqueeze(n, zeros) t = Concat<axis = 0>(k, rest)
        r = Reshape<allowzero = 1>(x, t) y = Gemm(r, w)"""
    arrays = {
        "zero": np.array(0, np.int64), "zeros": np.array([0], np.int64), "rest": np.array([-1], np.int64),
        "w": weight(12, 5),
    }  # fmt: skip
    proto = graph("(float[N,3,2,2] x) => (float[N,5] y)", body, arrays)
    model = Model.from_proto(proto)
    canonicalize(model)
    assert not any(node.op == "Shape" for node in model.graph.nodes)
    inputs = feeds(proto)
    np.testing.assert_array_equal(outputs(model.to_proto(), inputs)[0], outputs(proto, inputs)[0])


@pytest.mark.parametrize("mode", ["reflect", "constant"])
def test_a_pad_of_some_axes_gets_the_pads_of_all(mode: str) -> None:
    body = f"""p = Pad<mode="{mode}">(x, pads, value, axes)  a = Conv(p, w)  r = Relu(a)
        q = Pad<mode="{mode}">(r, pads, value, axes)  y = Conv(q, v)"""
    arrays = {"w": weight(8, 3, 3, 3), "v": weight(4, 8, 3, 3, seed=1), "value": np.array(0.5, np.float32)}
    arrays |= {"pads": np.array([1, 2, 1, 0]), "axes": np.array([2, -1])}
    proto = graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", body, arrays, opset=18)
    model = Model.from_proto(proto)
    canonicalize(model)
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert [len(node.input) for node in after.graph.node if node.op_type == "Pad"] == [3, 3]
    inputs = feeds(proto)
    np.testing.assert_allclose(outputs(after, inputs)[0], outputs(proto, inputs)[0], rtol=0, atol=1e-4)


def test_a_quantized_pad_of_some_axes_runs_optimized() -> None:
    body = """p = Pad<mode="reflect">(x, pads, , axes)  a = Conv(p, w)  r = Relu(a)
        q = Pad<mode="reflect">(r, pads, , axes)  b = Conv(q, v)  y = Relu(b)"""
    arrays = {"w": weight(8, 3, 3, 3), "v": weight(8, 8, 3, 3, seed=1)}
    arrays |= {"pads": np.array([1, 1, 1, 1]), "axes": np.array([2, -1])}
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,8,8,8] y)", body, arrays, opset=18))
    Quantize(effort="fast", synthetic=8).apply(model)
    assert run(model, random_feeds(model), optimize=True)["y"].shape == (2, 8, 8, 8)
