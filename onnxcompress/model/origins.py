"""Original protos of nodes and initializers: the export starts from them and writes what passes changed.

graphsurgeon's round trip drops doc strings, metadata_props and attributes of types that it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnxcompress.model import tensor_storage


@dataclass
class NodeOrigin:
    """A node of the main graph with its original proto and attributes."""

    node: gs.Node  # kept alive, so that no other object gets its id
    proto: onnx.NodeProto
    attrs: dict[str, Any]


@dataclass
class TensorOrigin:
    """An initializer with its original proto and values."""

    constant: gs.Constant
    proto: onnx.TensorProto
    values: LazyValues
    used: bool
    """Whether the main graph read it."""


def node_origins(graph: gs.Graph, proto: onnx.ModelProto) -> dict[int, NodeOrigin]:
    """Pair each node of the main graph with its original proto.

    Args:
        graph: The graph that `import_graph` returned for `proto`, unchanged.
        proto: The model.

    Returns:
        Origins by id of the node.
    """
    return {
        id(node): NodeOrigin(
            node,
            original,
            {k: list(v) if isinstance(v, list) else v for k, v in node.attrs.items()},
        )
        for node, original in zip(graph.nodes, proto.graph.node, strict=True)
    }


def tensor_names(graph: gs.Graph, origins: list[TensorOrigin]) -> set[str]:
    """Collect the names of tensors that a graph has, or had when it was read.

    Args:
        graph: The main graph.
        origins: Origins of the file's initializers.

    Returns:
        The names, those inside bodies included.
    """
    names = set(graph.tensors()) | {t.name for t in graph.inputs}
    names |= {origin.constant.name for origin in origins}
    return names.union(*(body.tensors() for body in graph.subgraphs(recursive=True)))


def tensor_origins(
    graph: gs.Graph, proto: onnx.ModelProto, stored: dict[int, LazyValues | np.ndarray]
) -> list[TensorOrigin]:
    """Pair each initializer with its original proto and values.

    Args:
        graph: The graph that `import_graph` returned for `proto`; its constants get the stored values.
        proto: The model.
        stored: Values by index of the initializer, for those whose data is not in `proto`.

    Returns:
        Origins in the file's order.
    """
    by_name = graph.tensors()
    origins = []
    for index, tensor in enumerate(proto.graph.initializer):
        constant = by_name.get(tensor.name)
        if not isinstance(constant, gs.Constant):  # nothing in the main graph reads it
            constant = _captured(graph, tensor.name) or gs.Constant(tensor.name, LazyValues(tensor))
        values = stored.get(index, constant._values)
        constant._values = values
        constant.data_location = None
        origins.append(TensorOrigin(constant, tensor, values, bool(constant.outputs)))
    return origins


def sparse_origins(graph: gs.Graph) -> dict[str, gs.Constant]:
    """Find the sparse initializers that nodes of the main graph read.

    Args:
        graph: The graph.

    Returns:
        Constants by name.
    """
    return {
        tensor.name: tensor
        for node in graph.nodes
        for tensor in node.inputs
        if isinstance(tensor, gs.Constant) and isinstance(tensor._values, SparseValues)
    }


def export_node(node: gs.Node, origin: NodeOrigin | None) -> onnx.NodeProto:
    """Write a node as a proto, with everything of the original that no pass changed.

    Args:
        node: The node as it is now.
        origin: Its origin; None for a node that a pass added.

    Returns:
        A new NodeProto.
    """
    if origin is None:
        new: onnx.NodeProto = OnnxExporter.export_node(node)
        return new
    proto = onnx.NodeProto()
    proto.CopyFrom(origin.proto)
    if (proto.op_type, proto.name) != (node.op, node.name):  # setting an absent name makes it present
        proto.op_type, proto.name = node.op, node.name
    for field, tensors in ((proto.input, node.inputs), (proto.output, node.outputs)):
        names = [t.name for t in tensors]
        if list(field) != names:
            del field[:]
            field.extend(names)
    for key in [a.name for a in proto.attribute]:
        if key in origin.attrs and key not in node.attrs:
            _drop_attribute(proto, key)
    for key, value in node.attrs.items():
        if key not in origin.attrs or not _same(value, origin.attrs[key]):
            _drop_attribute(proto, key)
            proto.attribute.extend(OnnxExporter.export_attributes({key: value}))
    return proto


def export_tensors(graph: gs.Graph, origins: list[TensorOrigin]) -> list[tensor_storage.Stored]:
    """Write the initializers that are still used as protos, those that passes added behind the file's own.

    Args:
        graph: The graph as the passes left it.
        origins: Origins of the file's initializers, in its order.

    Returns:
        TensorProtos, each with its raw data where that is not in the proto.
    """
    outputs = {t.name for t in graph.outputs}
    known: set[str] = set()
    tensors: list[tensor_storage.Stored] = []
    for origin in origins:
        constant = origin.constant
        known.add(constant.name)
        if constant.outputs or not origin.used or constant.name in outputs:
            tensors.append(tensor_storage.export(constant, origin.proto, origin.values))
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.name not in known:
                known.add(tensor.name)
                if not isinstance(tensor._values, SparseValues):
                    tensors.append(tensor_storage.export(tensor, None, None))
    return tensors


def _captured(graph: gs.Graph, name: str) -> gs.Constant | None:
    """Find the constant of that name that only bodies of If, Loop or Scan read."""
    for subgraph in graph.subgraphs(recursive=True):
        for node in subgraph.nodes:
            for tensor in node.inputs:
                if tensor.name == name and isinstance(tensor, gs.Constant):
                    return tensor
    return None


def _drop_attribute(proto: onnx.NodeProto, key: str) -> None:
    for at in [i for i, a in enumerate(proto.attribute) if a.name == key][::-1]:
        del proto.attribute[at]


def _same(value: Any, before: Any) -> bool:
    if isinstance(value, gs.Tensor | gs.Graph):
        return value is before
    return type(value) is type(before) and bool(value == before)
