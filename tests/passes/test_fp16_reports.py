"""What users of other converters report: casts of a wrong type, shared initializers, sums that overflow."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.model import Model
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.runtime.inference import random_feeds
from onnxcompress.runtime.session import session
from tests.helpers.folding import graph, weight

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def halved(proto: onnx.ModelProto, **chosen: Any) -> tuple[onnx.ModelProto, set[str]]:
    """The converted network, which onnxruntime runs, and the nodes that stay float32 for their error."""
    model = Model.from_proto(proto)
    before = model.copy()
    result = HalfPrecision(provider="cpu", threads=1, **chosen).apply(model)
    made = model.to_proto()
    onnx.checker.check_model(made, full_check=True)
    feeds = random_feeds(before)
    was, now = (session(one, provider="cpu").run(None, feeds) for one in (before, model))
    for a, b in zip(was, now, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02 * float(np.abs(a).max()))
    return made, {r.node for r in result.refusals if "alone in float16" in r.rule}


def types(proto: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    values = [*inferred.value_info, *inferred.output, *inferred.input]
    return {v.name: v.type.tensor_type.elem_type for v in values}


@pytest.mark.parametrize("exclude", [(), ("c",)])
def test_a_cast_gives_what_its_reader_wants(exclude: tuple[str, ...]) -> None:
    """onnxconverter-common 320, 328, 331: the Cast said float32, its output was declared as float16."""
    body = """p = Greater(x, t) f = Cast<to = 1>(p) c = Conv(f, w) i = Cast<to = 7>(x) g = Cast<to = 1>(i)
        m = Mul(g, s) k = Conv(m, v) y = Add(c, k)"""
    arrays = {
        "t": np.float32(0.1),
        "w": weight(4, 3, 1, 1),
        "v": weight(4, 3, 1, 1, seed=1),
        "s": np.float32(0.5),
    }
    made, _ = halved(graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", body, arrays), exclude=exclude)
    casts = {n.output[0]: n.attribute[0].i for n in made.graph.node if n.op_type == "Cast"}
    declared = types(made)
    assert all(declared[name] == kind for name, kind in casts.items())
    assert casts["g"] == HALF
    assert any(n.op_type == "Conv" and n.output[0].startswith("c") for n in made.graph.node)


SHARED: dict[str, tuple[str, str, dict[str, np.ndarray], dict[str, Any]]] = {
    "an input that is float32 by its schema": (
        "4,8,4", 'q = Resize<mode = "nearest">(c, , s) y = Mul(q, s)', {"s": np.ones(4, np.float32)}, {}
    ),
    "an excluded node": (
        "4,8,8", "q = Mul(c, s) y = Div(q, s)", {"s": 2 + weight(8) ** 2}, {"exclude": ("y",)}
    ),
    "a foreign node": (
        "4,8,8", "q = Mul(c, s) h = com.microsoft.BiasGelu(q, s) y = Add(h, s)", {"s": weight(8)}, {}
    ),
}  # fmt: skip
"""Reader -> shape of the output, what follows a convolution, its initializer, options."""


@pytest.mark.parametrize("reader", SHARED)
def test_an_initializer_serves_readers_of_both_types(reader: str) -> None:
    """onnxconverter-common 304: it became float16, and a reader wanted float32."""
    shape, rest, arrays, chosen = SHARED[reader]
    signature = f"(float[N,3,{shape[2:]}] x) => (float[N,{shape}] y)".replace("3,,", "3,")
    body = f"c = Conv<pads = [1,1,1,1]>(x, w) {rest}"
    domain = "com.microsoft" if "microsoft" in body else ""
    made, _ = halved(graph(signature, body, {"w": weight(4, 3, 3, 3), **arrays}, domain=domain), **chosen)
    kinds = types(made) | {t.name: t.data_type for t in made.graph.initializer}
    assert {kinds[i] for n in made.graph.node for i in n.input if i.startswith("s")} == {FLOAT, HALF}


def reducing(op: str, size: int, value: float) -> onnx.ModelProto:
    """A network whose reduction of `size`² values near `value` gives its output."""
    body = (
        f"a = Abs(x) c = Add(a, k) r = {op}<axes = [2, 3], keepdims = 0>(c) z = Sub(r, m) y = MatMul(z, w)"
    )
    middle = value * (size if op == "ReduceL2" else 1)
    arrays = {"k": np.float32(value), "m": np.float32(middle), "w": weight(3, 4)}
    return graph(f"(float[N,3,{size},{size}] x) => (float[N,4] y)", body, arrays, opset=13)


@pytest.mark.parametrize(
    ("op", "size", "value", "overflows"),
    [
        ("ReduceMean", 16, 8.0, False),
        ("ReduceMean", 64, 40.0, True),  # 4,096 values of 40: their sum is beyond 65,504
        ("ReduceMean", 300, 0.0, True),  # 90,000 values: their number is
        ("ReduceL2", 16, 4.0, False),
        ("ReduceL2", 64, 8.0, True),
    ],
)
def test_a_mean_whose_sum_overflows_stays_float32(
    op: str, size: int, value: float, overflows: bool
) -> None:
    """onnxconverter-common 299 and 323: zeros or NaN on CUDA, though the mean itself is small."""
    made, kept = halved(reducing(op, size, value), max_error=0.5)
    assert ("r" in kept) == overflows
    (reduction,) = (n for n in made.graph.node if n.op_type == op)
    assert types(made)[reduction.output[0]] == (FLOAT if overflows else HALF)
