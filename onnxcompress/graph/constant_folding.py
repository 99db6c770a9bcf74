"""Values of tensors that depend on no input: constants, and chains of deterministic operators on them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcompress.graph.query import DEFAULT_DOMAINS, is_op, producer, read
from onnxcompress.model import Model
from onnxcompress.model.sparse_tensors import VALUE

MAX_FOLDED = 1 << 16
"""Limit for the elements of a constant chain's operands and result: chains for shapes are small."""

EVALUATED = frozenset(
    {"Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Compress", "Concat", "Constant",
     "ConstantOfShape", "CumSum", "DequantizeLinear", "Div", "Equal", "Exp", "Expand", "Flatten", "Floor",
     "Gather", "GatherElements", "GatherND", "Gemm", "Greater", "GreaterOrEqual", "Identity", "Less",
     "LessOrEqual", "Log", "MatMul", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "NonZero", "Not", "Or",
     "Pad", "Pow", "QuantizeLinear", "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin",
     "ReduceProd", "ReduceSum", "Relu", "Reshape", "Round", "ScatterElements", "ScatterND", "Shape",
     "Sigmoid", "Sign",
     "Size", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose",
     "Trilu", "Unsqueeze", "Where", "Xor"}
)  # fmt: skip
"""Operators that are evaluated: deterministic ones, whose cost no value in the file can inflate."""

SHRINKING = frozenset({"Compress", "NonZero"})
"""Evaluated operators whose output size depends on values: at most the rank times the input's size."""


def constant_value(model: Model, tensor: gs.Tensor) -> np.ndarray | None:
    """Compute the value of a tensor that depends on no graph input.

    Looks through Constant, Identity, Cast and any chain of deterministic operators on constants, which
    torch's exporters leave for pads and slices. An initializer that is also a graph input (IR 3) counts as
    a constant: overriding weights at run time is not supported.

    Args:
        model: The model.
        tensor: The tensor.

    Returns:
        The value; None where it depends on an input, or is too large or not evaluated here.
    """
    if isinstance(tensor, gs.Constant):
        return read(tensor)
    known, entered = model.constants, set()
    pending = [tensor]
    while pending and tensor.name not in known:  # no recursion: chains may be longer than Python's stack
        current = pending[-1]
        node = producer(current)
        possible = node is not None and node.op in EVALUATED and current.name
        if node is not None and possible and current.name not in entered:
            entered.add(current.name)  # a cycle ends here
            pending += [t for t in _operands(node) if t.name not in known and t.name not in entered]
            continue
        pending.pop()
        if current.name not in known:
            known[current.name] = _evaluate(model, node, current) if node is not None and possible else None
    return known[tensor.name]


def scalar_value(model: Model, tensor: gs.Tensor) -> float | None:
    """Read a constant with one element, which broadcasts to anything.

    Args:
        model: The model.
        tensor: The tensor.

    Returns:
        Its value; None where it is no constant, or has another number of elements.
    """
    value = constant_value(model, tensor)
    return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None


def scalar_operand(model: Model, node: gs.Node) -> tuple[gs.Tensor, float] | None:
    """Tell a tensor from the number that a node of two inputs combines it with.

    Args:
        model: The model.
        node: The node, of an operator such as Add or Max.

    Returns:
        The tensor and the number; None where not exactly one of two inputs is a number.
    """
    values = [scalar_value(model, tensor) for tensor in node.inputs]
    if len(values) != 2 or sum(value is not None for value in values) != 1:
        return None
    return next((node.inputs[1 - at], value) for at, value in enumerate(values) if value is not None)


def _operands(node: gs.Node) -> list[gs.Tensor]:
    """List the computed inputs that a node's value depends on; of a CastLike only the first."""
    sources = node.inputs[:1] if is_op(node, "CastLike") else node.inputs
    return [t for t in sources if not t.is_empty() and not isinstance(t, gs.Constant)]


def _known(model: Model, tensor: gs.Tensor) -> np.ndarray | None:
    return read(tensor) if isinstance(tensor, gs.Constant) else model.constants.get(tensor.name)


def _evaluate(model: Model, node: gs.Node, tensor: gs.Tensor) -> np.ndarray | None:
    if is_op(node, "Constant"):
        return constant_attribute(node)
    if node.domain not in DEFAULT_DOMAINS or not node.inputs:
        return None
    if is_op(node, "Shape") and isinstance(node.inputs[0], gs.Constant):  # its values need not be read
        return _shape_of(node)
    if is_op(node, "CastLike"):
        return _cast_like(_known(model, node.inputs[0]), node.inputs[1].dtype)
    large = sum(math.prod(t.shape) for t in node.inputs if isinstance(t, gs.Constant)) > MAX_FOLDED
    if large and not is_op(node, "Identity"):
        return None
    values = []
    for source in node.inputs:
        value = None if source.is_empty() else _known(model, source)
        if value is None and not source.is_empty():
            return None
        values.append(value)
    if is_op(node, "Identity"):
        return values[0]
    if sum(v.size for v in values if v is not None) > MAX_FOLDED:
        return None
    return _run_reference(model, node, values, tensor.name)


def _shape_of(node: gs.Node) -> np.ndarray:
    """Evaluate a Shape node on an initializer (`start` and `end` as in a Python slice)."""
    part = slice(node.attrs.get("start", 0), node.attrs.get("end"))
    return np.array(list(node.inputs[0].shape)[part], np.int64)


def _cast_like(value: np.ndarray | None, kind: Any) -> np.ndarray | None:
    """Convert to `kind`: a numpy type, a TensorProto.DataType, or None where it is unknown."""
    if value is None or kind is None:
        return None
    return value.astype(onnx.helper.tensor_dtype_to_np_dtype(kind) if isinstance(kind, int) else kind)


def constant_attribute(node: gs.Node) -> np.ndarray | None:
    """Read the value of a Constant node, whichever attribute holds it.

    Args:
        node: A Constant node.

    Returns:
        The value; None where it is sparse or a string.
    """
    for key, value in node.attrs.items():
        if key in ("value", VALUE):
            return read(value)
        if key in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
        if key in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
    return None


def _run_reference(
    model: Model, node: gs.Node, values: list[np.ndarray | None], output: str
) -> np.ndarray | None:
    """Compute one node with onnx's reference implementation; None where it cannot."""
    from onnx.reference import ReferenceEvaluator

    feeds = {t.name: v for t, v in zip(node.inputs, values, strict=True) if v is not None}
    opset = onnx.helper.make_opsetid("", min(max(model.opset, 7), onnx.defs.onnx_opset_version()))
    try:
        graph = onnx.helper.make_graph(
            [model.node_proto(node)],
            "constant",
            [],
            [onnx.helper.make_empty_tensor_value_info(output)],
            [onnx.numpy_helper.from_array(v, n) for n, v in feeds.items()],
        )
        proto = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
        if not _is_small(proto) and node.op not in SHRINKING:
            return None
        (result,) = ReferenceEvaluator(proto).run([output], {})
    except Exception:  # the reference raises whatever numpy raises; unknown is a right answer
        return None
    return result if isinstance(result, np.ndarray) else None


def _is_small(proto: onnx.ModelProto) -> bool:
    """Return whether the output's inferred size is known and small: a few bytes can ask for terabytes."""
    info = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph.output[0].type.tensor_type
    sizes = [d.dim_value if d.HasField("dim_value") else MAX_FOLDED + 1 for d in info.shape.dim]
    return info.HasField("shape") and 0 <= math.prod(sizes) <= MAX_FOLDED
