"""What a model's file holds beside nodes and initializers, kept in step with the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter


def attributes(graph: onnx.GraphProto) -> Iterator[onnx.AttributeProto]:
    """All attributes of the graph's nodes, and of those in the bodies inside it."""
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute
            if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                for body in (attribute.g, *attribute.graphs):
                    yield from attributes(body)


def nested_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All tensors that are not dense initializers of this graph: in attributes, bodies, sparse tensors."""
    for attribute in attributes(graph):
        if attribute.type == onnx.AttributeProto.TENSOR:
            yield attribute.t
        yield from attribute.tensors
        for body in (attribute.g, *attribute.graphs):
            yield from body.initializer
    for sparse in sparse_tensors(graph):
        yield from (sparse.values, sparse.indices)


def sparse_tensors(graph: onnx.GraphProto) -> Iterator[onnx.SparseTensorProto]:
    """All sparse tensors: initializers of the graph and of bodies, attributes."""
    yield from graph.sparse_initializer
    for attribute in attributes(graph):
        yield from attribute.sparse_tensors
        if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
            yield attribute.sparse_tensor
        for body in (attribute.g, *attribute.graphs):
            yield from body.sparse_initializer


def without_contents(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A shallow envelope: everything but the main graph's nodes and initializers."""
    envelope = onnx.ModelProto()
    for field, value in proto.ListFields():
        if field.name == "graph":
            for inner, part in value.ListFields():
                if inner.name not in ("node", "initializer"):
                    _assign(envelope.graph, inner.name, part)
        else:
            _assign(envelope, field.name, value)
    return envelope


def _assign(message: Any, name: str, value: Any) -> None:
    target = getattr(message, name)
    if hasattr(target, "extend"):
        target.extend(value)
    elif hasattr(target, "CopyFrom"):
        target.CopyFrom(value)
    else:
        setattr(message, name, value)


def _names(graph: gs.Graph) -> Iterator[str]:
    for node in graph.nodes:
        for tensor in node.outputs:
            yield tensor.name


def sync_values(proto: onnx.ModelProto, graph: gs.Graph, initializers: set[str]) -> None:
    """Make inputs, outputs and value infos of the envelope agree with the graph, in their order."""
    inputs = {t.name: t for t in graph.inputs}
    kept = [i for i in proto.graph.input if i.name in inputs or i.name in initializers]
    listed = {i.name for i in kept}
    kept += [_value_info(t) for n, t in inputs.items() if n not in listed]
    _replace(proto.graph.input, kept)
    infos = {o.name: o for o in proto.graph.output}
    _replace(proto.graph.output, [infos.get(t.name) or _value_info(t) for t in graph.outputs])
    alive = initializers | set(_names(graph)) | set(inputs)
    alive |= {sparse.values.name for sparse in proto.graph.sparse_initializer}
    for field in (proto.graph.value_info, proto.graph.quantization_annotation):
        key = "name" if field is proto.graph.value_info else "tensor_name"
        _replace(field, [v for v in field if getattr(v, key) in alive])


def _value_info(tensor: gs.Tensor) -> onnx.ValueInfoProto:
    info: onnx.ValueInfoProto = OnnxExporter.export_value_info_proto(tensor, False)
    return info


def _replace(field: Any, messages: list[Any]) -> None:
    if len(messages) == len(field) and all(a is b for a, b in zip(field, messages, strict=True)):
        return
    copies = [type(m).FromString(m.SerializeToString()) for m in messages]
    del field[:]
    field.extend(copies)
