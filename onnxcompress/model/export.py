"""Export a graph as a ModelProto: the original protos, with what the passes changed written over them.

envelope + nodes + initializers --export--> skeleton, tensors --with_values / with_inputs--> ModelProto
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import is_not

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import SparseValues

from onnxcompress.model import tensor_storage
from onnxcompress.model.envelope import replace, sync_values
from onnxcompress.model.origins import NodeOrigin, TensorOrigin, export_node, export_tensors

Exported = tuple[onnx.ModelProto, list[tensor_storage.Stored]]
"""A model without initializers, and its initializers, each with raw data where its proto lacks it."""
KeptExport = tuple[list[object], Exported]
"""An export, and the `graph_parts` that it was made of."""


def export(
    envelope: onnx.ModelProto,
    graph: gs.Graph,
    nodes: Mapping[int, NodeOrigin],
    tensors: list[TensorOrigin],
    sparse: Mapping[str, gs.Constant],
) -> Exported:
    """Export a graph; its weights stay where they are stored.

    Args:
        envelope: Everything of the file but the nodes and initializers of the main graph.
        graph: The graph as the passes left it.
        nodes: Origins of the file's nodes, by id of the node.
        tensors: Origins of the file's initializers, in its order.
        sparse: Sparse initializers that the main graph's nodes read, by name.

    Returns:
        The model without initializers, and its initializers.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(envelope)
    proto.graph.node.extend(export_node(node, nodes.get(id(node))) for node in graph.nodes)
    kept = [s for s in proto.graph.sparse_initializer if _is_kept(sparse.get(s.values.name), graph)]
    replace(proto.graph.sparse_initializer, kept)
    stored = export_tensors(graph, tensors)
    sync_values(proto, graph, {tensor.name for tensor, _ in stored})
    if proto.ir_version < 4:  # IR 3: an initializer must be listed as an input, too
        listed = {i.name for i in proto.graph.input}
        proto.graph.input.extend(
            onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
            for t, _ in stored
            if t.name not in listed
        )
    return proto, stored


def graph_parts(graph: gs.Graph) -> list[object]:
    """List the objects that an export is made of: while all are the same, so is the export.

    A change inside an array or an attribute's list does not show.

    Args:
        graph: The graph.

    Returns:
        Nodes, their operators, attributes and tensors, with names, types, shapes and constants' values.
    """
    parts: list[object] = []
    for tensor in (*graph.inputs, *graph.outputs):
        parts += (tensor, tensor.name, tensor.dtype, tensor.shape)
    for node in graph.nodes:
        parts += (node, node.op, node.name, node.domain, *node.attrs, *node.attrs.values())
        for tensor in (*node.inputs, *node.outputs):
            parts += (tensor, tensor.name)
            parts += (tensor._values,) if isinstance(tensor, gs.Constant) else (tensor.dtype, tensor.shape)
    return parts


def current(kept: KeptExport | None, graph: gs.Graph, make: Callable[[], Exported]) -> KeptExport:
    """Return the export of a graph as it is now.

    Args:
        kept: An earlier export, if there is one.
        graph: The graph.
        make: Exports the graph.

    Returns:
        The kept export where the graph is still made of the same objects, else a new one.
    """
    parts = graph_parts(graph)
    if kept is None or len(kept[0]) != len(parts) or any(map(is_not, kept[0], parts)):
        return parts, make()
    return kept


def copy_exported(exported: Exported, metadata: Iterable[onnx.StringStringEntryProto]) -> Exported:
    """Copy an exported graph, for one who changes it.

    Args:
        exported: The graph; its weights are shared.
        metadata: The metadata_props of the copy.

    Returns:
        The copy.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(exported[0])
    replace(proto.metadata_props, list(metadata))
    tensors = []
    for tensor, values in exported[1]:
        tensors.append((onnx.TensorProto(), values))
        tensors[-1][0].CopyFrom(tensor)
    return proto, tensors


def _is_kept(constant: gs.Constant | None, graph: gs.Graph) -> bool:
    """Whether a sparse initializer is still used, and no pass replaced its values."""
    if constant is None:  # only bodies of If, Loop or Scan read it
        return True
    used = bool(constant.outputs) or any(constant is output for output in graph.outputs)
    return used and isinstance(constant._values, SparseValues)


def with_values(proto: onnx.ModelProto, tensors: list[tensor_storage.Stored]) -> onnx.ModelProto:
    """Add the initializers with all their values.

    Args:
        proto: The model without initializers; it is changed.
        tensors: The initializers.

    Returns:
        `proto`.
    """
    for tensor, values in tensors:
        if values is not None:
            tensor.raw_data = tensor_storage.raw_bytes(values)
        proto.graph.initializer.append(tensor)
    return proto


def with_inputs(proto: onnx.ModelProto, tensors: list[tensor_storage.Stored]) -> onnx.ModelProto:
    """Add the small initializers, and declare the large ones as graph inputs.

    Args:
        proto: The model without initializers; it is changed.
        tensors: The initializers; those with raw data of their own are large.

    Returns:
        `proto`.
    """
    listed = {i.name for i in proto.graph.input}
    for tensor, values in tensors:
        if values is None:
            proto.graph.initializer.append(tensor)
        elif tensor.name not in listed:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return proto
