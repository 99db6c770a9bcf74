"""Which nodes of a graph can be computed in float16, and which of their tensors would be.

A node can where its operator's schema takes float16 for its float32 outputs, and the converter
(`onnxruntime.transformers.float16`) does not leave it alone as having no kernel. Inputs that the schema
fixes to float32 (the scales of Resize) stay; where the converter does not know of such an input, the node
does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import onnx

from onnxcompress.graph.query import DEFAULT_DOMAINS

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


@dataclass(frozen=True)
class Candidate:
    """A node that can be computed in float16."""

    index: int
    """Of the node in the graph."""
    name: str
    """Its own, or where it has none that of its first output."""
    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    """Places of the tensors that would be float16."""


@cache
def converter() -> ModuleType:
    """onnxruntime's own float16 converter, whose package would leave its folder on sys.path."""
    path = list(sys.path)
    try:
        from onnxruntime.transformers import float16
    finally:
        sys.path[:] = path
    found: ModuleType = float16
    return found


def candidates(proto: onnx.ModelProto) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """The nodes that can, and (name, why not) of those that compute float32 and cannot."""
    types = element_types(proto)
    opset = max((o.version for o in proto.opset_import if o.domain in DEFAULT_DOMAINS), default=1)
    can: list[Candidate] = []
    cannot: list[tuple[str, str]] = []
    for index, node in enumerate(proto.graph.node):
        if not any(types.get(name) == FLOAT for name in node.output):
            continue
        name = node.name or node.output[0]
        why = _refusal(node, opset)
        if why:
            cannot.append((name, why))
            continue
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        inputs = _halvable(schema.inputs, node.input, types)
        fixed = [i for i, n in enumerate(node.input) if types.get(n) == FLOAT and i not in inputs]
        outputs = _halvable(schema.outputs, node.output, types)
        known = converter().ALWAYS_FLOAT_INPUTS.get(node.op_type, [])
        if not outputs or not set(fixed) <= set(known):
            cannot.append((name, f"{node.op_type} has no float16 form in opset {opset}"))
        else:
            can.append(Candidate(index, name, node.op_type, inputs, outputs))
    return can, cannot


def element_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Tensor -> element type, of all tensors of the main graph whose type can be inferred."""
    graph = onnx.shape_inference.infer_shapes(proto).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    return types | {t.name: t.data_type for t in graph.initializer}


def has_bodies(proto: onnx.ModelProto) -> bool:
    """Whether there are bodies of If, Loop or Scan, or functions: the converter is not safe there."""
    kinds = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    return bool(proto.functions) or any(a.type in kinds for n in proto.graph.node for a in n.attribute)


def _refusal(node: onnx.NodeProto, opset: int) -> str:
    if node.domain not in DEFAULT_DOMAINS:
        return f"{node.op_type} is of the domain {node.domain}"
    if node.op_type in converter().DEFAULT_OP_BLOCK_LIST:
        return f"onnxruntime's converter leaves {node.op_type} in float32: not every device has a kernel"
    if not onnx.defs.has(node.op_type, opset, ""):
        return f"{node.op_type} is not known in opset {opset}"
    return ""


def _halvable(
    formal: Sequence[onnx.defs.OpSchema.FormalParameter], names: Sequence[str], types: dict[str, int]
) -> tuple[int, ...]:
    """Places of float32 tensors that may be float16 instead. The last parameter may be variadic."""
    return tuple(
        i
        for i, name in enumerate(names)
        if types.get(name) == FLOAT and "tensor(float16)" in formal[min(i, len(formal) - 1)].types
    )
