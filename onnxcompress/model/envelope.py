"""Keep a ModelProto's parts besides the main graph's nodes and initializers consistent with the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter


def attributes(graph: onnx.GraphProto) -> Iterator[onnx.AttributeProto]:
    """Iterate over the attributes of a graph's nodes, including those inside bodies of If, Loop and Scan.

    Args:
        graph: The graph to walk.

    Yields:
        Each attribute, outer ones before those in its bodies.
    """
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute
            if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                for body in (attribute.g, *attribute.graphs):
                    yield from attributes(body)


def nested_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Iterate over all tensors that are not dense initializers of the graph itself.

    Args:
        graph: The graph to walk.

    Yields:
        Tensors in attributes and in bodies, and the values and indices of sparse tensors.
    """
    for attribute in attributes(graph):
        if attribute.type == onnx.AttributeProto.TENSOR:
            yield attribute.t
        yield from attribute.tensors
        for body in (attribute.g, *attribute.graphs):
            yield from body.initializer
    for sparse in sparse_tensors(graph):
        yield from (sparse.values, sparse.indices)


def sparse_tensors(graph: onnx.GraphProto) -> Iterator[onnx.SparseTensorProto]:
    """Iterate over all sparse tensors: initializers of the graph and of bodies, and attributes.

    Args:
        graph: The graph to walk.

    Yields:
        Each sparse tensor.
    """
    yield from graph.sparse_initializer
    for attribute in attributes(graph):
        yield from attribute.sparse_tensors
        if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
            yield attribute.sparse_tensor
        for body in (attribute.g, *attribute.graphs):
            yield from body.sparse_initializer


def without_contents(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model without the nodes and initializers of its main graph.

    Args:
        proto: The model; it is not changed.

    Returns:
        A new ModelProto with everything else.
    """
    envelope = onnx.ModelProto()
    for field, value in proto.ListFields():
        if field.name == "graph":
            for inner, part in value.ListFields():
                if inner.name not in ("node", "initializer"):
                    _assign(envelope.graph, inner.name, part)
        else:
            _assign(envelope, field.name, value)
    return envelope


BATCHED_RANK = 4
"""Rank from which on the first dimension of an input or output is taken for a batch of images."""


def open_unset_sizes(graph: onnx.GraphProto) -> None:
    """Clear dimensions that exporters write as −1, or as a batch of 0 images, for lack of a symbol.

    Shape inference and onnxruntime would take these numbers literally. Other dimensions of 0 are those of
    empty tensors.

    Args:
        graph: The graph to change.
    """
    weights = {tensor.name for tensor in graph.initializer}
    for field in (graph.input, graph.output, graph.value_info):
        for info in field:
            if info.name in weights or not info.type.HasField("tensor_type"):
                continue
            dims = info.type.tensor_type.shape.dim
            for axis, dim in enumerate(dims):
                may_be_zero = field is graph.value_info or axis > 0 or len(dims) < BATCHED_RANK
                if dim.HasField("dim_value") and dim.dim_value < (0 if may_be_zero else 1):
                    dim.ClearField("dim_value")


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
    """Update the inputs, outputs and value infos of a ModelProto to match the graph, in the file's order.

    Args:
        proto: The model's envelope, changed in place.
        graph: The graph as the passes left it.
        initializers: Names of the initializers that will be written.
    """
    inputs = {t.name: t for t in graph.inputs}
    kept = [i for i in proto.graph.input if i.name in inputs or i.name in initializers]
    listed = {i.name for i in kept}
    kept += [_value_info(t) for n, t in inputs.items() if n not in listed]
    replace(proto.graph.input, kept)
    infos = {o.name: o for o in proto.graph.output}
    replace(proto.graph.output, [infos.get(t.name) or _value_info(t) for t in graph.outputs])
    alive = initializers | set(_names(graph)) | set(inputs)
    alive |= {sparse.values.name for sparse in proto.graph.sparse_initializer}
    for field in (proto.graph.value_info, proto.graph.quantization_annotation):
        key = "name" if field is proto.graph.value_info else "tensor_name"
        replace(field, [v for v in field if getattr(v, key) in alive])


def _value_info(tensor: gs.Tensor) -> onnx.ValueInfoProto:
    info: onnx.ValueInfoProto = OnnxExporter.export_value_info_proto(tensor, False)
    return info


def replace(field: Any, messages: list[Any]) -> None:
    """Set a repeated field of a message.

    Args:
        field: The field to change.
        messages: Its new elements, which may be some of its own.
    """
    if len(messages) == len(field) and all(a is b for a, b in zip(field, messages, strict=True)):
        return
    copies = [type(m).FromString(m.SerializeToString()) for m in messages]
    del field[:]
    field.extend(copies)
