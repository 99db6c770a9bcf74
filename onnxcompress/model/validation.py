"""Checks that every ONNX file must pass before a pass sees it: sizes agree, nodes match their operators.

A file may come from anywhere and claim anything. Passes rely on what is checked here, in time linear in
the size of the file:

    tensors   the type is one of ONNX's, no dimension is negative, and there are as many bytes or numbers as
              the shape needs: a few bytes cannot claim 100 GB (a sparse tensor may have DENSE bytes when
              written out)
    nodes     operators of ONNX's own domains have their required attributes and inputs, and attributes of
              the right types (operator schemas of the installed onnx)
    names     each tensor has one producer; whatever is read is an input, an initializer or the output of a
              node; there is no cycle

Does not handle: the values of attributes (shape inference and the passes check them), bodies of functions,
and operators of other domains, which no pass touches.
"""

from __future__ import annotations

import graphlib
import math
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from onnxcompress.errors import ModelError
from onnxcompress.model.envelope import attributes

DENSE = 1 << 31
"""Limit for the bytes of a sparse tensor when written out."""
DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
_BITS: dict[int, int] = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT4E2M1: 4} | {
    getattr(TensorProto, name): 2 for name in ("INT2", "UINT2") if hasattr(TensorProto, name)
}
_WIDE: dict[int, int] = {TensorProto.COMPLEX64: 2, TensorProto.COMPLEX128: 2}
"""Numbers that one element takes in a typed field; 1 for other types."""
_LAST_INT = 2**31 - 1


def check_tensor(tensor: onnx.TensorProto, where: str, length: int | None = None) -> None:
    """Check a tensor's type and shape, and that it has as much data as they need.

    Args:
        tensor: The tensor.
        where: The model's name, as it begins a message.
        length: Bytes of its raw data where they lie outside the proto.

    Raises:
        ModelError: The type is unknown, the shape invalid, or the amount of data wrong.
    """
    what = f"{where}: tensor {shown(tensor.name)}"
    kinds = TensorProto.DataType.values()
    if tensor.data_type == TensorProto.UNDEFINED or tensor.data_type not in kinds:
        raise ModelError(f"{what} has the unknown type {tensor.data_type}; export the model again")
    if any(d < 0 for d in tensor.dims):
        raise ModelError(f"{what} has a negative dimension: {list(tensor.dims)}")
    if tensor.HasField("segment"):
        raise ModelError(f"{what} is a segment of another; export it in one piece")
    count = math.prod(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        wanted, found, unit = count, len(tensor.string_data), "texts"
    elif length is not None or tensor.HasField("raw_data"):
        found = len(tensor.raw_data) if length is None else length
        wanted, unit = -(-count * bits(tensor.data_type) // 8), "bytes"
    else:
        found = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))
        wanted = count * _WIDE.get(tensor.data_type, 1)
        if tensor.data_type in _BITS:
            wanted = -(-count * _BITS[tensor.data_type] // 8)
        unit = "numbers"
    if found != wanted:
        shape = "x".join(map(str, tensor.dims)) or "scalar"
        raise ModelError(f"{what} of shape {shape} needs {wanted} {unit}, the file has {found}")


def bits(kind: int) -> int:
    """Look up the size of an element in raw data.

    Args:
        kind: A number of TensorProto.DataType.

    Returns:
        Bits of one element.
    """
    if kind in _BITS:
        return _BITS[kind]
    return int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize) * 8


def check_sparse(sparse: onnx.SparseTensorProto, where: str) -> None:
    """Check a sparse tensor's shape and indices, and its size when written out.

    Args:
        sparse: The sparse tensor.
        where: The model's name, as it begins a message.

    Raises:
        ModelError: It is not a valid sparse tensor, or would have more than DENSE bytes when written out.
    """
    name = shown(sparse.values.name)
    if any(d < 0 for d in sparse.dims) or sparse.indices.data_type != TensorProto.INT64:
        raise ModelError(f"{where}: sparse tensor {name} has no valid shape or indices")
    count, rank = math.prod(sparse.values.dims), len(sparse.dims)
    if list(sparse.indices.dims) not in ([count], [count, rank]):
        raise ModelError(f"{where}: sparse tensor {name} has {count} values and no index for each of them")
    if math.prod(sparse.dims) * bits(sparse.values.data_type) // 8 > DENSE:
        raise ModelError(f"{where}: sparse tensor {name} would have over {DENSE} bytes; store it dense")
    check_tensor(sparse.values, where)
    check_tensor(sparse.indices, where)
    at = onnx.numpy_helper.to_array(sparse.indices)
    ends = np.asarray(sparse.dims if at.ndim == 2 else math.prod(sparse.dims))
    if (at < 0).any() or (at >= ends).any():
        raise ModelError(f"{where}: sparse tensor {name} has an index outside its shape")


def check_graph(proto: onnx.ModelProto, where: str) -> None:
    """Check the nodes and names of the main graph and of all bodies.

    Args:
        proto: The model.
        where: The model's name, as it begins a message.

    Raises:
        ModelError: An operator set version, a node or a name is invalid, or the graph has a cycle.
    """
    versions = {o.domain: o.version for o in proto.opset_import}
    if any(version < 1 for version in versions.values()):
        raise ModelError(f"{where}: an operator set has a version below 1; export the model again")
    for node in _nodes(proto.graph):
        names = [node.op_type, node.domain, node.name, *node.input, *node.output]
        _check_text([*names, *(a.name for a in node.attribute)], where)
    _check_scope(proto.graph, frozenset(), where)
    for node in _nodes(proto.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        _check_attributes(node, where)
        if domain in DOMAINS:
            version = versions.get(domain, versions.get("ai.onnx", 1) if not domain else 1)
            schema = _schema(node.op_type, domain, min(version, _LAST_INT))
            if schema is not None:
                _check_node(node, schema, where)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    yield from graph.node
    for body in _bodies(graph):
        yield from body.node


def _bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Iterate over the bodies in a graph's nodes, and those nested inside them."""
    for attribute in attributes(graph):
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


@cache
def _schema(op: str, domain: str, version: int) -> Any:
    try:
        return onnx.defs.get_schema(op, version, domain)
    except onnx.defs.SchemaError:  # unknown: no pass has a rule for it
        return None


def _check_text(names: Iterable[object], where: str) -> None:
    """Check that names are text: protobuf gives bytes for a string that is not UTF-8."""
    for name in names:
        if isinstance(name, bytes):
            raise ModelError(f"{where}: the name {name[:60]!r} is not UTF-8 text; export the model again")


def _check_attributes(node: onnx.NodeProto, where: str) -> None:
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            rule = f"refers to {shown(attribute.ref_attr_name)}, which only functions may"
        elif attribute.type == AttributeProto.UNDEFINED or attribute.type not in _ATTRIBUTE_TYPES:
            rule = "has no type"
        else:
            continue
        raise ModelError(f"{where}: {_name(node)}: attribute {shown(attribute.name)} {rule}")


_ATTRIBUTE_TYPES = frozenset(AttributeProto.AttributeType.values())


def _check_node(node: onnx.NodeProto, schema: Any, where: str) -> None:
    """Check a node against its operator's schema."""
    given = {a.name: a for a in node.attribute}
    for name, declared in schema.attributes.items():
        kind = int(declared.type.value)
        if name in given and given[name].type != kind:
            found, wanted = map(AttributeProto.AttributeType.Name, (given[name].type, kind))
            raise ModelError(f"{where}: {_name(node)}: attribute {name!r} is {found}, expected {wanted}")
        if declared.required and name not in given:
            raise ModelError(f"{where}: {_name(node)}: its attribute {name!r} is missing")
    for what, names, low, high, formal in (
        ("input", node.input, schema.min_input, schema.max_input, schema.inputs),
        ("output", node.output, schema.min_output, schema.max_output, schema.outputs),
    ):
        if not low <= len(names) <= high:
            wanted = (
                str(low) if low == high else f"{low} to {high}" if high < _LAST_INT else f"{low} or more"
            )
            raise ModelError(f"{where}: {_name(node)} has {len(names)} {what}s, expected {wanted}")
        single = onnx.defs.OpSchema.FormalParameterOption.Single
        for at, (name, parameter) in enumerate(zip(names, formal, strict=False)):
            if not name and parameter.option == single:
                raise ModelError(f"{where}: {_name(node)}: its {what} {at} ({parameter.name}) is left out")


def _check_scope(graph: onnx.GraphProto, outer: frozenset[str], where: str) -> None:
    """Check that each tensor has one producer and that inputs exist; `outer`: names a body may read."""
    given = [i.name for i in graph.initializer] + [s.values.name for s in graph.sparse_initializer]
    made: set[str] = set()
    values = (*graph.input, *graph.output, *graph.value_info)
    _check_text([*given, *(v.name for v in values)], where)
    listed = {i.name for i in graph.input}
    for name in given:
        if name in made:
            raise ModelError(f"{where}: there are two initializers {shown(name)}")
        made.add(name)
    made |= listed
    if len(listed) < len(graph.input):
        raise ModelError(f"{where}: two inputs have the same name")
    for node in graph.node:
        for name in filter(None, node.output):
            if name in made:
                raise ModelError(f"{where}: {_name(node)} produces tensor {shown(name)} a second time")
            made.add(name)
    seen = outer | made
    for node in graph.node:
        for name in filter(None, node.input):
            if name not in seen:
                raise ModelError(f"{where}: {_name(node)} reads {shown(name)}, which no node produces")
        for body in node_bodies(node):
            _check_scope(body, seen, where)
    for output in graph.output:
        if output.name not in seen:
            raise ModelError(f"{where}: no node produces the output {shown(output.name)}")
    _check_order(graph, where)


def node_bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Iterate over the bodies of a node, without those inside them.

    Args:
        node: The node.

    Yields:
        The graphs in its attributes.
    """
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def node_reads(node: onnx.NodeProto) -> Iterator[str]:
    """Iterate over the names that a node reads, including what its bodies read from outside them.

    Args:
        node: The node.

    Yields:
        Names of tensors; one may come several times.
    """
    yield from filter(None, node.input)
    for body in node_bodies(node):
        own = {n for inner in body.node for n in inner.output} | {i.name for i in body.input}
        own |= {i.name for i in body.initializer}
        yield from (name for inner in body.node for name in node_reads(inner) if name not in own)


def _check_order(graph: onnx.GraphProto, where: str) -> None:
    """Check that the graph has no cycle. Nodes need not be sorted: some exporters do not sort them."""
    maker = {name: at for at, node in enumerate(graph.node) for name in node.output if name}
    waits: dict[int, Iterable[int]] = {}
    sorted_already = True
    for at, node in enumerate(graph.node):
        waits[at] = [maker[name] for name in node_reads(node) if name in maker]
        sorted_already &= all(before < at for before in waits[at])
    if sorted_already:
        return
    try:
        graphlib.TopologicalSorter(waits).prepare()
    except graphlib.CycleError as error:
        node = graph.node[error.args[1][0]]
        raise ModelError(f"{where}: the graph has a cycle through {_name(node)}") from error


def _name(node: onnx.NodeProto) -> str:
    name = node.name or next(iter(node.output), "")
    return f"node {shown(name)} ({shown(node.op_type)[1:-1]})"


def shown(name: str) -> str:
    """Quote a name from a file for a message.

    Args:
        name: Any text.

    Returns:
        At most 60 characters in quotes, control characters escaped.
    """
    return repr(name if len(name) <= 60 else name[:57] + "...")
