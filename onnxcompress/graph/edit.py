"""Edits of a graphsurgeon graph that the passes share. Bodies of If, Loop and Scan are never edited."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnxcompress.graph.constant_folding import constant_attribute
from onnxcompress.graph.query import consumers, input_at, is_op, is_output, producer, read, value_readers
from onnxcompress.model import Model


def set_input(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Set an input of a node, filling missing optional inputs before it with empty tensors.

    Args:
        node: The node.
        index: Position of the input.
        tensor: The new input.
    """
    while len(node.inputs) <= index:
        node.inputs.append(gs.Variable.empty())
    node.inputs[index] = tensor


def unique_name(model: Model, base: str) -> str:
    """Choose a name that no tensor of the model or its subgraphs has, and reserve it.

    Args:
        model: The model.
        base: The name to use if it is free.

    Returns:
        `base`, or `base_1`, `base_2`, ….
    """
    name, number = base, 0
    while name in model.names:
        number += 1
        name = f"{base}_{number}"
    model.names.add(name)
    return name


def set_values(tensor: gs.Constant, values: np.ndarray) -> None:
    """Replace an initializer's values; shape and type may change.

    Args:
        tensor: The initializer.
        values: The new values.
    """
    tensor._values = values


def set_constant(model: Model, node: gs.Node, index: int, values: np.ndarray, base: str) -> None:
    """Replace an input of a node by a constant, and remove nodes that nothing reads any more.

    An initializer of that shape and type whose values only this node reads is changed in place; otherwise
    the node gets a new one.

    Args:
        model: The model.
        node: The node.
        index: Position of the input.
        values: The new values.
        base: Name of a new initializer.
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
    """Return whether an initializer has the shape and the type of `values`."""
    stored = constant._values
    if tuple(constant.shape) != values.shape:
        return False
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    if isinstance(stored, SparseValues):
        return bool(stored.tensor.values.data_type == kind)
    if isinstance(stored, LazyValues):
        return bool(stored.tensor.data_type == kind)
    return bool(stored.dtype == values.dtype)


def lift_weights(model: Model, *ops: str) -> None:
    """Turn Constant nodes that hold parameters of these operators into initializers of the same name.

    Args:
        model: The model.
        *ops: Operators whose inputs behind the first one are looked at.
    """
    for node in list(model.graph.nodes):
        for tensor in node.inputs[1:] if is_op(node, *ops) else ():
            source = producer(tensor)
            value = constant_attribute(source) if is_op(source, "Constant") else None
            if value is not None and source is not None and not is_output(model, tensor):
                replace_uses(model, tensor, gs.Constant(tensor.name, value))
                remove_nodes(model, [source])


def remove_unread(model: Model, tensors: Iterable[gs.Tensor]) -> None:
    """Remove the producers of these tensors where nothing reads any of their outputs.

    Args:
        model: The model.
        tensors: The tensors.
    """
    nodes = [producer(t) for t in tensors]
    remove_nodes(model, [n for n in nodes if n is not None and not _is_read(model, n)])


def _is_read(model: Model, node: gs.Node) -> bool:
    return any(t.outputs or is_output(model, t) for t in node.outputs)


def replace_uses(model: Model, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every consumer of a tensor read another one.

    Args:
        model: The model.
        old: The tensor to replace; not a graph output.
        new: The tensor to read.
    """
    for node in consumers(old):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def remove_nodes(model: Model, nodes: Iterable[gs.Node]) -> None:
    """Remove nodes from the graph, and those that only they needed.

    Args:
        model: The model.
        nodes: Nodes whose outputs nothing reads any more.
    """
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


def make_dense(model: Model) -> None:
    """Replace the sparse initializers that nodes of the main graph read by dense ones.

    Args:
        model: The model to change.
    """
    for tensor in model.graph.tensors().values():
        if isinstance(tensor, gs.Constant) and isinstance(tensor._values, SparseValues):
            set_values(tensor, read(tensor))
            model.touch()
