"""Hard sigmoids and HardSwish that are written out become HardSigmoid, and the outputs stay the same."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.graph.canonicalize import canonicalize
from onnxcompress.graph.self_gated import gated_output
from onnxcompress.model import Model
from tests.helpers.folding import Arrays, feeds, graph, ops, outputs, weight

SIGNATURE = "(float[N,3,5,5] x) => (float[N,4,5,5] y)"
CONSTANTS: Arrays = {
    "w": 3 * weight(4, 3, 1, 1),
    "b": weight(4, seed=1),
    "three": np.array(3, np.float32),
    "zero": np.array(0, np.float32),
    "six": np.array(6, np.float32),
    "sixth": np.array([1 / 6], np.float32),
    "few": np.array(0.1667, np.float32),
    "deep": np.full((1, 1, 1, 1, 1), 6, np.float32),
    "first": np.array([0]),
    "each": np.full((4, 1, 1), 3, np.float32),
}
GATES = {
    "HardSwish, divided last": "a = Add(c, three) d = Clip(a, zero, six) m = Mul(c, d) y = Div(m, six)",
    "HardSwish, times 1/6 last": "a = Add(three, c) d = Clip(a, zero, six) m = Mul(d, c) y = Mul(sixth, m)",
    "HardSwish, divided first": "a = Add(c, three) d = Clip(a, zero, six) g = Div(d, six) y = Mul(c, g)",
    "a hard sigmoid": "a = Add(c, three) d = Clip(a, zero, six) y = Mul(d, sixth)",
}
OTHERS = {
    "another divisor": "a = Add(c, three) d = Clip(a, zero, six) m = Mul(c, d) y = Div(m, three)",
    "a coarse sixth": "a = Add(c, three) d = Clip(a, zero, six) y = Mul(d, few)",
    "what is divided by it": "a = Add(c, three) d = Clip(a, zero, six) e = Add(d, six) y = Div(six, e)",
    "no lower bound of 0": "a = Add(c, three) d = Clip(a, three, six) y = Div(d, six)",
    "an offset for each channel": "a = Add(c, each) d = Clip(a, zero, six) y = Div(d, six)",
    "a number of more axes":
        "a = Add(c, three) d = Clip(a, zero, six) m = Div(d, deep) y = Squeeze(m, first)",
    "another factor": "a = Add(c, three) d = Clip(a, zero, six) m = Mul(b3, d) y = Div(m, six)",
    "a clipped tensor that is read twice":
        "a = Add(c, three) d = Clip(a, zero, six) m = Mul(c, d) n = Div(m, six) y = Add(n, d)",
}  # fmt: skip


def model(body: str, opset: int = 13) -> Model:
    arrays = CONSTANTS | {"b3": weight(4, 1, 1, seed=3)}
    return Model.from_proto(graph(SIGNATURE, f"c = Conv(x, w, b) {body}", arrays, opset=opset))


@pytest.mark.parametrize("body", GATES.values(), ids=GATES)
@pytest.mark.parametrize("opset", [10, 13])
def test_a_gate_that_is_written_out_becomes_one(body: str, opset: int) -> None:
    if opset < 11:  # bounds are attributes there
        body = body.replace("Clip(a, zero, six)", "Clip<min = 0.0, max = 6.0>(a)")
    own = model(body, opset)
    before = own.to_proto()
    canonicalize(own)
    after = own.to_proto()
    swish = "y = Mul(d, sixth)" not in body
    assert ops(after) == ["Conv", "HardSigmoid", *(["Mul"] if swish else [])]
    if swish:
        found = gated_output(own.graph.tensors()["c"])
        assert found is not None
        assert found.name == "y"
    fed = feeds(before)
    np.testing.assert_allclose(outputs(after, fed)[0], outputs(before, fed)[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_what_is_no_hard_sigmoid_stays(body: str) -> None:
    own = model(body)
    before = ops(own.to_proto())
    canonicalize(own)
    assert ops(own.to_proto()) == before
