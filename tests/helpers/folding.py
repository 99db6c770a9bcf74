"""Small graphs with BatchNorms, and what every folding of one must fulfil."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx.reference
from numpy.typing import DTypeLike
from onnx import TensorProto, numpy_helper

from onnxcompress.model import Model
from onnxcompress.passes.base import PassResult
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.fold_bn.fold_bn import FoldBatchNormFigures

Arrays = dict[str, np.ndarray]
DTYPES = {"float": np.float32, "float16": np.float16, "double": np.float64}
TOLERANCE = {"float": 3e-6, "float16": 5e-3, "double": 1e-14}
"""Largest difference of an output, relative to its largest magnitude."""
NEWEST_OPSET = onnx.defs.onnx_opset_version()
RUNTIME_OPSET = 24
"""Above it, and for double convolutions, onnx's reference implementation computes the outputs."""


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
) -> tuple[onnx.ModelProto, PassResult[FoldBatchNormFigures]]:
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
    assert result.measured.folded == 0


def folds(proto: onnx.ModelProto, expected: list[str], **options: float) -> onnx.ModelProto:
    """Everything is folded; `expected` are the operators that are left."""
    after, result = fold(proto, **options)  # type: ignore[arg-type]
    assert not result.refusals
    assert ops(after) == expected
    return after


BN = "y = BatchNormalization(c, g, b, m, v)"
IMAGE = "(float[N,4,7,6] x) => (float[N,C,H,W] y)"
CONV = {"w": weight(5, 4, 3, 3), **norm(5)}
BRANCH = (
    "then_branch = t () => (float[N,C,H,W] p) {{ {then} }}, "
    "else_branch = e () => (float[N,C,H,W] q) {{ {other} }}"
)
