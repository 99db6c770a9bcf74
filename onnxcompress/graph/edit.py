"""Edits of a graphsurgeon graph that the passes share. Bodies of If, Loop and Scan are never edited."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnxcompress.graph.constant_folding import constant_attribute
from onnxcompress.graph.query import consumers, input_at, is_op, is_output, producer, value_readers
from onnxcompress.model import Model


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
