"""What each node and initializer was in the file: the export starts from it and writes what passes changed.

graphsurgeon's round trip drops doc strings, metadata_props and attributes of types that it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues


@dataclass
class NodeOrigin:
    """A node of the main graph, and what it was."""

    node: gs.Node  # held so that id(node) stays its own
    proto: onnx.NodeProto
    attrs: dict[str, Any]


@dataclass
class TensorOrigin:
    """An initializer, and what it was."""

    constant: gs.Constant
    proto: onnx.TensorProto
    values: LazyValues
    used: bool
    """Whether the main graph read it."""


def node_origins(graph: gs.Graph, proto: onnx.ModelProto) -> dict[int, NodeOrigin]:
    """By id of the node. graph: what `import_graph` made of `proto`, unchanged."""
    return {
        id(node): NodeOrigin(
            node,
            original,
            {k: list(v) if isinstance(v, list) else v for k, v in node.attrs.items()},
        )
        for node, original in zip(graph.nodes, proto.graph.node, strict=True)
    }


def tensor_origins(
    graph: gs.Graph, proto: onnx.ModelProto, stored: dict[int, LazyValues | np.ndarray]
) -> list[TensorOrigin]:
    """In the file's order. stored: values by index of the initializer; they become the constants' own."""
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


def export_node(node: gs.Node, origin: NodeOrigin | None) -> onnx.NodeProto:
    """What the file held of the node, and what a pass changed of it. origin: None where a pass made it."""
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


def _captured(graph: gs.Graph, name: str) -> gs.Constant | None:
    """The constant of that name which only the bodies of If, Loop or Scan read."""
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
