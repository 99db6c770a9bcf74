"""Queries and edits on a graphsurgeon graph that the passes share.

A tensor's consumers include nodes inside the bodies of If, Loop and Scan that capture it: an edit that
looks at consumers is therefore safe for subgraphs, too. Bodies themselves are never edited.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnxcompress.model import Model

NAMED = 8
"""Nodes that a message names, before it counts."""
DEFAULT_DOMAINS = (None, "", "ai.onnx")
MAX_FOLDED = 1 << 16
"""Elements from which on the result of a constant chain is not computed: it is no shape chain."""
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
"""Operators that are evaluated: deterministic ones, without loops over what a file says."""
SHRINKING = frozenset({"Compress", "NonZero"})
"""Those of them whose output has a size that depends on values: at most rank times the input's."""


def is_op(node: gs.Node | None, *ops: str) -> TypeGuard[gs.Node]:
    """Whether the node is one of these operators of the default domain."""
    return node is not None and node.op in ops and node.domain in DEFAULT_DOMAINS


def node_label(node: gs.Node) -> str:
    """The node's name; where it has none, that of its first output."""
    return str(node.name or next((t.name for t in node.outputs if t.name), node.op))


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes the tensor; None for inputs and initializers."""
    return tensor.inputs[0] if tensor.inputs else None


def consumers(tensor: gs.Tensor) -> list[gs.Node]:
    """Nodes that read the tensor, each once, those inside subgraphs included."""
    seen: dict[int, gs.Node] = {id(node): node for node in tensor.outputs}
    return list(seen.values())


def is_output(model: Model, tensor: gs.Tensor) -> bool:
    return any(tensor is output for output in model.graph_outputs)


def only_consumer(model: Model, tensor: gs.Tensor) -> gs.Node | None:
    """The one node that reads the tensor, where nothing else sees it."""
    readers = list(tensor.outputs)
    return readers[0] if len(readers) == 1 and not is_output(model, tensor) else None


def reader_names(tensor: gs.Tensor, *but: gs.Node | None) -> str:
    """Who reads the tensor, for a message: some by name, many counted."""
    some = [n for n in tensor.outputs[: NAMED + len(but)] if all(n is not one for one in but)]
    more = len(tensor.outputs) - NAMED - len(but)
    return ", ".join(sorted({node_label(n) for n in some})) + (f" and {more} more" if more > 0 else "")


def value_readers(tensor: gs.Tensor) -> list[gs.Node]:
    """Nodes that read more of the tensor than its shape; twice where they read it twice."""
    return [node for node in tensor.outputs if not is_op(node, "Shape", "Size")]


def read(tensor: gs.Constant) -> np.ndarray:
    """Values of an initializer, without keeping them in memory if they lie in a file."""
    values = tensor._values
    return np.asarray(values.load() if isinstance(values, LazyValues) else values)


def constant_value(model: Model, tensor: gs.Tensor) -> np.ndarray | None:
    """The value of a tensor that no input reaches, else None.

    Looks through Constant, Identity, Cast and any chain of deterministic operators on constants, as
    torch's exporters leave them for pads and slices. An initializer that is also a graph input (IR 3)
    counts as a constant: overriding weights at run time is not supported.
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


def _operands(node: gs.Node) -> list[gs.Tensor]:
    """What the node computes from that is computed itself; only the first of those whose type it takes."""
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
    """What a Shape node gives for an initializer (`start` and `end` as in a Python slice)."""
    part = slice(node.attrs.get("start", 0), node.attrs.get("end"))
    return np.array(list(node.inputs[0].shape)[part], np.int64)


def _cast_like(value: np.ndarray | None, kind: Any) -> np.ndarray | None:
    """`kind`: a numpy type, a TensorProto.DataType, or None where it is not known."""
    if value is None or kind is None:
        return None
    return value.astype(onnx.helper.tensor_dtype_to_np_dtype(kind) if isinstance(kind, int) else kind)


def constant_attribute(node: gs.Node) -> np.ndarray | None:
    """The value of a Constant node, whichever attribute holds it."""
    for key, value in node.attrs.items():
        if key == "value":
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
    """Whether shape inference knows how large the output is: a few bytes can ask for terabytes."""
    info = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph.output[0].type.tensor_type
    sizes = [d.dim_value if d.HasField("dim_value") else MAX_FOLDED + 1 for d in info.shape.dim]
    return info.HasField("shape") and 0 <= math.prod(sizes) <= MAX_FOLDED


def attribute(node: gs.Node, key: str, default: Any = None) -> Any:
    return node.attrs.get(key, default)


def input_at(node: gs.Node, index: int) -> gs.Tensor | None:
    """The input at an index; None where it is left out."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def set_input(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Set an input, filling the optional ones before it with empty tensors."""
    while len(node.inputs) <= index:
        node.inputs.append(gs.Variable.empty())
    node.inputs[index] = tensor


def unique_name(model: Model, base: str) -> str:
    """`base`, or `base_1`, … : a name that no tensor of the model or its subgraphs has."""
    name, number = base, 0
    while name in model.names:
        number += 1
        name = f"{base}_{number}"
    model.names.add(name)
    return name


def set_values(tensor: gs.Constant, values: np.ndarray) -> None:
    """Replace an initializer's values; shape and type may change."""
    tensor._values = values


def set_constant(model: Model, node: gs.Node, index: int, values: np.ndarray, base: str) -> None:
    """Give the node these values as an input, and remove what nothing reads any more.

    In place where there is an initializer of that shape and type whose values only this node reads, else
    as a new initializer named after `base`.
    """
    old = input_at(node, index)
    if isinstance(old, gs.Constant) and _is_own(model, old) and _alike(old, values):
        set_values(old, values)
        return
    set_input(node, index, gs.Constant(unique_name(model, base), values))
    if old is not None:
        remove_unread(model, [old])


def _is_own(model: Model, constant: gs.Constant) -> bool:
    return len(value_readers(constant)) == 1 and not is_output(model, constant)


def _alike(constant: gs.Constant, values: np.ndarray) -> bool:
    """Whether a dense initializer has the shape and the type of `values`."""
    stored = constant._values
    if isinstance(stored, SparseValues) or tuple(constant.shape) != values.shape:
        return False
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    if isinstance(stored, LazyValues):
        return bool(stored.tensor.data_type == kind)
    return bool(stored.dtype == values.dtype)


def lift_weights(model: Model, *ops: str) -> None:
    """Make initializers, of the same names, of the Constant nodes that hold weights of these operators."""
    for node in list(model.graph.nodes):
        for tensor in node.inputs[1:] if is_op(node, *ops) else ():
            source = producer(tensor)
            value = constant_attribute(source) if is_op(source, "Constant") else None
            if value is not None and source is not None and not is_output(model, tensor):
                replace_uses(model, tensor, gs.Constant(tensor.name, value))
                remove_nodes(model, [source])


def remove_unread(model: Model, tensors: Iterable[gs.Tensor]) -> None:
    """Remove the nodes that make these tensors, where nothing reads any of their outputs."""
    nodes = [producer(t) for t in tensors]
    remove_nodes(model, [n for n in nodes if n is not None and not _is_read(model, n)])


def _is_read(model: Model, node: gs.Node) -> bool:
    return any(t.outputs or is_output(model, t) for t in node.outputs)


def replace_uses(model: Model, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every consumer of `old` read `new`. `old` must not be a graph output."""
    for node in consumers(old):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def remove_nodes(model: Model, nodes: Iterable[gs.Node]) -> None:
    """Take nodes out of the graph, and what only they needed (constants' chains, dead producers)."""
    outputs = {id(t) for t in model.graph_outputs}
    gone: dict[int, gs.Node] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if id(node) in gone:
            continue
        gone[id(node)] = node
        sources = [t for t in node.inputs if not t.is_empty()]
        node.inputs.clear()
        for body in node.subgraphs(recursive=True):  # what they captured is no longer read
            for inner in body.nodes:
                sources += [t for t in inner.inputs if not t.is_empty()]
                inner.inputs.clear()
        node.outputs.clear()
        for tensor in sources:
            source = producer(tensor)
            if source is not None and not any(t.outputs or id(t) in outputs for t in source.outputs):
                pending.append(source)
    model.remove(gone.values())
