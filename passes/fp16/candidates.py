"""Which nodes of a graph can be computed in float16, and which of their tensors would be.

A node can where its operator's schema takes float16 for its float32 outputs, all types of its inputs are
known, and onnxruntime's converter (`onnxruntime.transformers.float16`) does not leave it alone as having no
kernel. Inputs that the schema fixes to float32 (the scales of Resize) stay. A Constant is no candidate: its
value is stored in the type that its readers want.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import onnx

from onnxcompress.errors import RuntimeUnavailable
from onnxcompress.graph.node_selection import EVERY_NODE, NodeSelection
from onnxcompress.graph.query import DEFAULT_DOMAINS
from onnxcompress.model.validation import node_bodies, node_reads
from onnxcompress.passes.several_inputs import PREFIX

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16

SHAPED = (
    "Expand", "Gather", "GatherElements", "GatherND", "Pad", "Reshape", "Resize", "Slice", "Split",
    "Squeeze", "Tile", "TopK", "Trilu", "Unsqueeze", "Upsample",
)  # fmt: skip
"""Operators whose first input has the values, and the others places or the shape."""
SIZES = "it computes with sizes of tensors, which at another size float16 may not hold"
FUSED = "onnxruntime joins it to the MatMul behind it, and has no float16 kernel for both on the CPU"

FIXED = frozenset({"BitCast", "MeanVarianceNormalization"})
"""Operators whose definition has a type: an attribute that counts bits, or a constant in a function."""
TYPES = frozenset({"dtype", "output_datatype"})
"""Attributes with the type of what an operator makes from no floats: of EyeLike, HannWindow, …."""


@dataclass(frozen=True)
class Candidate:
    """A node that can be computed in float16."""

    index: int
    """Place of the node in the graph."""
    name: str
    """Name of the node, or of its first output where it has none."""
    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    """Places of the tensors that would be float16."""


@cache
def blocked_operators() -> frozenset[str]:
    """Read the operators without float16 kernels from onnxruntime's own converter.

    The converter's file is loaded by itself: its package puts a folder on `sys.path` when it is imported,
    once, and `onnxruntime.quantization` needs to find it there.

    Returns:
        Operator types.

    Raises:
        RuntimeUnavailable: This version of onnxruntime has no such file.
    """
    package = find_spec("onnxruntime")
    folders = list(package.submodule_search_locations or ()) if package is not None else []
    file = next((f for d in folders if (f := Path(d, "transformers", "float16.py")).is_file()), None)
    spec = None if file is None else spec_from_file_location("_onnxruntime_float16", file)
    if spec is None or spec.loader is None:
        raise RuntimeUnavailable("this onnxruntime has no float16 converter; install another version of it")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return frozenset(module.DEFAULT_OP_BLOCK_LIST)


def candidates(
    proto: onnx.ModelProto, selection: NodeSelection = EVERY_NODE
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """Find the nodes that can be computed in float16.

    Args:
        proto: The float32 model.
        selection: The nodes that may be converted.

    Returns:
        The nodes, and (name, reason) of those that compute float32 and cannot be converted.

    Raises:
        OptionError: Nodes could be converted, and the patterns leave none.
    """
    types = element_types(proto)
    opset = max((o.version for o in proto.opset_import if o.domain in DEFAULT_DOMAINS), default=1)
    dequantized = {n.output[0] for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    fused, sizes = _fused_transposes(proto), _sizes(proto, types)
    can: list[Candidate] = []
    cannot: list[tuple[str, str]] = []
    for index, node in enumerate(proto.graph.node):
        if node.op_type == "Constant" or not any(types.get(name) == FLOAT for name in _computed(node)):
            continue
        name = node.name or node.output[0]
        why = (
            selection.refusal(name, node.op_type)
            or _refusal(node, opset, dequantized)
            or _unknown(node, types)
            or (FUSED if node.output[0] in fused else "")
        )
        if why:
            cannot.append((name, why))
            continue
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        inputs = _halvable(schema.inputs, node.input, types)
        outputs = _halvable(schema.outputs, node.output, types)
        if not sizes.isdisjoint((*(node.input[i] for i in inputs), *node.output)):
            cannot.append((name, SIZES))
        elif not outputs and not quantizes(node):
            cannot.append((name, f"{node.op_type} has no float16 form in opset {opset}"))
        else:
            can.append(Candidate(index, name, node.op_type, inputs, outputs))
    selection.check_taken(len(can), lambda: len(candidates(proto)[0]), "computed in float16")
    return can, cannot


def _computed(node: onnx.NodeProto) -> Sequence[str]:
    """Return the tensors that are floats where a node computes with floats: of QuantizeLinear its input."""
    return node.input[:1] if quantizes(node) else node.output


def quantizes(node: onnx.NodeProto) -> bool:
    """Return whether a node is ONNX's QuantizeLinear, which gives integers.

    Args:
        node: The node.

    Returns:
        Whether it is.
    """
    return node.op_type == "QuantizeLinear" and node.domain in DEFAULT_DOMAINS


def element_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Infer the element types of the tensors of the main graph.

    Args:
        proto: The model.

    Returns:
        Name of the tensor -> element type, where it can be inferred.
    """
    graph = onnx.shape_inference.infer_shapes(proto).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    types = {name: kind for name, kind in types.items() if kind}
    return types | {t.name: t.data_type for t in graph.initializer}


def captured(proto: onnx.ModelProto) -> frozenset[str]:
    """Find the names that bodies of If, Loop and Scan read; they mean the same type as before there.

    Args:
        proto: The model.

    Returns:
        Names of tensors, those inside the bodies included.
    """
    return frozenset(
        name
        for node in proto.graph.node
        for body in node_bodies(node)
        for inner in body.node
        for name in (*node_reads(inner), *(output.name for output in body.output))
    )


def _refusal(node: onnx.NodeProto, opset: int, dequantized: Collection[str]) -> str:
    if node.name.startswith(PREFIX):
        return "it makes an input of the network"
    if any(node_bodies(node)):
        return f"the bodies of {node.op_type} stay as they are"
    if node.domain not in DEFAULT_DOMAINS:
        return f"{node.op_type} is of the domain {node.domain}"
    if node.op_type in blocked_operators():
        return f"onnxruntime's converter leaves {node.op_type} in float32: not every device has a kernel"
    if node.op_type == "Concat" and node.input[0] in dequantized:
        return "onnxruntime fuses a quantized Concat, and has no kernel for it with float16 scales"
    if not onnx.defs.has(node.op_type, opset, ""):
        return f"{node.op_type} is not known in opset {opset}"
    if node.op_type in FIXED:
        return f"the definition of {node.op_type} fixes a type"
    if TYPES & onnx.defs.get_schema(node.op_type, opset, "").attributes.keys():
        return f"the type of what {node.op_type} gives is one of its attributes"
    return ""


def _sizes(proto: onnx.ModelProto, types: dict[str, int]) -> frozenset[str]:
    """Find the float32 tensors that hold sizes of tensors.

    Measured at one size they tell nothing of others. What is also computed from the values of an input
    holds none, nor does a constant in some size.
    """
    data, held = {i.name for i in proto.graph.input}, set[str]()
    data -= {t.name for t in proto.graph.initializer}
    for node in proto.graph.node:
        read = set(node_reads(node))
        own = read & {*node.input[:1]} if node.op_type in SHAPED else read
        if node.op_type in ("Shape", "Size"):
            held.update(node.output)
        elif not data.isdisjoint(read):
            data.update(node.output)
        elif not held.isdisjoint(own) and node.op_type != "ConstantOfShape":
            held.update(node.output)
    return frozenset(name for name in held if types.get(name) == FLOAT)


def _fused_transposes(proto: onnx.ModelProto) -> frozenset[str]:
    """Find the outputs of Transposes that onnxruntime's optimizer joins to a MatMul over batches.

    It does so where the first axis becomes one of the last two, and the others keep their order, also
    through a Cast. The joint node has no float16 kernel on the CPU, where the session ends the process
    (onnxruntime 1.31). From a float32 Transpose with a Cast behind it nothing is joined.
    """
    read = {name for node in proto.graph.node if node.op_type == "MatMul" for name in node.input}
    read |= {n.input[0] for n in proto.graph.node if n.op_type == "Cast" and n.output[0] in read}
    found = set()
    for node in proto.graph.node:
        axes = [list(a.ints) for a in node.attribute if node.op_type == "Transpose" and a.name == "perm"]
        rest = list(range(1, len(axes[0]))) if axes else []
        joined = len(rest) > 1 and axes[0] in ([*rest[:-1], 0, rest[-1]], [*rest, 0])
        if joined and node.output[0] in read:
            found.add(node.output[0])
    return frozenset(found)


def _unknown(node: onnx.NodeProto, types: dict[str, int]) -> str:
    unknown = [name for name in node.input if name and name not in types]
    return f"the type of its input {unknown[0]!r} is not known" if unknown else ""


def _halvable(
    formal: Sequence[onnx.defs.OpSchema.FormalParameter], names: Sequence[str], types: dict[str, int]
) -> tuple[int, ...]:
    """Return the places of float32 tensors that may be float16. The last parameter may be variadic."""
    return tuple(
        i
        for i, name in enumerate(names)
        if types.get(name) == FLOAT and "tensor(float16)" in formal[min(i, len(formal) - 1)].types
    )
