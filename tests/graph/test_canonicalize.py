"""The canonical form computes what the graph did."""

from __future__ import annotations

import numpy as np

from onnxcompress.graph.canonicalize import canonicalize
from onnxcompress.model import Model
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
