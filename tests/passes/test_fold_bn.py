"""fold-bn: before and after, the record, real networks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import pytest
from onnx import numpy_helper

from onnxcompress.model import Model, load, save
from onnxcompress.passes.base import run
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.fold_bn.fold_bn import FoldBatchNormFigures
from onnxcompress.statistics.record import read_record
from tests.helpers.folding import (
    BN,
    BRANCH,
    CONV,
    IMAGE,
    feeds,
    fold,
    folds,
    graph,
    norm,
    ops,
    outputs,
    stays,
    weight,
)
from tests.helpers.paths import RESIDUAL

NETWORKS = RESIDUAL


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


def test_zero_bias_from_the_shape_of_the_weight() -> None:
    body = (
        "s = Shape <start = 0, end = 1> (w) o = Constant <value = float {0}> () z = CastLike(o, x) "
        f"d = Expand(z, s) c = Conv(x, w, d) {BN}"
    )
    after = folds(graph(IMAGE, body, CONV), ["Conv"])
    assert after.graph.node[0].input == ["x", "w", "w_bias"]
    signature = "(float[N,4,7,6] x) => (float[N,C,H,W] y, int64[4] s)"
    folds(graph(signature, f"s = Shape(w) c = Conv(x, w) {BN}", CONV), ["Shape", "Conv"])


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


def test_record_keeps_every_norm_in_inference_mode() -> None:
    body = f"d = Conv(x, w) n = BatchNormalization(d, g, b, m, v) c = Relu(n) {BN}"
    model = Model.from_proto(graph(IMAGE, body, CONV))
    FoldBatchNorm().apply(model)
    record = read_record(Model.from_proto(model.to_proto()))
    assert set(record) == {"n", "y"}
    for statistics in record.values():
        np.testing.assert_array_equal(statistics.mean, CONV["b"])
        exact = np.abs(CONV["g"]) * np.sqrt(CONV["v"] / (CONV["v"] + 1e-5))
        np.testing.assert_allclose(statistics.std, exact, rtol=1e-6)
        assert statistics.source == "batch-norm"


def test_record_of_a_norm_folded_forward_is_that_of_its_input() -> None:
    body = "c = BatchNormalization(x, g, b, m, v) y = Conv(c, w)"
    arrays = {"w": weight(3, 4, 3, 3), **norm(4)}
    model = Model.from_proto(graph(IMAGE, body, arrays))
    FoldBatchNorm().apply(model)
    record = read_record(model)
    assert set(record) == {"x"}
    np.testing.assert_array_equal(record["x"].mean, arrays["m"])
    np.testing.assert_allclose(record["x"].std, np.sqrt(arrays["v"]), rtol=1e-6)


def test_a_model_that_only_gains_a_record_is_modified() -> None:
    proto = graph(IMAGE, "y = BatchNormalization(x, g, b, m, v)", norm(4))
    model = Model.from_proto(proto)
    result = FoldBatchNorm().apply(model)
    assert result.modified
    assert result.measured == FoldBatchNormFigures(folded=0, left=1, recorded=1)
    assert set(read_record(model)) == {"y"}


def test_provenance_and_results() -> None:
    model = Model.from_proto(graph(IMAGE, f"c = Conv(x, w) {BN}", CONV))
    digest = model.digest()
    (result,) = run([FoldBatchNorm()], model)
    (entry,) = model.provenance()
    assert entry["pass"] == "fold-bn"
    assert entry["options"] == {"copy_shared": False}
    assert entry["input_sha256"] == digest
    assert [(c.node, c.what) for c in result.changes] == [("y", "folded into the Conv before it")]
    assert result.measured == FoldBatchNormFigures(folded=1, left=0, recorded=1)
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
