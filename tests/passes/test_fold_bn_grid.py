"""fold-bn: the grid of operators, attributes, types and operator sets; then hard numbers."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

from onnxcompress.model import Model
from onnxcompress.passes.fold_bn import FoldBatchNorm
from tests.helpers.folding import (
    BN,
    CONV,
    DTYPES,
    IMAGE,
    NEWEST_OPSET,
    TOLERANCE,
    feeds,
    fold,
    folds,
    graph,
    norm,
    outputs,
    stays,
    weight,
)

PADDINGS = ["", "pads = [1,0,2,1],", 'auto_pad = "SAME_UPPER",', 'auto_pad = "VALID",']


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("before", [False, True])
def test_convolutions(op: str, groups: int, padding: str, bias: bool, before: bool) -> None:
    shape = (12, 6 // groups, 3, 2) if op == "Conv" else (6, 12 // groups, 3, 2)
    arrays = {"w": weight(*shape), **norm(6 if before else 12)} | (
        {"d": weight(12, seed=4)} if bias else {}
    )
    layer = f"{op} <{padding} strides = [2,1], group = {groups}>"
    body = f"c = {layer} (x, w{', d' * bias}) {BN}"
    if before:
        body = f"c = BatchNormalization(x, g, b, m, v) y = {layer} (c, w{', d' * bias})"
    proto = graph("(float[N,6,9,8] x) => (float[N,C,H,W] y)", body, arrays)
    if before and (op == "ConvTranspose" or "1," in padding or "SAME" in padding):
        stays(proto, "behind it")
    else:
        folds(proto, [op], tolerance=1e-5 if before else 3e-6)


@pytest.mark.parametrize("spatial", [1, 3])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_one_and_three_axes(op: str, spatial: int) -> None:
    kernel = (2,) * spatial
    size = ",5" * spatial
    arrays = {"w": weight(4, 4, *kernel), **norm(4)}
    names = "".join(f",D{i}" for i in range(spatial))
    folds(graph(f"(float[N,4{size}] x) => (float[N,C{names}] y)", f"c = {op}(x, w) {BN}", arrays), [op])


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("groups", [1, 2])
def test_pointwise_layer_behind_the_norm(op: str, groups: int) -> None:
    shape = (6, 4 // groups, 1, 1) if op == "Conv" else (4, 6 // groups, 1, 1)
    layer = f'{op} <group = {groups}, auto_pad = "VALID">'
    body = f"c = BatchNormalization(x, g, b, m, v) y = {layer} (c, w)"
    folds(graph(IMAGE, body, {"w": weight(*shape), **norm(4)}), [op], tolerance=1e-5)


@pytest.mark.parametrize("bias", [None, (), (1,), (5,), (1, 5), (4, 1), (4, 5)])
@pytest.mark.parametrize("scales", ["", "alpha = 0.5, beta = 3.0,", "alpha = -2.0, beta = 0.0,"])
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm(transposed: tuple[int, int], scales: str, bias: tuple[int, ...] | None) -> None:
    a, b = transposed
    arrays = {"w": weight(5, 3) if b else weight(3, 5), **norm(5)}
    if bias is not None:
        arrays["d"] = weight(*bias, seed=2)
    shape = "3,4" if a else "4,3"
    layer = f"Gemm <{scales} transA = {a}, transB = {b}> (x, w{', d' if bias is not None else ''})"
    folds(graph(f"(float[{shape}] x) => (float[4,5] y)", f"c = {layer} {BN}", arrays), ["Gemm"])


@pytest.mark.parametrize("bias", [None, (5,), (4, 1)])
@pytest.mark.parametrize("scales", ["", "alpha = 0.5, beta = 3.0,", "beta = 0.0,"])
@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_behind_the_norm(transposed: int, scales: str, bias: tuple[int, ...] | None) -> None:
    arrays = {"w": weight(5, 3) if transposed else weight(3, 5), **norm(3)}
    if bias is not None:
        arrays["d"] = weight(*bias, seed=2)
    layer = f"Gemm <{scales} transB = {transposed}> (c, w{', d' if bias is not None else ''})"
    body = f"c = BatchNormalization(x, g, b, m, v) y = {layer}"
    folds(graph("(float[4,3] x) => (float[4,5] y)", body, arrays), ["Gemm"], tolerance=1e-5)


@pytest.mark.parametrize("add", [None, (), (5,), (1, 5)])
def test_gemm_then_add(add: tuple[int, ...] | None) -> None:
    arrays = {"w": weight(3, 5), "d": weight(5), **norm(5)}
    body = "c = Gemm <beta = 2.0> (x, w, d) "
    if add is not None:
        arrays["a"] = weight(*add, seed=5)
        body = "r = Gemm <beta = 2.0> (x, w, d) c = Add(r, a) "
    folds(graph("(float[4,3] x) => (float[4,5] y)", body + BN, arrays), ["Gemm"])


@pytest.mark.parametrize("side", ["x @ w", "w @ x"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_matmul(side: str, add: bool, before: bool) -> None:
    right = side == "x @ w"
    shape = "N,3" if right else "N,3,6"
    arrays = {"w": weight(3, 5) if right else weight(5, 3), **norm(3 if before else 5)}
    data = "n" if before else "x"
    product = f"MatMul({data}, w)" if right else f"MatMul(w, {data})"
    body = f"r = {product} "
    if add:
        arrays["a"] = weight(5, seed=3) if right else weight(5, 1, seed=3)
        body += "c = Add(r, a) "
    last = "c" if add else "r"
    if before:
        body = f"n = BatchNormalization(x, g, b, m, v) {body.replace(f'{last} =', 'y =')}"
    else:
        body += f"y = BatchNormalization({last}, g, b, m, v)"
    out = "N,5" if right else "N,5,6"
    folds(graph(f"(float[{shape}] x) => (float[{out}] y)", body, arrays), ["MatMul", "Add"], tolerance=1e-5)


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 14, 15, 17, 20, 22, 24, NEWEST_OPSET])
@pytest.mark.parametrize("dtype", ["float", "float16", "double"])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
def test_types_and_opsets(op: str, dtype: str, opset: int) -> None:
    kind = DTYPES[dtype]
    flat = op in ("Gemm", "MatMul")
    arrays = {"w": weight(4, 4, *([] if flat else [2, 2]), dtype=kind), "d": weight(4, dtype=kind)}
    shape, out = ("N,4", "N,4") if flat else ("N,4,5,5", "N,4,H,W")
    inputs = "(x, w)" if op == "MatMul" else "(x, w, d)"
    if op == "MatMul":
        del arrays["d"]
    body = f"c = {op} {inputs} {BN}"
    proto = graph(
        f"({dtype}[{shape}] x) => ({dtype}[{out}] y)", body, {**arrays, **norm(4, dtype=kind)}, opset=opset
    )
    left = ["MatMul", "Add"] if op == "MatMul" else [op]
    after = folds(proto, left, tolerance=TOLERANCE[dtype])
    assert {numpy_helper.to_array(t).dtype for t in after.graph.initializer} == {np.dtype(kind)}


def test_half_layer_with_single_precision_statistics() -> None:
    arrays = {"w": weight(5, 4, 3, 3, dtype=np.float16), **norm(5)}
    signature = "(float16[N,4,7,6] x) => (float16[N,C,H,W] y)"
    after = folds(graph(signature, f"c = Conv(x, w) {BN}", arrays), ["Conv"], tolerance=5e-3)
    assert {t.data_type for t in after.graph.initializer} == {TensorProto.FLOAT16}


def test_bfloat16() -> None:
    import ml_dtypes

    kind = ml_dtypes.bfloat16
    arrays = {"w": weight(5, 4, 3, 3, dtype=kind), **norm(5, dtype=kind)}
    signature = "(bfloat16[N,4,7,6] x) => (bfloat16[N,C,H,W] y)"
    model = Model.from_proto(graph(signature, f"c = Conv(x, w) {BN}", arrays, opset=22, ir=10))
    assert not FoldBatchNorm().apply(model).refusals
    tensors = {t.name: t for t in model.to_proto().graph.initializer}
    assert {t.data_type for t in tensors.values()} == {TensorProto.BFLOAT16}
    scale = arrays["g"].astype(float) / np.sqrt(arrays["v"].astype(float) + np.float32(1e-5))
    expected = (arrays["w"].astype(float) * scale.reshape(-1, 1, 1, 1)).astype(kind)
    np.testing.assert_array_equal(numpy_helper.to_array(tensors["w"]), expected)


@pytest.mark.parametrize("opset", [7, 9])
@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
def test_ir_3_lists_initializers_as_inputs(op: str, opset: int) -> None:
    flat = op != "Conv"
    arrays = {"w": weight(4, 4, *([] if flat else [2, 2])), **norm(4)}
    if op == "Gemm":
        arrays["d"] = weight(1, 1)  # grows to (4,): it may not keep the input's shape
    shape, out = ("2,4", "2,4") if flat else ("2,4,5,5", "2,4,4,4")
    body = f"c = {op} (x, w{', d' if op == 'Gemm' else ''}) {BN}"
    proto = graph(f"(float[{shape}] x) => (float[{out}] y)", body, arrays, opset=opset, ir=3)
    after = folds(proto, ["MatMul", "Add"] if op == "MatMul" else [op])
    assert [i.name for i in after.graph.input][:2] == ["x", "w"]
    assert {i.name for i in after.graph.input} == {"x"} | {t.name for t in after.graph.initializer}


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
@pytest.mark.parametrize("seed", range(3))
def test_random_statistics_over_many_magnitudes(op: str, seed: int) -> None:
    """Each channel is compared on its own: a channel of 1e-4 must not hide behind one of 1e4."""
    rng = np.random.default_rng(seed)
    flat = op in ("Gemm", "MatMul")
    arrays = {
        "w": weight(8, 8, *([] if flat else [3, 3]), seed=seed),
        "g": (rng.normal(size=8) * 10.0 ** rng.integers(-4, 4, 8)).astype(np.float32),
        "b": np.zeros(8, np.float32),
        "m": rng.normal(size=8).astype(np.float32),
        "v": (10.0 ** rng.uniform(-12, 6, 8)).astype(np.float32),
    }
    shape, out = ("4,8", "4,8") if flat else ("4,8,6,6", "4,8,H,W")
    proto = graph(f"(float[{shape}] x) => (float[{out}] y)", f"c = {op} (x, w) {BN}", arrays)
    after, _ = fold(proto)
    inputs = feeds(proto)
    (expected,), (found,) = outputs(proto, inputs), outputs(after, inputs)
    axes = (0, *range(2, expected.ndim))
    assert (np.abs(found - expected).max(axes) <= 3e-6 * np.abs(expected).max(axes)).all()


def test_large_mean_is_as_exact_as_the_type_allows() -> None:
    """mean 1e4, deviation 1: folding may not be farther from the double result than the original."""
    arrays = {**CONV, "m": np.full(5, 1e4, np.float32), "d": np.full(5, 1e4, np.float32)}
    proto = graph(IMAGE, f"c = Conv(x, w, d) {BN}", arrays)
    model = Model.from_proto(proto)
    FoldBatchNorm().apply(model)
    inputs = feeds(proto)
    wide = graph(
        IMAGE.replace("float", "double"), f"c = Conv(x, w, d) {BN}",
        {k: v.astype(np.float64) for k, v in arrays.items()},
    )  # fmt: skip
    (exact,) = outputs(wide, {k: v.astype(np.float64) for k, v in inputs.items()})
    (before,), (after,) = outputs(proto, inputs), outputs(model.to_proto(), inputs)
    assert np.abs(after - exact).max() < np.abs(before - exact).max()
    assert np.abs(after - exact).max() < 3e-6 * np.abs(exact).max()


def test_tiny_variance() -> None:
    arrays = {**CONV, "v": np.full(5, 1e-30, np.float32)}
    folds(graph(IMAGE, f"c = Conv(x, w) {BN.replace('(c', '<epsilon = 1e-12> (c')}", arrays), ["Conv"])
