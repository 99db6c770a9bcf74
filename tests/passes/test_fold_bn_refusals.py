"""fold-bn: the cases where nothing must happen, each with its reason."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import pytest

from onnxcompress.model import Model
from onnxcompress.passes.base import PassResult
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.fold_bn.fold_bn import FoldBatchNormFigures
from onnxcompress.statistics.record import read_record
from tests.helpers.folding import BN, BRANCH, CONV, IMAGE, fold, folds, graph, norm, ops, stays, weight


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
        assert result == PassResult(measured=FoldBatchNormFigures(folded=0, left=0, recorded=0))


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
    stays(graph(IMAGE, f"r = Conv(x, w) c = Add(r, a) {BN}", arrays), "broadcasts over the channels")


def test_other_domain() -> None:
    proto = graph(IMAGE, f"c = my.Conv(x, w) {BN}", CONV, domain="my")
    result = FoldBatchNorm().apply(Model.from_proto(proto))
    (refusal,) = result.refusals
    assert refusal.rule == "no linear layer is beside it: it follows Conv 'c', nothing else reads it"


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
