"""equalize: ranges become equal, outputs stay, the record follows: hand-made, random, real networks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxcompress.cli.main import main
from onnxcompress.evaluation.equivalence import difference_of
from onnxcompress.graph.linear_layer import Linear, as_linear
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model, load
from onnxcompress.passes.base import PassResult, run
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.equalize.equalize import EqualizeFigures, assumption_free_scales, equalized_weight
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.runtime.inference import run as outputs
from onnxcompress.statistics.record import ChannelStatistics, read_record, write_record
from tests.helpers.folding import BRANCH, Arrays, feeds, graph, norm, ops
from tests.helpers.paths import RESIDUAL

NETWORKS = RESIDUAL
TOLERANCE = 1e-5
"""Of outputs, relative to the largest."""
IMAGE = "(float[N,4,8,8] x) => (float[N,C,H,W] y)"
VECTOR = "(float[N,4,8,8] x) => (float[N,5] y)"


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    """Rows and columns of very different ranges."""
    rng = np.random.default_rng([seed, *shape])
    values = rng.normal(size=shape)
    for axis in range(min(len(shape), 2)):
        values *= np.exp(1.5 * rng.normal(size=[n if a == axis else 1 for a, n in enumerate(shape)]))
    return values.astype(np.float32)


PAIR = {"w": weight(6, 4, 3, 3), "b": weight(6), "u": weight(5, 6, 3, 3), "d": weight(5)}


def equalize(
    proto: onnx.ModelProto, **options: object
) -> tuple[onnx.ModelProto, PassResult[EqualizeFigures]]:
    """Equalize; the outputs must stay, and a second run must change nothing."""
    model = Model.from_proto(proto)
    one = Equalize(**options)  # type: ignore[arg-type]
    result = one.apply(model)
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    inputs = feeds(proto)
    assert difference_of(outputs(proto, inputs), outputs(after, inputs)).max_rel < TOLERANCE
    assert not one.apply(model).modified
    assert model.to_proto() == after
    return after, result


def equalizes(
    signature: str, body: str, arrays: Arrays, *, opset: int = 17, **options: object
) -> onnx.ModelProto:
    """Everything is equalized, and no weight stays what it was."""
    proto = graph(signature, body, arrays, opset=opset)
    after, result = equalize(proto, **options)
    assert not result.refusals
    assert result.measured.converged
    kept = {t.SerializeToString() for t in after.graph.initializer}
    for tensor in proto.graph.initializer:
        if tensor.name[0] in "wuv":
            assert tensor.SerializeToString() not in kept, tensor.name
    return after


def stays(
    signature: str, body: str, arrays: Arrays, reason: str, *, opset: int = 17, **options: object
) -> None:
    """Nothing changes, and the one refusal says why."""
    proto = graph(signature, body, arrays, opset=opset)
    after, result = equalize(proto, **options)
    assert after == proto
    (refusal,) = result.refusals
    assert reason in str(refusal)


def values(proto: onnx.ModelProto) -> Arrays:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def rows(array: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(array).reshape(len(array), -1).max(1))


def columns(array: np.ndarray) -> np.ndarray:
    return rows(array.swapaxes(0, 1))


# What the scales are --------------------------------------------------------------------------------------


def test_a_pair_gets_the_formula_of_dfq() -> None:
    """s = sqrt(r1 r2) / r2, so both ranges become sqrt(r1 r2)."""
    after = values(equalizes(IMAGE, "c = Conv(x, w, b) r = Relu(c) y = Conv(r, u, d)", PAIR))
    wanted = np.sqrt(rows(PAIR["w"]) * columns(PAIR["u"]))
    np.testing.assert_allclose(rows(after["w"]), wanted, rtol=1e-5)
    np.testing.assert_allclose(columns(after["u"]), wanted, rtol=1e-5)
    scale = rows(after["w"]) / rows(PAIR["w"])
    np.testing.assert_allclose(after["b"], PAIR["b"] * scale, rtol=1e-6)
    np.testing.assert_array_equal(after["d"], PAIR["d"])


def test_a_depthwise_triple_gets_the_cube_root() -> None:
    arrays = {"w": weight(6, 4, 1, 1), "u": weight(6, 1, 3, 3), "v": weight(5, 6, 1, 1), "b": weight(6)}
    body = (
        "c = Conv(x, w) r = Relu(c) e = Conv<group = 6, pads = [1,1,1,1]>(r, u, b) "
        "s = Relu(e) y = Conv(s, v)"
    )
    after = values(equalizes(IMAGE, body, arrays))
    wanted = np.cbrt(rows(arrays["w"]) * rows(arrays["u"]) * columns(arrays["v"]))
    for found in (rows(after["w"]), rows(after["u"]), columns(after["v"])):
        np.testing.assert_allclose(found, wanted, rtol=2e-3)


def test_a_residual_stream_shares_its_scales() -> None:
    arrays = {f"w{i}": weight(6, 6 if i else 4, 1, 1, seed=i) for i in range(3)}
    arrays |= {f"u{i}": weight(6, 6, 1, 1, seed=9 + i) for i in range(3)}
    body = (
        "a = Conv(x, w0) ar = Relu(a) b = Conv(ar, u0) br = Relu(b) c = Conv(br, w1) s = Add(c, ar) "
        "sr = Relu(s) d = Conv(sr, u1) dr = Relu(d) e = Conv(dr, w2) y0 = Sub(sr, e) y = Conv(y0, u2)"
    )
    after = values(equalizes(IMAGE, body, arrays))
    scale = rows(after["w0"]) / rows(arrays["w0"])
    assert scale.max() > 1.2 * scale.min()
    np.testing.assert_allclose((arrays["u2"] / after["u2"])[0, :, 0, 0], scale, rtol=1e-4)
    for i in (1, 2):  # scaled by the stream, and by what lies inside the branch
        inside = (after[f"w{i}"] / arrays[f"w{i}"])[:, :, 0, 0] / scale[:, None]
        np.testing.assert_allclose(inside, np.broadcast_to(inside[0], inside.shape), rtol=1e-4)
    relative = [rows(after[f"w{i}"]) / rows(after[f"w{i}"]).max() for i in range(3)]
    read = [columns(after[f"u{i}"]) / columns(after[f"u{i}"]).max() for i in range(3)]
    np.testing.assert_allclose(np.max(relative, 0), np.max(read, 0), rtol=5e-3)


def test_a_layer_that_reads_and_writes_one_stream_converges() -> None:
    """Its rows and columns move each other: full steps would overshoot for ever."""
    loop = [[0, 0.408, 0.957], [0, 0, 0.42], [13.197, 1.167, 0]]
    arrays = {
        "w": np.array([84.4, 2045.3, 95.5], np.float32).reshape(3, 1, 1, 1)
        * np.ones((1, 4, 1, 1), np.float32),
        "u": np.array(loop, np.float32)[:, :, None, None],
        "v": np.array([[7.88, 44.3, 4.08]], np.float32)[:, :, None, None],
    }
    body = "a = Conv(x, w) r = Relu(a) c = Conv(r, u) s = Add(r, c) y = Conv(s, v)"
    equalizes(IMAGE, body, arrays)


def test_dead_channels_keep_scale_one() -> None:
    arrays = {k: v.copy() for k, v in PAIR.items()}
    arrays["w"][1] = 0
    arrays["u"][:, 2] = 0
    arrays["w"][3] = 0
    arrays["u"][:, 3] = 0
    after = values(equalizes(IMAGE, "c = Conv(x, w, b) r = Relu(c) y = Conv(r, u)", arrays))
    level = after["b"] / arrays["b"]
    np.testing.assert_allclose(level[1:4], level[1])  # they only follow the layer's level
    assert np.isfinite(after["w"]).all()
    assert not after["w"][[1, 3]].any()
    assert not after["u"][:, [2, 3]].any()


def test_scales_of_the_reader_of_a_concat_go_to_the_right_writer() -> None:
    arrays = {"w": weight(6, 4, 1, 1), "u": weight(3, 4, 1, 1), "v": weight(5, 9, 1, 1)}
    body = (
        "a = Conv(x, u) b = Conv(x, w) ar = Relu(a) br = LeakyRelu(b) "
        "c = Concat<axis = 1>(br, ar) y = Conv(c, v)"
    )
    after = values(equalizes(IMAGE, body, arrays))
    divisor = (arrays["v"] / after["v"])[0, :, 0, 0]
    np.testing.assert_allclose(divisor[:6], rows(after["w"]) / rows(arrays["w"]), rtol=1e-4)
    np.testing.assert_allclose(divisor[6:], rows(after["u"]) / rows(arrays["u"]), rtol=1e-4)


# What passes ----------------------------------------------------------------------------------------------

BETWEEN = {
    "nothing": "r = Identity(c)",
    "leaky": "r = LeakyRelu<alpha = 0.3>(c)",
    "prelu shared slope": "r = PRelu(c, one)",
    "prelu slopes": "r = PRelu(c, six)",
    "negative and absolute": "n = Neg(c) r = Abs(n)",
    "max pool": "r = MaxPool<kernel_shape = [3,3], pads = [1,1,1,1], strides = [1,1]>(c)",
    "average pool": "r = AveragePool<kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1>(c)",
    "clip below": "r = Clip(c, zero)",
    "clip without bounds": "r = Clip(c)",
    "pad": "r = Pad(c, pads)",
    "reflect": 'r = Pad<mode = "reflect">(c, pads)',
    "bias added": "r = Add(c, six)",
    "number added": "s = Add(c, zero) t = Sub(one, s) r = Relu(t)",
    "image added": "r = Add(c, image)",
    "max and min with constants": "m = Max(c, one) r = Min(six, m)",
    "scaled by a constant": "m = Mul(c, six) n = Div(m, two) r = Mul(two, n)",
    "image cut": "r = Slice(c, starts, ends, axes)",
    "resized": 'r = Resize<mode = "linear">(c, , scales)',
    "two tensors": "m = Relu(c) n = Neg(c) r = Max(m, n)",
    "dropout": "r = Dropout(c)",
    "turned twice": "m = Transpose<perm = [0,2,3,1]>(c) n = Relu(m) r = Transpose<perm = [0,3,1,2]>(n)",
    "shuffled": "m = Reshape(c, split) n = Transpose<perm = [0,2,1,3,4]>(m) r = Reshape(n, joined)",
    "channels split and joined": "m, n = Split<axis = 1>(c, parts) o = Relu(m) r = Concat<axis = 1>(n, o)",
    "channels picked": "r = Gather<axis = 1>(c, order)",
    "pieces of the image": "m, n = Split<axis = 2>(c, halves) o = Relu(m) r = Concat<axis = 2>(n, o)",
    "squeezed": "m = Unsqueeze(c, last) n = Relu(m) r = Squeeze(n, last)",
    "zeros joined": "m = Concat<axis = 1>(c, none) r = Slice(m, nought, sixth, first)",
    "a gate": "p = GlobalAveragePool(c) q = Conv(p, w2) g = Sigmoid(q) r = Mul(g, c)",
}
CONSTANTS: Arrays = {
    "zero": np.float32(0),
    "one": np.array([0.5], np.float32),
    "two": np.float32(2),
    "six": np.array([0.1, 0.7, -0.2, 0.5, 3.0, 1.0], np.float32).reshape(6, 1, 1),
    "image": np.random.default_rng(0).normal(size=(1, 1, 6, 6)).astype(np.float32),
    "pads": np.array([0, 0, 1, 2, 0, 0, 1, 0]),
    "starts": np.array([1, 0]),
    "ends": np.array([6, -1]),
    "axes": np.array([2, 3]),
    "scales": np.array([1, 1, 2, 1.5], np.float32),
    "split": np.array([0, 2, 3, 6, 6]),
    "joined": np.array([0, 6, 6, 6]),
    "parts": np.array([2, 4]),
    "halves": np.array([2, 4]),
    "order": np.array([5, 4, 3, 0, 1, 2]),
    "last": np.array([4]),
    "none": np.zeros((1, 2, 6, 6), np.float32),
    "nought": np.array([0]),
    "sixth": np.array([6]),
    "first": np.array([1]),
    "w2": weight(6, 6, 1, 1),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_passes_between_two_convolutions(between: str) -> None:
    body = f"c = Conv(x, w, b) {BETWEEN[between]} y = Conv(r, u, d)"
    used = {k: v for k, v in CONSTANTS.items() if k in body.replace(",", " ").replace(")", " ").split()}
    used |= {k: CONSTANTS[k] for k in CONSTANTS if f"({k}" in body}
    signature = "(float[1,4,8,8] x) => (float[1,C,H,W] y)" if between == "zeros joined" else IMAGE
    _, result = equalize(graph(signature, body, PAIR | used))
    assert not result.refusals
    assert result.measured.lost_bits.after < result.measured.lost_bits.before - 0.1


@pytest.mark.parametrize(
    ("body", "shapes"),
    [
        (
            "c = Conv<group = 2>(x, w, b) r = Relu(c) y = Conv<group = 3>(r, u)",
            [(6, 2, 3, 3), (3, 2, 3, 3)],
        ),
        (
            "c = ConvTranspose<group = 2, strides = [2,2]>(x, w, b) r = Relu(c) "
            "y = ConvTranspose<group = 3, strides = [2,2]>(r, u)",
            [(4, 3, 3, 3), (6, 2, 2, 2)],
        ),
        (
            "c = Conv(x, w, b) p = GlobalAveragePool(c) f = Flatten(p) "
            "g = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(f, u, e) h = Relu(g) "
            "y = Gemm<alpha = 3.0>(h, v)",
            [(6, 4, 3, 3), (7, 6), (7, 5)],
        ),
        (
            "c = Conv(x, w, b) f = Flatten(c) h = Relu(f) g = MatMul(h, u) a = Add(g, e) "
            "k = Relu(a) y = MatMul(k, v)",
            [(6, 4, 3, 3), (216, 7), (7, 5)],
        ),
        (
            "c = Conv(x, w, b) p = ReduceMean<axes = [2,3], keepdims = 0>(c) t = Transpose(u) "
            "g = MatMul(p, t) k = Relu(g) y = Gemm(k, v)",
            [(6, 4, 3, 3), (7, 6), (7, 5)],
        ),
    ],
    ids=["grouped", "transposed", "gemm", "flatten", "matmul"],
)
def test_every_kind_of_layer(body: str, shapes: list[tuple[int, ...]]) -> None:
    arrays = {n: weight(*shape, seed=at) for at, (n, shape) in enumerate(zip("wuv", shapes, strict=False))}
    arrays["b"] = weight(6)
    if "e)" in body:
        arrays["e"] = weight(7)
    equalizes(IMAGE if len(shapes) == 2 else VECTOR, body, arrays)


def test_a_gemm_whose_offset_is_one_number_or_a_matrix() -> None:
    for offset in (np.array([0.7], np.float32), weight(2, 6)):
        arrays = {"w": weight(4, 6), "u": weight(6, 5), "c": offset}
        body = "a = Gemm<beta = 0.5>(x, w, c) r = Relu(a) y = Gemm(r, u)"
        equalizes("(float[2,4] x) => (float[2,5] y)", body, arrays)


def test_a_stream_whose_shortcut_pads_channels() -> None:
    """The projection-free shortcut of CIFAR ResNets: strided slice, zeros around the channels."""
    arrays = {
        "w": weight(4, 4, 1, 1),
        "u": weight(8, 4, 3, 3),
        "v": weight(5, 8, 1, 1),
        "pads": np.array([0, 1, 0, 0, 0, 3, 0, 0]),
        "from": np.array([0, 0]),
        "to": np.array([99, 99]),
        "axes": np.array([2, 3]),
        "steps": np.array([2, 2]),
    }
    body = (
        "a = Conv(x, w) r = Relu(a) s = Slice(r, from, to, axes, steps) p = Pad(s, pads) "
        "b = Conv<strides = [2,2], pads = [1,1,1,1]>(r, u) t = Add(b, p) y = Conv(t, v)"
    )
    after = values(equalizes(IMAGE, body, arrays))
    stream = (arrays["v"] / after["v"])[0, :, 0, 0]
    np.testing.assert_allclose(stream[1:5], rows(after["w"]) / rows(arrays["w"]), rtol=1e-4)


# What does not --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("r = Sigmoid(c)", "(Sigmoid) is not positively homogeneous"),
        ("g = HardSigmoid(c) r = Mul(c, g)", "'g' (HardSigmoid) is not positively homogeneous"),
        ("g = Tanh(c) r = Add(c, g)", "(Tanh) is not"),
        ("r = Clip(c, zero, six1)", "(Clip) clips to [0, 6]"),
        ("r = Mul(c, c)", "(Mul) multiplies"),
        ("r = Div(one, c)", "divides by"),
        ("r = Softmax<axis = 1>(c)", "(Softmax)"),
        ("r = Pad(c, pads, one)", "pads with a number other than 0"),
        ("r = BatchNormalization(c, gn, bn, mn, vn)", "run fold-bn first"),
        ("s = Pow(c, two) r = Relu(s)", "(Pow)"),
        ("r = Cast<to = 1>(c)", "without a rule"),
        ("i = ArgMax<axis = 1>(c) k = Cast<to = 1>(i) r = Add(c, k)", "without a rule"),
        ("q = QuantizeLinear(c, two) r = DequantizeLinear(q, two)", "equalize before quantizing"),
        ("s = Concat<axis = 0>(c, c) r = Relu(s)", "joins batches"),
        ("s = ReduceMax<axes = [0]>(c) r = Relu(s)", "reduces over the batch"),
    ],
)
def test_what_bars(between: str, reason: str) -> None:
    arrays = {**CONSTANTS, "six1": np.float32(6), **norm(6, "n")}
    body = f"c = Conv(x, w, b) {between} y = Conv(r, u, d)"
    words = set(body.replace(",", " ").replace("(", " ").replace(")", " ").split())
    stays(IMAGE, body, {k: v for k, v in {**arrays, **PAIR}.items() if k in words}, reason)


TWO = "(float[N,4,8,8] x) => (float[N,C,H,W] y, float[N,C,H,W] z)"


def test_a_tensor_seen_outside() -> None:
    stays(TWO, "c = Conv(x, w) z = Relu(c) y = Conv(z, u)", {**PAIR}, "'z' is an output of the model")
    branches = BRANCH.format(then="p = Neg(r)", other="q = Relu(r)")
    signature = "(float[N,4,8,8] x, bool k) => (float[N,C,H,W] y, float[N,C,H,W] z)"
    body = f"c = Conv(x, w) r = Relu(c) y = Conv(r, u) z = If(k) <{branches}>"
    stays(signature, body, {k: PAIR[k] for k in "wu"}, "is read inside the body of an If, Loop or Scan")


def test_weights_that_are_shared_computed_or_short() -> None:
    arrays = {"w": weight(6, 4, 1, 1), "u": weight(4, 6, 1, 1)}
    body = "a = Conv(x, w) b = Relu(a) c = Conv(b, u) d = Relu(c) y = Conv(d, w)"
    proto = graph(IMAGE, body, arrays)
    after, result = equalize(proto)
    assert after == proto
    assert [r.node for r in result.refusals] == ["a", "c"]
    assert all("shares its weight (give each node its own copy)" in str(r) for r in result.refusals)
    body = "c = Conv(x, w) r = Relu(c) y = Conv(r, u)"
    halves = {k: PAIR[k].astype(np.float16) for k in "wu"}
    stays("(float16[N,4,8,8] x) => (float16[N,C,H,W] y)", body, halves, "weights of type float16")
    signature = "(float[N,4,8,8] x, float[6] b) => (float[N,C,H,W] y)"
    parts = {k: PAIR[k] for k in "wu"}
    stays(signature, "c = Conv(x, w, b) r = Relu(c) y = Conv(r, u)", parts, "bias that is not a constant")
    signature = "(float[N,4,8,8] x, float[5,6,3,3] u) => (float[N,C,H,W] y)"
    stays(signature, body, {"w": PAIR["w"]}, "the weight of Conv 'y' is not a constant")


def test_values_that_would_overflow() -> None:
    arrays = {"w": np.full((6, 4, 1, 1), 1e-20, np.float32), "b": np.full(6, 1e20, np.float32)}
    arrays["u"] = np.full((5, 6, 1, 1), 1e-20, np.float32)
    arrays["u"][:, :3] = 1e20
    arrays["w"][:3] *= np.array([1, 2, 3], np.float32).reshape(3, 1, 1, 1)
    body = "c = Conv(x, w, b) r = Relu(c) y = Conv(r, u)"
    stays(IMAGE, body, arrays, "out of the range of float32")


def test_only_the_barred_channels_of_a_concat_stay() -> None:
    arrays = {"w": weight(6, 4, 1, 1), "u": weight(3, 4, 1, 1), "v": weight(5, 9, 1, 1)}
    body = (
        "a = Conv(x, u) b = Conv(x, w) s = Sigmoid(a) t = Relu(b) c = Concat<axis = 1>(s, t) y = Conv(c, v)"
    )
    after, result = equalize(graph(IMAGE, body, arrays))
    found = values(after)
    np.testing.assert_array_equal(found["u"], arrays["u"])
    np.testing.assert_array_equal(found["v"][:, :3], arrays["v"][:, :3])
    assert (found["v"][:, 3:] != arrays["v"][:, 3:]).all()
    (refusal,) = result.refusals
    assert "3 of 9 channels not equalized" in refusal.rule


# Clip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip", "opset", "expected"),
    [
        ("Clip(c, zero, six)", 17, ["Relu", "Min"]),
        ("Clip(c, low, six)", 17, ["Max", "Min"]),
        ("Clip(c, , six)", 17, ["Min"]),
        ("Clip(c, low)", 17, ["Max"]),
        ("Clip<min = 0.0, max = 6.0>(c)", 10, ["Relu", "Min"]),
    ],
)
def test_clip_per_channel(clip: str, opset: int, expected: list[str]) -> None:
    bounds = {"zero": np.float32(0), "six": np.float32(6), "low": np.float32(-0.5)}
    arrays = PAIR | {k: v for k, v in bounds.items() if f" {k}" in clip}
    body = f"c = Conv(x, w, b) r = {clip} y = Conv(r, u, d)"
    after = equalizes(IMAGE, body, arrays, opset=opset, clip="per-channel")
    assert ops(after) == ["Conv", *expected, "Conv"]
    stays(IMAGE, body, arrays, "--clip per-channel moves the bounds", opset=opset)


def test_bounds_of_a_clip_have_the_type_of_its_constants() -> None:
    shapes = {"w": (4, 6), "b": (6,), "u": (6, 5), "d": (5,)}
    arrays = {name: weight(*shape).astype("f8") for name, shape in shapes.items()}
    body = """low = Constant<value = double {-0.5}>() six = Constant<value = double {6.0}>()
        c = Gemm(x, w, b) r = Clip(c, low, six) y = Gemm(r, u, d)"""
    after = equalizes("(double[N,4] x) => (double[N,5] y)", body, arrays, clip="per-channel")
    bounds = [n.input[1] for n in after.graph.node if n.op_type in ("Max", "Min")]
    kinds = {t.name: t.data_type for t in after.graph.initializer}
    assert [kinds[name] for name in bounds] == [onnx.TensorProto.DOUBLE] * 2


def test_clip_per_channel_in_a_barred_stream_stays() -> None:
    arrays = PAIR | {"zero": np.float32(0), "six": np.float32(6)}
    body = "c = Conv(x, w, b) r = Clip(c, zero, six) s = Sigmoid(r) y = Conv(s, u, d)"
    stays(IMAGE, body, arrays, "(Sigmoid)", clip="per-channel")


# Explicit scales ------------------------------------------------------------------------------------------


def test_assumption_free_adds_products_only_where_scales_do_not_cancel() -> None:
    arrays = PAIR | {"v": weight(7, 5, 1, 1)}
    body = "c = Conv(x, w, b) s = Sigmoid(c) e = Conv(s, u, d) t = Relu(e) y = Conv(t, v)"
    after = equalizes(IMAGE, body, arrays, assumption_free=True)
    assert ops(after) == ["Conv", "Mul", "Sigmoid", "Mul", "Conv", "Relu", "Conv"]
    found = values(after)
    np.testing.assert_allclose(rows(found["w"]), columns(found["u"]), rtol=0.1)


def test_assumption_free_scales_reproduce_every_layer() -> None:
    model = load(NETWORKS[0])
    FoldBatchNorm().apply(model)
    before = model.to_proto()
    rng = np.random.default_rng(0)
    for shared in (True, False):
        scales = assumption_free_scales(model, shared=shared)
        layers = _layers(model)
        assert scales.keys() == layers.keys()
        for name, layer in layers.items():
            found = scales[name]
            x = rng.normal(size=layer.inputs)
            twin = Linear(layer.node, equalized_weight(layer, found), layer.weight_at, layer.rank)
            again = found.outputs * twin.response(found.inputs * x)
            np.testing.assert_allclose(again, layer.response(x), rtol=1e-6, atol=1e-9)
        spread = [
            _unevenness(w)
            for w in (
                [layer.weight for layer in layers.values()],
                [equalized_weight(layer, scales[name]) for name, layer in layers.items()],
            )
        ]
        assert spread[1] < 0.8 * spread[0]
    assert model.to_proto() == before


def test_assumption_free_scales_of_a_homogeneous_network_cancel() -> None:
    body = "c = Conv(x, w, b) r = Relu(c) y = Conv(r, u, d)"
    for shared in (True, False):
        scales = assumption_free_scales(Model.from_proto(graph(IMAGE, body, PAIR)), shared=shared)
        np.testing.assert_allclose(scales["c"].outputs * scales["y"].inputs, np.ones(6), rtol=1e-6)
        np.testing.assert_array_equal(scales["c"].inputs, np.ones(4))


def _layers(model: Model) -> dict[str, Linear]:
    shapes = tensor_shapes(model)
    found = (
        as_linear(model, n, lambda t: len(shapes[t.name]))
        for n in model.graph.nodes
        if n.op in ("Conv", "Gemm")
    )
    return {layer.node.outputs[0].name: layer for layer in found if isinstance(layer, Linear)}


def _unevenness(weights: list[np.ndarray]) -> float:
    """Mean over layers of the deviation of the log ranges of rows."""
    return float(np.mean([np.log(rows(w)[rows(w) > 0]).std() for w in weights]))


# Networks, the record, the command ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"clip": "per-channel"}, {"assumption_free": True}], ids=str)
@pytest.mark.parametrize("path", NETWORKS, ids=lambda p: p.stem)
def test_a_real_network_and_its_record(path: Path, options: dict[str, object]) -> None:
    """Each recorded tensor's values move as its statistics do."""
    model = load(path)
    FoldBatchNorm().apply(model)
    before, known = model.to_proto(), read_record(model)
    after, result = equalize(before, **options)
    assert result.measured.lost_bits.after < result.measured.lost_bits.before - 0.1
    assert (not result.refusals) == (path.stem == "resnet20-fashion" or bool(options))
    moved = read_record(Model.from_proto(after))
    assert moved.keys() == known.keys()
    inputs = feeds(before)
    was, now = (outputs(_showing(proto, list(known)), inputs) for proto in (before, after))
    changed = 0
    for name, old in known.items():
        new = moved[name]
        factor = np.where(old.std > 0, new.std / np.maximum(old.std, 1e-30), 1.0)[None, :, None, None]
        wanted = was[name] * factor
        changed += not np.allclose(factor, 1)
        np.testing.assert_allclose(now[name], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
        np.testing.assert_allclose(new.mean, old.mean * factor[0, :, 0, 0], rtol=1e-4, atol=1e-6)
    assert changed == result.measured.recorded
    assert changed == (21 if path.stem == "resnet20-fashion" else 32 if options.get("clip") else 7)


def _showing(proto: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    shown = onnx.ModelProto.FromString(proto.SerializeToString())
    outputs = {o.name for o in shown.graph.output}
    shown.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in outputs
    )
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_a_random_network(seed: int) -> None:
    """Whatever is connected with whatever: outputs stay, the record follows, twice is once."""
    body, arrays = _random_body(np.random.default_rng(seed))
    proto = graph("(float[2,4,8,8] x) => (float[N,C,H,W] y)", body, arrays)
    model = Model.from_proto(proto)
    made = [o for n in proto.graph.node for o in n.output if n.op_type in ("Conv", "Relu", "Add", "Concat")]
    was = outputs(_showing(proto, made), feeds(proto))
    one = np.ones(1, np.float32)
    write_record(
        model,
        {
            n: ChannelStatistics(np.repeat(one, was[n].shape[1]), np.repeat(one, was[n].shape[1]))
            for n in made
        },
    )
    for options in ({}, {"clip": "per-channel"}, {"assumption_free": True}):
        after, _ = equalize(model.to_proto(), **options)
        now = outputs(_showing(after, made), feeds(proto))
        for name, known in read_record(Model.from_proto(after)).items():
            wanted = was[name] * known.std[None, :, None, None]
            np.testing.assert_allclose(now[name], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max() + 1e-30)


def _random_body(rng: np.random.Generator) -> tuple[str, Arrays]:
    """A network on 8 by 8 images: layers, streams, branches, whatever is in UNARY between them."""
    arrays: Arrays = {"zero": np.float32(0), "six": np.float32(2)}
    tensors = {"x": 4}
    lines = []
    for at in range(int(rng.integers(6, 14))):
        name = f"t{at}"
        source = str(rng.choice(list(tensors)))
        channels = tensors[source]
        same = [n for n, c in tensors.items() if c == channels]
        kind = rng.integers(10)
        if kind < 4:
            groups = int(rng.choice([1, 1, channels]))
            count = channels if groups > 1 else int(rng.integers(2, 7))
            arrays[f"w{at}"] = weight(count, channels // groups, 3, 3, seed=at)
            arrays[f"b{at}"] = weight(count, seed=at)
            lines.append(f"{name} = Conv<group = {groups}, pads = [1,1,1,1]>({source}, w{at}, b{at})")
            channels = count
        elif kind < 8:
            lines.append(
                f"{name} = {rng.choice(UNARY)}({source})".replace("Clip(", "Clip(").replace("|", "")
            )
            if "Clip" in lines[-1]:
                lines[-1] = lines[-1][:-1] + ", zero, six)"
        elif kind == 8:
            lines.append(
                f"{name} = {rng.choice(['Add', 'Sub', 'Max', 'Mul'])}({source}, {rng.choice(same)})"
            )
        else:
            other = str(rng.choice(list(tensors)))
            lines.append(f"{name} = Concat<axis = 1>({source}, {other})")
            channels += tensors[other]
        tensors[name] = channels
    last = list(tensors)[-1]
    arrays["u"] = weight(3, tensors[last], 1, 1, seed=99)
    return " ".join([*lines, f"y = Conv({last}, u)"]), arrays


UNARY = (
    "Relu",
    "Relu",
    "LeakyRelu",
    "Neg",
    "Sigmoid",
    "Clip",
    "MaxPool<kernel_shape = [3,3], pads = [1,1,1,1]>",
)


def test_the_command(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folded, target = models / "resnet20-fashion.onnx", tmp_path / "f.onnx", tmp_path / "e.onnx"
    assert main(["fold-bn", str(source), str(folded), "--quiet"]) == 0
    assert main(["equalize", str(folded), str(target), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["measured"]["difference"]["max_rel"] < TOLERANCE
    assert report["measured"]["equalized"] == 12
    assert report["provenance"][-1]["pass"] == "equalize"
    model = load(target)
    (result,) = run([Equalize()], model)
    assert not result.modified
    assert len(model.provenance()) == 2


def test_beside_a_layer_of_zeros_nothing_changes() -> None:
    """As a BatchNorm with gain 0 leaves one: its rows have no range to equalize."""
    arrays = {"w": np.zeros((2, 1, 1, 1), "f4"), "b": np.ones(2, "f4"), "v": weight(1, 2, 1, 1)}
    body = "c = Conv(x, w, b) r = Relu(c) y = Conv(r, v)"
    model = Model.from_proto(graph("(float[N,1,4,4] x) => (float[N,1,4,4] y)", body, arrays))
    assert not Equalize().apply(model).modified
