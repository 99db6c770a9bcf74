"""fold-bn: where nothing must happen, before/after pairs, the whole grid, hard numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import pytest
from numpy.typing import DTypeLike
from onnx import TensorProto, numpy_helper

from onnxcompress.model import Model, load, save
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passing import PassResult, run
from onnxcompress.statistics import read_record

Arrays = dict[str, np.ndarray]
DTYPES = {"float": np.float32, "float16": np.float16, "double": np.float64}
TOLERANCE = {"float": 3e-6, "float16": 5e-3, "double": 1e-14}
"""Largest difference of an output, relative to its largest magnitude."""
NEWEST_OPSET = onnx.defs.onnx_opset_version()
RUNTIME_OPSET = 24
"""Above it, and for double convolutions, onnx's reference implementation computes the outputs."""
NETWORKS = sorted((Path(__file__).parent.parent / "models").glob("*.onnx"))


def norm(channels: int, name: str = "", seed: int = 0, dtype: DTypeLike = np.float32) -> Arrays:
    """Parameters g, b, m, v of a BatchNorm, with a dead channel, negative gammas and a large mean."""
    rng = np.random.default_rng(seed + 100)
    gamma = rng.normal(size=channels)
    gamma[-1] = 0.0
    mean = rng.normal(size=channels)
    mean[0] = 8.0
    values = gamma, rng.normal(size=channels), mean, rng.uniform(0.2, 2.0, channels)
    return {n + name: v.astype(dtype) for n, v in zip("gbmv", values, strict=True)}


def weight(*shape: int, seed: int = 0, dtype: DTypeLike = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def graph(
    signature: str, body: str, arrays: Arrays, *, opset: int = 17, ir: int = 8, domain: str = ""
) -> onnx.ModelProto:
    """A checked model from onnx's textual form; at IR 3 the initializers are listed as inputs, too."""
    extra = f', "{domain}": 1' if domain else ""
    proto = onnx.parser.parse_model(
        f'<ir_version: {ir}, opset_import: ["": {opset}{extra}]> g {signature} {{ {body} }}'
    )
    for name, values in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
        if ir < 4:
            kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, values.shape))
    if not domain:
        onnx.checker.check_model(proto)
    return proto


def feeds(proto: onnx.ModelProto, seed: int = 1) -> Arrays:
    rng = np.random.default_rng(seed)
    weights = {t.name for t in proto.graph.initializer}
    found = {}
    for info in proto.graph.input:
        if info.name not in weights:
            kind = info.type.tensor_type
            shape = [d.dim_value or 2 for d in kind.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            values = rng.normal(size=shape) if info.name != "v" else rng.uniform(0.2, 2.0, shape)
            found[info.name] = np.asarray(values > 0 if dtype == np.bool_ else values, dtype)
    return found


def outputs(proto: onnx.ModelProto, inputs: Arrays) -> list[np.ndarray]:
    """In onnxruntime without graph optimizations, or in the reference where it has no kernel."""
    opset = max(o.version for o in proto.opset_import if not o.domain)
    doubles = any(t.data_type == TensorProto.DOUBLE for t in proto.graph.initializer)
    if doubles or opset > RUNTIME_OPSET:
        if opset < 14:  # the reference's BatchNormalization of older operator sets trains
            proto = onnx.ModelProto.FromString(proto.SerializeToString())
            proto.opset_import[0].version = 14
        return list(onnx.reference.ReferenceEvaluator(proto).run(None, inputs))
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def fold(
    proto: onnx.ModelProto, *, tolerance: float = TOLERANCE["float"], copy_shared: bool = False
) -> tuple[onnx.ModelProto, PassResult]:
    """Fold, check that model and outputs are still right, and that folding again changes nothing."""
    model = Model.from_proto(proto)
    result = FoldBatchNorm(copy_shared).apply(model)
    after = model.to_proto()
    if all(not o.domain for o in proto.opset_import):
        onnx.checker.check_model(after, full_check=True)
        inputs = feeds(proto)
        pairs = zip(outputs(proto, inputs), outputs(after, inputs), strict=True)
        for expected, found in pairs:
            assert found.dtype == expected.dtype
            limit = tolerance * max(np.abs(expected).max(), 1e-30)
            np.testing.assert_allclose(found, expected, rtol=0, atol=limit)
    assert [o.name for o in after.graph.output] == [o.name for o in proto.graph.output]
    again = FoldBatchNorm(copy_shared).apply(model)
    assert not again.modified
    assert model.to_proto() == after
    return after, result


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def stays(proto: onnx.ModelProto, reason: str, *, copy_shared: bool = False) -> None:
    """Nothing is folded, and the one refusal says why."""
    after, result = fold(proto, copy_shared=copy_shared)
    assert list(after.graph.node) == list(proto.graph.node)
    assert list(after.graph.initializer) == list(proto.graph.initializer)
    (refusal,) = result.refusals
    assert reason in str(refusal)
    assert refusal.node
    assert result.measured["folded"] == 0


def folds(proto: onnx.ModelProto, expected: list[str], **options: float) -> onnx.ModelProto:
    """Everything is folded; `expected` are the operators that are left."""
    after, result = fold(proto, **options)  # type: ignore[arg-type]
    assert not result.refusals
    assert ops(after) == expected
    return after


BN = "y = BatchNormalization(c, g, b, m, v)"
IMAGE = "(float[N,4,7,6] x) => (float[N,C,H,W] y)"
CONV = {"w": weight(5, 4, 3, 3), **norm(5)}


# -- nothing must happen ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Relu(x)", ""),
        ("c = Relu(x) y = BatchNormalization(c, g, b, m, v)", "follows Relu"),
        ("y = BatchNormalization(x, g, b, m, v)", "follows an input, nothing else reads it"),
        ("c = Add(x, x) y = BatchNormalization(c, g, b, m, v)", "follows Add"),
        ("c = BatchNormalization(x, g, b, m, v) r = Relu(c) y = Conv(r, w)", "Relu reads it"),
        ("c = BatchNormalization(x, g, b, m, v) y = Conv <pads = [1,1,1,1]> (c, w)", "pads with zeros"),
        ("c = BatchNormalization(x, g, b, m, v) y = Conv <pads = [0,0,1,0]> (c, w)", "pads with zeros"),
        ("c = BatchNormalization(x, g, b, m, v) y = Conv <auto_pad = 'SAME_LOWER'> (c, w)", "pads"),
        ("c = BatchNormalization(x, g, b, m, v) y = ConvTranspose(c, w)", "varies by position"),
        ("c = BatchNormalization(x, g, b, m, v) z = Relu(c) t = Conv(c, w) y = Conv(z, w)", "several"),
    ],
)
def test_stays(body: str, reason: str) -> None:
    body = body.replace("'", '"')
    proto = graph(IMAGE, body, {"w": weight(4, 4, 3, 3), **norm(4)})
    if reason:
        stays(proto, reason)
    else:
        after, result = fold(proto)
        assert after == proto
        assert result == PassResult(measured={"folded": 0, "left": 0, "recorded": 0})


def test_other_consumer_of_the_convolution() -> None:
    signature = "(float[N,4,7,6] x) => (float[N,C,H,W] y, float[N,C,H,W] z)"
    stays(graph(signature, f"c = Conv(x, w) {BN} z = Relu(c)", CONV), "other consumers: z")


def test_convolution_that_is_an_output() -> None:
    signature = "(float[N,4,7,6] x) => (float[N,C,H,W] y, float[N,C,H,W] c)"
    stays(graph(signature, f"c = Conv(x, w) {BN}", CONV), "is a graph output, too")


def test_two_norms_of_one_convolution() -> None:
    signature = "(float[N,4,7,6] x) => (float[N,C,H,W] y, float[N,C,H,W] z)"
    proto = graph(signature, f"c = Conv(x, w) {BN} z = BatchNormalization(c, m, b, g, v)", CONV)
    after, result = fold(proto)
    assert ops(after) == ops(proto)
    assert len(result.refusals) == 2


@pytest.mark.parametrize("attributes", ["<training_mode = 1>", ""])
def test_training_mode(attributes: str) -> None:
    body = f"c = Conv(x, w) y, rm, rv = BatchNormalization {attributes} (c, g, b, m, v)"
    signature = "(float[N,4,7,6] x) => (float[N,C,H,W] y, float[5] rm)"
    reason = "training mode" if attributes else "running statistics are read"
    proto = graph(signature, body, CONV)
    model = Model.from_proto(proto)
    result = FoldBatchNorm().apply(model)
    assert reason in str(result.refusals[0])
    assert model.to_proto().graph == proto.graph


def test_five_outputs_of_old_opsets_mean_training() -> None:
    body = "c = Conv(x, w) y, a1, a2, a3, a4 = BatchNormalization(c, g, b, m, v)"
    result = FoldBatchNorm().apply(Model.from_proto(graph(IMAGE, body, CONV, opset=9)))
    assert "training mode" in result.refusals[0].rule
    assert not read_record(Model.from_proto(graph(IMAGE, body, CONV, opset=9)))


def test_positional_statistics() -> None:
    body = f"c = Conv(x, w) {BN.replace('(c', '<spatial = 0> (c')}"
    result = FoldBatchNorm().apply(Model.from_proto(graph(IMAGE, body, CONV, opset=7)))
    assert "spatial=0" in result.refusals[0].rule


def test_opset_6() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 3, opset_import: ["": 6]> g (float[1,4,7,6] x, float[5,4,3,3] w, float[5] g) => '
        "(float[1,5,5,4] y) { c = Conv(x, w) y = BatchNormalization <is_test = 1> (c, g, g, g, g) }"
    )
    assert "below 7" in FoldBatchNorm().apply(Model.from_proto(proto)).refusals[0].rule


@pytest.mark.parametrize("which", ["g", "b", "m", "v", "w"])
def test_computed_parameters(which: str) -> None:
    shape = "5,4,3,3" if which == "w" else "5"
    signature = f"(float[N,4,7,6] x, float[{shape}] {which}) => (float[N,C,H,W] y)"
    arrays = {k: v for k, v in CONV.items() if k != which}
    stays(graph(signature, f"c = Conv(x, w) {BN}", arrays), "is not a constant")


def test_computed_bias() -> None:
    signature = "(float[N,4,7,6] x, float[5] d) => (float[N,C,H,W] y)"
    stays(graph(signature, f"c = Conv(x, w, d) {BN}", CONV), "bias of Conv 'c' is not a constant")


def test_quantized_weight() -> None:
    arrays = {
        "q": np.arange(-90, 90).reshape(5, 4, 3, 3).astype(np.int8),
        "s": np.float32(0.1),
        **norm(5),
    }
    stays(graph(IMAGE, f"w = DequantizeLinear(q, s) c = Conv(x, w) {BN}", arrays), "weight")


def test_wrong_number_of_channels() -> None:
    proto = graph(IMAGE, f"c = Conv(x, w) {BN}", {**CONV, **norm(6)})
    result = FoldBatchNorm().apply(Model.from_proto(proto))
    assert "it has 6 channels, Conv 'c' has 5" in result.refusals[0].rule


def test_parameters_of_different_lengths() -> None:
    proto = graph(IMAGE, f"c = Conv(x, w) {BN}", {**CONV, "m": np.zeros(4, np.float32)})
    result = FoldBatchNorm().apply(Model.from_proto(proto))
    assert "scale [5], bias [5], mean [4]" in result.refusals[0].rule


@pytest.mark.parametrize(("name", "value"), [("v", -1.0), ("v", np.nan), ("g", np.inf), ("b", np.nan)])
def test_broken_statistics(name: str, value: float) -> None:
    arrays = {k: v.copy() for k, v in CONV.items()}
    arrays[name][2] = value
    proto = graph(IMAGE, f"c = Conv(x, w) {BN}", arrays)
    model = Model.from_proto(proto)
    result = FoldBatchNorm().apply(model)
    assert "channel 2 has no finite scale" in result.refusals[0].rule
    assert list(model.to_proto().graph.initializer) == list(proto.graph.initializer)


def test_overflow_in_float16() -> None:
    arrays = {"w": weight(5, 4, 3, 3, dtype=np.float16), **norm(5)}
    arrays["g"][1] = 1e6
    signature = "(float16[N,4,7,6] x) => (float16[N,C,H,W] y)"
    proto = graph(signature, f"c = Conv(x, w) {BN}", arrays)
    result = FoldBatchNorm().apply(Model.from_proto(proto))
    assert "exceed float16" in result.refusals[0].rule


def test_matmul_whose_channels_are_elsewhere() -> None:
    signature = "(float[N,5,4] x) => (float[N,5,5] y)"
    stays(graph(signature, f"c = MatMul(x, w) {BN}", {"w": weight(4, 5), **norm(5)}), "not what MatMul")


def test_matmul_of_unknown_rank() -> None:
    signature = "(float x, int64[K] s) => (float y)"
    body = f"r = Reshape(x, s) c = MatMul(r, w) {BN}"
    proto = graph(signature, body, {"w": weight(4, 5), **norm(5)})
    assert "rank" in FoldBatchNorm().apply(Model.from_proto(proto)).refusals[0].rule


def test_gemm_behind_that_transposes() -> None:
    body = "c = BatchNormalization(x, g, b, m, v) y = Gemm <transA = 1> (c, w)"
    stays(graph("(float[4,4] x) => (float[M,N] y)", body, {"w": weight(4, 5), **norm(4)}), "transposes")


def test_far_mean_before_a_layer() -> None:
    arrays = {"w": weight(3, 4, 3, 3), **norm(4)}
    arrays["m"] = np.array([0, 1000, 0, 1000], np.float32)  # the last channel's gamma is 0
    body = "c = BatchNormalization(x, g, b, m, v) y = Conv(c, w)"
    stays(graph(IMAGE, body, arrays), "the mean of channel 1 is over 64 deviations from zero")
    arrays["m"][1] = 10
    folds(graph(IMAGE, body, arrays), ["Conv"], tolerance=1e-5)


def test_add_that_broadcasts_over_the_channels() -> None:
    arrays = {"w": weight(1, 4, 3, 3), "a": weight(5, 1, 1), **norm(5)}
    stays(graph(IMAGE, f"r = Conv(x, w) c = Add(r, a) {BN}", arrays), "has 1")


def test_other_domain() -> None:
    proto = graph(IMAGE, f"c = my.Conv(x, w) {BN}", CONV, domain="my")
    result = FoldBatchNorm().apply(Model.from_proto(proto))
    assert "follows Conv 'c'" in result.refusals[0].rule or "no linear layer" in result.refusals[0].rule


BRANCH = (
    "then_branch = t () => (float[N,C,H,W] p) {{ {then} }}, "
    "else_branch = e () => (float[N,C,H,W] q) {{ {other} }}"
)


def test_norm_inside_a_body() -> None:
    signature = "(float[N,4,7,6] x, bool k) => (float[N,C,H,W] y)"
    inner = "c = Conv(x, w) p = BatchNormalization(c, g, b, m, v)"
    body = f"y = If(k) <{BRANCH.format(then=inner, other='q = Conv(x, w)')}>"
    stays(graph(signature, body, CONV), "inside 't', the body of an If")


def test_convolution_that_a_body_captures() -> None:
    signature = "(float[N,4,7,6] x, bool k) => (float[N,C,H,W] y, float[N,C,H,W] z)"
    branches = BRANCH.format(then="p = Relu(c)", other="q = Neg(c)")
    proto = graph(signature, f"c = Conv(x, w) {BN} z = If(k) <{branches}>", CONV)
    stays(proto, "has other consumers")


def test_norm_that_only_a_body_reads() -> None:
    signature = "(float[N,4,7,6] x, bool k) => (float[N,C,H,W] y)"
    branches = BRANCH.format(then="p = Conv(c, w)", other="q = Neg(x)")
    body = f"c = BatchNormalization(x, g, b, m, v) y = If(k) <{branches}>"
    stays(graph(signature, body, {"w": weight(4, 4, 1, 1), **norm(4)}), "is read inside the body")


def test_weight_that_a_body_reads() -> None:
    signature = "(float[N,4,7,6] x, bool k) => (float[N,C,H,W] y, float[N,C,H,W] z)"
    branches = BRANCH.format(then="p = Conv(x, w)", other="q = Neg(x)")
    proto = graph(signature, f"c = Conv(x, w) {BN} z = If(k) <{branches}>", CONV)
    stays(proto, "weight 'w' of Conv 'c' is shared")
    after = folds(proto, ["Conv", "If"], copy_shared=True)
    assert {t.name for t in after.graph.initializer} == {"w", "w_folded", "w_bias"}


def test_norm_inside_a_loop_beside_one_that_folds() -> None:
    signature = "(float[2,4,7,6] x) => (float[N,C,H,W] y)"
    inner = (
        "body = l (int64 i, bool o, float[2,5,5,4] s) => (bool o2, float[2,5,5,4] s2) "
        "{ o2 = Identity(o) s2 = BatchNormalization(s, g, b, m, v) }"
    )
    body = f"c = Conv(x, w) n = BatchNormalization(c, g, b, m, v) y = Loop(three, on, n) <{inner}>"
    arrays = {**CONV, "three": np.array(3, np.int64), "on": np.array(True)}
    after, result = fold(graph(signature, body, arrays))
    assert ops(after) == ["Conv", "Loop"]
    assert "inside 'l'" in result.refusals[0].rule


def test_norm_inside_a_function() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "my": 1]> g (float[N,4] x, float[4] p) => (float[N,4] y)'
        " { y = my.f(x, p) } "
        '<domain: "my", opset_import: ["": 17]> f (x, p) => (y) { y = BatchNormalization(x, p, p, p, p) }'
    )
    assert "function 'f'" in FoldBatchNorm().apply(Model.from_proto(proto)).refusals[0].rule


# -- before and after ------------------------------------------------------------------------------------


def test_convolution() -> None:
    after = folds(graph(IMAGE, f"c = Conv(x, w) {BN}", CONV), ["Conv"])
    assert after.graph.node[0].input == ["x", "w", "w_bias"]
    assert {t.name for t in after.graph.initializer} == {"w", "w_bias"}


def test_every_algebra_by_hand() -> None:
    arrays = {
        "w": np.full((1, 1, 1, 1), 3.0, np.float32),
        "d": np.array([5.0], np.float32),
        "g": np.array([2.0], np.float32),
        "b": np.array([7.0], np.float32),
        "m": np.array([1.0], np.float32),
        "v": np.array([15.0], np.float32),
    }
    body = "c = Conv(x, w, d) y = BatchNormalization <epsilon = 1.0> (c, g, b, m, v)"
    after = folds(graph("(float[1,1,2,2] x) => (float[1,1,2,2] y)", body, arrays), ["Conv"])
    values = {t.name: numpy_helper.to_array(t).item() for t in after.graph.initializer}
    assert values == {"w": 1.5, "d": 9.0}  # s = 2 / 4; s * 3; s * (5 - 1) + 7


def test_bias_takes_the_name_of_torch() -> None:
    proto = graph(IMAGE, f"c = Conv(x, w) {BN}", CONV)
    proto.graph.node[0].input[1] = proto.graph.initializer[0].name = "conv1.weight"
    after = folds(proto, ["Conv"])
    assert after.graph.node[0].input[2] == "conv1.bias"


def test_name_collision() -> None:
    arrays = {**CONV, "w_bias": np.float32(0.5), "w_bias_1": np.float32(0.5)}
    body = f"c = Conv(x, w) {BN.replace('y', 'n')} e = Add(n, w_bias) y = Mul(e, w_bias_1)"
    after = folds(graph(IMAGE, body, arrays), ["Conv", "Add", "Mul"])
    assert after.graph.node[0].input[2] == "w_bias_2"


def test_name_taken_inside_a_body() -> None:
    signature = "(float[N,4,7,6] x, bool k) => (float[N,C,H,W] y)"
    branches = BRANCH.format(then="w_bias = Relu(n) p = Neg(w_bias)", other="q = Neg(n)")
    body = f"c = Conv(x, w) n = BatchNormalization(c, g, b, m, v) y = If(k) <{branches}>"
    after = folds(graph(signature, body, CONV), ["Conv", "If"])
    assert after.graph.node[0].input[2] == "w_bias_1"


def test_zero_shift_needs_no_bias() -> None:
    arrays = {**CONV, "b": np.zeros(5, np.float32), "m": np.zeros(5, np.float32)}
    after = folds(graph(IMAGE, f"c = Conv(x, w) {BN}", arrays), ["Conv"])
    assert after.graph.node[0].input == ["x", "w"]
    arrays = {**arrays, "w": weight(4, 5)}
    folds(graph("(float[N,4] x) => (float[N,5] y)", f"c = MatMul(x, w) {BN}", arrays), ["MatMul"])


def test_empty_optional_bias() -> None:
    after = folds(graph(IMAGE, f"c = Conv(x, w, ) {BN}", CONV), ["Conv"])
    assert after.graph.node[0].input[2] == "w_bias"


def test_norm_behind_norm() -> None:
    body = f"d = Conv(x, w) c = BatchNormalization(d, g, b, m, v) {BN}"
    folds(graph(IMAGE, body, CONV), ["Conv"])


def test_norms_before_a_layer_fold_from_the_last() -> None:
    body = "c = BatchNormalization(x, g, b, m, v) d = BatchNormalization(c, g, b, m, v) y = Conv(d, w)"
    folds(graph(IMAGE, body, {"w": weight(3, 4, 3, 3), **norm(4)}), ["Conv"])


def test_shared_parameters_of_norms() -> None:
    body = f"e = Conv(x, w) d = BatchNormalization(e, g, b, m, v) f = Relu(d) c = Conv(f, u) {BN}"
    folds(graph(IMAGE, body, {**CONV, "u": weight(5, 5, 2, 2)}), ["Conv", "Relu", "Conv"])


def test_listed_but_unread_statistics() -> None:
    body = "c = Conv(x, w) y, rm, rv = BatchNormalization <training_mode = 0> (c, g, b, m, v)"
    model = Model.from_proto(graph(IMAGE, body, CONV))
    assert not FoldBatchNorm().apply(model).refusals
    assert ops(model.to_proto()) == ["Conv"]


@pytest.mark.parametrize("way", ["Constant", "Identity", "Constant and Identity", "Cast"])
def test_constants_reached_through_nodes(way: str) -> None:
    arrays = dict(CONV)
    body = f"c = Conv(x, w) {BN}"
    if way == "Identity":
        arrays = {f"{k}0": v for k, v in CONV.items()}
        body = "".join(f"{k} = Identity({k}0) " for k in CONV) + body
    if way == "Cast":
        arrays = {f"{k}0": v.astype(np.float16) for k, v in CONV.items()}
        body = "".join(f"{k} = Cast <to = 1> ({k}0) " for k in CONV) + body
    proto = graph(IMAGE, body, arrays) if "Constant" not in way else None
    if proto is None:
        proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {IMAGE} {{ {body} }}')
        makers = []
        for name, values in arrays.items():
            tensor = numpy_helper.from_array(values, name)
            inner = f"{name}0" if "Identity" in way else name
            makers.append(onnx.helper.make_node("Constant", [], [inner], value=tensor))
            if inner != name:
                makers.append(onnx.helper.make_node("Identity", [inner], [name]))
        proto.graph.node.MergeFrom(makers)
        nodes = [*proto.graph.node][-len(makers) :] + [*proto.graph.node][: -len(makers)]
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del proto.graph.node[:]
        proto.graph.node.extend(copies)
    after = folds(proto, ["Conv"])
    assert len(after.graph.initializer) == 2


def test_weight_behind_transpose_and_computed_bias() -> None:
    """As torch's newer exporter leaves them without its optimizer."""
    arrays = {"w0": weight(5, 4), "zero": np.float32(0.25), "shape": np.array([5]), **norm(5)}
    body = f"w = Transpose <perm = [1,0]> (w0) d = Expand(zero, shape) p = MatMul(x, w) c = Add(p, d) {BN}"
    signature = "(float[N,4] x) => (float[N,5] y)"
    folds(graph(signature, body, arrays), ["MatMul", "Add"])
    arrays["w0"] = weight(4, 5, 3, 3)
    body = f"w = Transpose <perm = [1,0,2,3]> (w0) d = Expand(zero, shape) c = Conv(x, w, d) {BN}"
    after = folds(graph(IMAGE, body, arrays), ["Conv"])
    assert after.graph.node[0].input == ["x", "w_folded", "w_bias"]


@pytest.mark.parametrize("through", [False, True])
def test_shared_weight(through: bool) -> None:
    signature = "(float[N,4,7,6] x) => (float[N,C,H,W] y, float[N,C,H,W] z)"
    head = "i = Identity(w) c = Conv(x, i)" if through else "c = Conv(x, w)"
    proto = graph(signature, f"{head} {BN} z = Conv(x, w)", CONV)
    stays(proto, "weight 'w' of Conv 'c' is shared (--copy-shared gives it a copy)")
    after = folds(proto, ["Conv", "Conv"], copy_shared=True)
    before = {t.name: t for t in proto.graph.initializer}
    assert next(t for t in after.graph.initializer if t.name == "w") == before["w"]


def test_weight_shared_by_two_normalized_layers() -> None:
    signature = "(float[N,4,7,6] x) => (float[N,C,H,W] y, float[N,C,H,W] z)"
    body = f"c = Conv(x, w) {BN} d = Conv(x, w) z = BatchNormalization(d, g2, b2, m2, v2)"
    proto = graph(signature, body, {**CONV, **norm(5, "2", seed=3)})
    _, result = fold(proto)
    assert len(result.refusals) == 2
    folds(proto, ["Conv", "Conv"], copy_shared=True)


def test_weight_that_is_an_output() -> None:
    signature = "(float[N,4,7,6] x) => (float[N,C,H,W] y, float[5,4,3,3] o)"
    stays(graph(signature, f"o = Identity(w) c = Conv(x, w) {BN}", CONV), "is shared")


def test_shared_bias_gives_way() -> None:
    signature = "(float[N,4,7,6] x) => (float[N,C,H,W] y, float[N,C,H,W] z)"
    arrays = {**CONV, "u": weight(5, 4, 1, 1), "d": weight(5)}
    folds(graph(signature, f"c = Conv(x, w, d) {BN} z = Conv(x, u, d)", arrays), ["Conv", "Conv"])


@pytest.mark.parametrize(
    ("shape", "left"), [((5, 1, 1), 1), ((1, 5, 1, 1), 1), ((), 1), ((1,), 1), ((5, 5, 4), 2), ((5, 4), 2)]
)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_add_between(shape: tuple[int, ...], left: int, swapped: bool, bias: bool) -> None:
    add = "Add(a, r)" if swapped else "Add(r, a)"
    arrays = {**CONV, "a": weight(*shape, seed=2)} | ({"d": weight(5, seed=3)} if bias else {})
    body = f"r = Conv(x, w{', d' * bias}) c = {add} {BN}"
    folds(graph(IMAGE, body, arrays), ["Conv", "Add"][:left])


def test_add_that_is_read_elsewhere() -> None:
    signature = "(float[N,4,7,6] x) => (float[N,C,H,W] y, float[N,C,H,W] z)"
    arrays = {**CONV, "a": weight(5, 1, 1)}
    stays(graph(signature, f"r = Conv(x, w) c = Add(r, a) {BN} z = Relu(r)", arrays), "consumers: z")
    stays(graph(signature, f"r = Conv(x, w) c = Add(r, a) {BN} z = Relu(c)", arrays), "consumers: z")


def test_add_constant_read_elsewhere_is_left() -> None:
    arrays = {"w": weight(4, 5), "a": weight(5), **norm(5)}
    signature = "(float[N,4] x) => (float[N,5] y, float[N,5] z)"
    proto = graph(signature, f"r = MatMul(x, w) c = Add(r, a) {BN} z = Mul(y, a)", arrays)
    folds(proto, ["MatMul", "Add", "Mul"])


def test_output_of_the_norm_is_captured_and_an_output() -> None:
    signature = "(float[N,4,7,6] x, bool k) => (float[N,C,H,W] y, float[N,C,H,W] z)"
    branches = BRANCH.format(then="p = Relu(y)", other="q = Neg(y)")
    folds(graph(signature, f"c = Conv(x, w) {BN} z = If(k) <{branches}>", CONV), ["Conv", "If"])


def test_flatten_before_gemm() -> None:
    body = "c = BatchNormalization(x, g, b, m, v) f = Flatten(c) y = Gemm <transB = 1> (f, w)"
    arrays = {"w": weight(3, 4 * 7 * 6), **norm(4)}
    folds(graph("(float[N,4,7,6] x) => (float[N,3] y)", body, arrays), ["Flatten", "Gemm"])
    body = body.replace("Gemm <transB = 1>", "MatMul")
    arrays = {"w": weight(4 * 7 * 6, 3), **norm(4)}
    proto = graph("(float[N,4,7,6] x) => (float[N,3] y)", body, arrays)
    folds(proto, ["Flatten", "MatMul", "Add"])


def test_zero_shift_before_padding() -> None:
    arrays = {
        "w": weight(3, 4, 3, 3),
        **norm(4),
        "b": np.zeros(4, np.float32),
        "m": np.zeros(4, np.float32),
    }
    for layer in ("Conv <pads = [1,1,1,1]>", 'Conv <auto_pad = "SAME_UPPER">'):
        folds(graph(IMAGE, f"c = BatchNormalization(x, g, b, m, v) y = {layer} (c, w)", arrays), ["Conv"])
    arrays["w"] = weight(4, 3, 3, 3)
    body = "c = BatchNormalization(x, g, b, m, v) y = ConvTranspose <strides = [2,2]> (c, w)"
    folds(graph(IMAGE, body, arrays), ["ConvTranspose"])


@pytest.mark.parametrize("add", ["", "read", "const", "spatial"])
def test_matmul_behind_the_norm(add: str) -> None:
    arrays = {"w": weight(4, 5), **norm(4)}
    body = "c = BatchNormalization(x, g, b, m, v) p = MatMul(c, w) "
    if add == "read":
        body += "y = Mul(p, p)"
    elif add:
        arrays["a"] = weight(5) if add == "const" else weight(1, 1)
        body += "y = Add(a, p)"
    else:
        body = body.replace("p =", "y =")
    left = {"": ["MatMul", "Add"], "read": ["MatMul", "Add", "Mul"]}.get(add, ["MatMul", "Add"])
    folds(graph("(float[N,4] x) => (float[N,5] y)", body, arrays), left)


def test_nodes_keep_their_order_and_metadata() -> None:
    body = f"s = Shape(x) c = Conv(x, w) {BN.replace('y', 'n')} y = Relu(n) t = Size(x)"
    proto = graph("(float[N,4,7,6] x) => (float[N,C,H,W] y, int64[4] s, int64 t)", body, CONV)
    proto.graph.node[1].doc_string = "first"
    proto.graph.node[1].metadata_props.add(key="k", value="v")
    after = folds(proto, ["Shape", "Conv", "Relu", "Size"])
    assert after.graph.node[1].doc_string == "first"
    assert after.graph.node[1].metadata_props[0].value == "v"


# -- the grid --------------------------------------------------------------------------------------------

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


# -- hard numbers ----------------------------------------------------------------------------------------


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


# -- the record, provenance, real networks ---------------------------------------------------------------


def test_record_keeps_every_norm_in_inference_mode() -> None:
    body = f"d = Conv(x, w) n = BatchNormalization(d, g, b, m, v) c = Relu(n) {BN}"
    model = Model.from_proto(graph(IMAGE, body, CONV))
    FoldBatchNorm().apply(model)
    record = read_record(Model.from_proto(model.to_proto()))
    assert set(record) == {"n", "y"}
    for statistics in record.values():
        np.testing.assert_array_equal(statistics.mean, CONV["b"])
        np.testing.assert_array_equal(statistics.std, np.abs(CONV["g"]))
        assert statistics.source == "batch-norm"


def test_record_of_a_norm_folded_forward_is_that_of_its_input() -> None:
    body = "c = BatchNormalization(x, g, b, m, v) y = Conv(c, w)"
    arrays = {"w": weight(3, 4, 3, 3), **norm(4)}
    model = Model.from_proto(graph(IMAGE, body, arrays))
    FoldBatchNorm().apply(model)
    record = read_record(model)
    assert set(record) == {"x"}
    np.testing.assert_array_equal(record["x"].mean, arrays["m"])
    np.testing.assert_allclose(record["x"].std, np.sqrt(arrays["v"] + 1e-5), rtol=1e-6)


def test_a_model_that_only_gains_a_record_is_modified() -> None:
    proto = graph(IMAGE, "y = BatchNormalization(x, g, b, m, v)", norm(4))
    model = Model.from_proto(proto)
    result = FoldBatchNorm().apply(model)
    assert result.modified
    assert result.measured == {"folded": 0, "left": 1, "recorded": 1}
    assert set(read_record(model)) == {"y"}


def test_provenance_and_results() -> None:
    model = Model.from_proto(graph(IMAGE, f"c = Conv(x, w) {BN}", CONV))
    digest = model.digest()
    (result,) = run([FoldBatchNorm()], model)
    (entry,) = model.provenance()
    assert entry["pass"] == "fold-bn"
    assert entry["options"] == {"copy_shared": False}
    assert entry["input_sha256"] == digest
    assert [(c.node, c.what) for c in result.changes] == [("y", "folded into Conv 'c'")]
    assert result.measured == {"folded": 1, "left": 0, "recorded": 1}
    run([FoldBatchNorm()], model)
    assert len(model.provenance()) == 1


@pytest.mark.parametrize("path", NETWORKS, ids=lambda p: p.stem)
def test_network(path: Path, tmp_path: Path) -> None:
    model = load(path)
    result = FoldBatchNorm().apply(model)
    save(model, tmp_path / "folded.onnx")
    before, after = onnx.load(path), onnx.load(tmp_path / "folded.onnx")
    inputs = feeds(before)
    for expected, found in zip(outputs(before, inputs), outputs(after, inputs), strict=True):
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert ops(after).count("BatchNormalization") == len(result.refusals)


def test_needs_neither_torch_nor_onnxruntime(tmp_path: Path) -> None:
    onnx.save(graph(IMAGE, f"c = Conv(x, w) {BN}", CONV), tmp_path / "in.onnx")
    script = (
        "import sys\n"
        "from onnxcompress.model import load, save\n"
        "from onnxcompress.passes.fold_bn import FoldBatchNorm\n"
        "model = load(sys.argv[1])\n"
        "assert FoldBatchNorm().apply(model).modified\n"
        "save(model, sys.argv[2])\n"
        "assert not {'torch', 'onnxruntime', 'passes'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ops(onnx.load(tmp_path / "out.onnx")) == ["Conv"]
