"""fp16 where float16 does harm that float32 outputs of one size do not show.

onnxruntime's CPU computes float16 in float32; onnx's reference evaluator rounds each node's result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnxcompress.errors import CompressWarning, ModelError
from onnxcompress.model import Model
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.fp16.candidates import SIZES
from tests.helpers.folding import graph, weight

CONV = "c = Conv<pads=[1,1,1,1]>(x, w)"
ARRAYS: dict[str, Any] = {
    "w": weight(4, 3, 3, 3) / 9,
    "far": np.float32(3000),
    "three": np.float32(3),
    "one": np.array([1], np.int64),
    "two": np.array([2], np.int64),
    "three_": np.array([3], np.int64),
    "four": np.array([4], np.int64),
    "pieces": np.array([1, 4], np.int64),
    "hundred": np.float32(100),
}
SIZED = "s = Shape(c) hw = Slice(s, two, four) f = Cast<to=1>(hw)"
WIDE = "(float[1,3,h,w0] x) => (float[1,4,p,q] y)"


def converted(body: str, signature: str, **options: Any) -> tuple[onnx.ModelProto, onnx.ModelProto, Any]:
    """A network before and after, and the result of the pass."""
    used = {name: value for name, value in ARRAYS.items() if f"{name})" in body or f"{name}," in body}
    proto: onnx.ModelProto = graph(signature, body, used)
    model = Model.from_proto(proto)
    result = HalfPrecision(provider="cpu", threads=1, **options).apply(model)
    return proto, model.to_proto(), result


def evaluated(proto: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    found = ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x})
    return {o.name: np.asarray(v) for o, v in zip(proto.graph.output, found, strict=True)}


@pytest.mark.parametrize(
    ("head", "output"),
    [
        ("b = Add(c, far) z = ArgMax<axis=1>(b)", "int64[N,1,8,8] z"),
        ("b = Add(c, far) z = Cast<to=11>(b)", "double[N,4,8,8] z"),
        ("b = Add(c, far) z = Greater(b, far)", "bool[N,4,8,8] z"),
    ],
)
def test_outputs_of_other_types_are_measured_beside_floats(head: str, output: str) -> None:
    before, after, _ = converted(
        f"{CONV} y = Relu(c) {head}", f"(float[N,3,8,8] x) => (float[N,4,8,8] y, {output})"
    )
    x = np.random.default_rng(1).normal(size=(4, 3, 8, 8)).astype(np.float32)
    exact, found = (evaluated(proto, x)["z"].astype(np.float64) for proto in (before, after))
    if output.startswith("double"):
        assert np.sqrt(np.square(exact - found).mean() / exact.var()) < 0.01
    else:
        assert (exact == found).mean() > 0.95


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (
            f"{CONV} {SIZED} g = Mul(f, three) i = Cast<to=7>(g) n = Shape<end=2>(c) "
            't = Concat<axis=0>(n, i) y = Resize<mode="nearest">(c, , , t)',
            (1, 3, 4, 683),
        ),
        (
            f"{CONV} {SIZED} g = ReduceProd(f) k = Reshape(g, one) i = Cast<to=7>(k) "
            "t = Concat<axis=0>(pieces, i) r = Reshape(c, t) y = Unsqueeze(r, three_)",
            (1, 3, 97, 101),
        ),
        (f"{CONV} {SIZED} g = ReduceProd(f) r = Relu(c) y = Div(r, g)", (1, 3, 300, 300)),
    ],
    ids=["three times the size", "the number of places", "a mean by hand"],
)
def test_sizes_are_no_halves(body: str, shape: tuple[int, ...]) -> None:
    before, after, result = converted(body, WIDE, input_shape="1x3x16x16")
    assert SIZES in {refusal.rule for refusal in result.refusals}
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    exact, found = (evaluated(proto, x)["y"] for proto in (before, after))
    assert found.shape == exact.shape
    assert np.sqrt(np.square(exact - found).mean() / exact.var()) < 0.01


@pytest.mark.parametrize(
    "choose",
    [
        "e = Gather(s, axis) p = Slice(t, zero, e, axis)",
        'p = Resize<mode="nearest">(t, , , s)',
    ],
)
def test_weights_that_a_size_only_selects_are_halves(choose: str) -> None:
    arrays = {
        "w": ARRAYS["w"],
        "t": weight(1, 4, 8, 8),
        "axis": np.array([1], np.int64),
        "zero": np.array([0], np.int64),
    }
    body = f"{CONV} s = Shape(c) {choose} y = Add(c, p)"
    used = {name: value for name, value in arrays.items() if f"{name})" in body or f"{name}," in body}
    model = Model.from_proto(graph("(float[1,3,8,8] x) => (float[1,4,8,8] y)", body, used))
    assert SIZES not in {r.rule for r in HalfPrecision(provider="cpu", threads=1).apply(model).refusals}


@pytest.mark.parametrize(
    "end",
    [
        "y = ReduceLogSum(d, sides)",
        "y = GlobalLpPool(d)",
        "y = LpPool<kernel_shape=[32,32]>(d)",
        "y = ReduceL2(d, sides)",
    ],
)
def test_sums_that_a_root_or_a_logarithm_makes_small_again_do_not_overflow(end: str) -> None:
    """On some devices they are float16; the evaluator lacks some of them, so it is looked at what stays."""
    body = f"{CONV} a = Abs(c) d = Add(a, hundred) {end}"
    sides = {"sides": np.array([2, 3], np.int64)} if "sides" in body else {}
    used = {"w": ARRAYS["w"], "hundred": ARRAYS["hundred"], **sides}
    model = Model.from_proto(graph("(float[N,3,32,32] x) => (float[N,4,1,1] y)", body, used, opset=18))
    result = HalfPrecision(provider="cpu", threads=1).apply(model)
    assert result.measured is not None
    assert "y" in {kept.name for kept in result.measured.kept_float32}


@pytest.mark.parametrize("shift", ["far", "hundred"])
def test_ends_in_float16_are_measured(shift: str) -> None:
    """300 and more beside a deviation near 0.3: float16 has steps of 0.25 there."""
    with pytest.raises(ModelError, match="float16 inputs and outputs alone make an error of"):
        converted(
            f"{CONV} y = Add(c, {shift})",
            "(float[N,3,8,8] x) => (float[N,4,8,8] y)",
            float16_io=True,
            max_error=0.005,
        )


BRANCHES = (
    "then_branch = t () => (float[N,4,8,8] p) {{ p = {then} }}, "
    "else_branch = e () => (float[N,4,8,8] q) {{ q = {other} }}"
)


@pytest.mark.parametrize(
    ("then", "other", "named"), [("Conv(x, v)", "Neg(c)", "x"), ("Relu(c)", "Neg(c)", "c")]
)
def test_ends_that_bodies_read_stay_and_are_named(then: str, other: str, named: str) -> None:
    branches = BRANCHES.format(then=then, other=other)
    body = f"{CONV} m = ReduceSum<keepdims=0>(c) b = Cast<to=9>(m) i = If<{branches}>(b) y = Relu(i)"
    used = {"w": ARRAYS["w"]} | ({"v": weight(4, 3, 1, 1)} if "v)" in then else {})
    proto = graph("(float[N,3,8,8] x) => (float[N,4,8,8] y, float[N,4,8,8] c)", body, used)
    model = Model.from_proto(proto)
    with pytest.warns(CompressWarning, match=f"--float16-io: .*'{named}'.* float32 as before"):
        HalfPrecision(provider="cpu", threads=1, float16_io=True).apply(model)
    onnx.checker.check_model(model.to_proto(), full_check=True)


@pytest.mark.parametrize(
    ("body", "opset", "reason"),
    [
        (
            f"{CONV} m = MeanVarianceNormalization(c) y = Relu(m)",
            17,
            "MeanVarianceNormalization fixes a type",
        ),
        (
            f"{CONV} n = Constant<value_int=8>() h = HannWindow(n) y = Mul(c, h)",
            17,
            "one of its attributes",
        ),
    ],
)
def test_what_a_definition_fixes_stays(body: str, opset: int, reason: str) -> None:
    model = Model.from_proto(
        graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", body, {"w": ARRAYS["w"]}, opset=opset)
    )
    result = HalfPrecision(provider="cpu", threads=1).apply(model)
    assert any(reason in refusal.rule for refusal in result.refusals)
    assert result.measured is not None
    assert result.measured.converted >= 2
