"""Rules that a region of the graph must keep to be replaced by the identity (`blocks` finds the regions).

R1  the shapes of entry and exit are known and equal; where the sizes of the network's input are only
    assumed, they are also equal at other sizes, because the network may be run at any
R2  the region depends on nothing but its entry and constants (checked where regions are collected)
R3  no inner tensor is read outside or is a graph output; the exit is not a graph output, and no body of
    an If, Loop or Scan reads it
R4  it has at least one layer with weights (Conv, ConvTranspose, Gemm, MatMul)
R5  a run's convolution mixes channels (group = 1) and lies before the feature tensor
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

from onnxcompress.errors import ModelError
from onnxcompress.graph.linear_layer import LINEAR_OPS
from onnxcompress.graph.macs import node_macs
from onnxcompress.graph.query import consumers, input_at, is_op, is_output
from onnxcompress.graph.shape_inference import infer, tensor_shapes, tensor_types
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model, Shape

STEP = 32
"""Difference between the assumed sizes and the second ones that are tried, times the number of the axis."""
Kind = Literal["residual", "projection", "unit", "run"]


@dataclass(frozen=True)
class Region:
    """A candidate: the nodes between two tensors."""

    kind: Kind
    entry: gs.Tensor
    exit: gs.Tensor
    nodes: tuple[gs.Node, ...]


class IllegalRegion(Exception):
    """A candidate breaks a rule; `refusal` is the rule and a remedy, both in words."""

    def __init__(self, rule: str, remedy: str = "") -> None:
        super().__init__(rule)
        self.refusal = (rule, remedy)


def check_legal(model: Model, topology: Topology, region: Region, elsewhere: Mapping[str, Shape]) -> None:
    """Check the rules R1 and R3 to R5.

    Args:
        model: The model.
        topology: The topology of its graph.
        region: The candidate.
        elsewhere: Shapes by tensor name at other sizes of the input, see `shapes_at_another_size`.

    Raises:
        IllegalRegion: The region breaks a rule.
    """
    inside = {id(node) for node in region.nodes}
    before, after = topology.shape(region.entry), topology.shape(region.exit)
    remedy = "give the sizes of the network's input with --input-shape, or run shape inference"
    if before is None or after is None or not all(isinstance(d, int) for d in before[1:]):
        raise IllegalRegion("the shape is unknown", remedy)
    if len(before) != len(after) or before[1:] != after[1:]:
        raise IllegalRegion(f"input {_dims(before)} and output {_dims(after)} differ in shape")
    types = tensor_types(model)
    if types.get(region.entry.name) != types.get(region.exit.name):
        raise IllegalRegion("its input and output differ in type")
    if _differ(region, elsewhere):
        raise IllegalRegion(
            "its input and output have the same shape at some sizes of the network's input only"
        )
    if not any(_has_weight(topology, node) for node in region.nodes):
        raise IllegalRegion("it has no layer with weights")
    if region.kind == "run" and any(n.attrs.get("group", 1) != 1 for n in region.nodes if n.op == "Conv"):
        raise IllegalRegion("a depthwise or grouped convolution on the trunk is half of a separable one")
    if is_output(model, region.exit):
        raise IllegalRegion("its output is an output of the graph")
    if any(id(reader) not in topology.index for reader in consumers(region.exit)):
        raise IllegalRegion("its output is read inside the body of an If, Loop or Scan")
    try:
        region_macs(model, region)
    except ModelError as error:
        raise IllegalRegion(str(error), remedy) from error
    for node in region.nodes:
        for tensor in node.outputs:
            if tensor is region.exit:
                continue
            if is_output(model, tensor):
                raise IllegalRegion(f"tensor {tensor.name!r} inside is an output of the graph")
            for reader in consumers(tensor):
                if id(reader) not in inside:
                    raise IllegalRegion(
                        f"tensor {tensor.name!r} inside is also read by {reader.op} {reader.name!r}"
                    )


def _differ(region: Region, shapes: Mapping[str, Shape]) -> bool:
    """Return whether entry and exit are not known to have the same shape."""
    before, after = shapes.get(region.entry.name), shapes.get(region.exit.name)
    return before is None or after is None or before[1:] != after[1:]


def shapes_at_another_size(model: Model) -> Mapping[str, Shape]:
    """Infer the shapes of all tensors with other sizes in place of the assumed ones.

    The steps are multiples of the strides that networks are built for, and differ between axes, so that no
    two axes stay equal.

    Args:
        model: The model.

    Returns:
        Shapes by tensor name; those at hand where no size is assumed, and none where inference fails.
    """
    if not model.assumed:
        return tensor_shapes(model)
    files = {t.name: t.shape for t in model.graph.inputs}
    other = {
        name: tuple(
            size + STEP * axis if isinstance(size, int) and not isinstance(open_size, int) else size
            for axis, (size, open_size) in enumerate(zip(shape, files[name], strict=True))
        )
        for name, shape in model.assumed.items()
    }
    try:
        return infer(model, other).shapes
    except ModelError:
        return {}


def _has_weight(topology: Topology, node: gs.Node) -> bool:
    if not is_op(node, *LINEAR_OPS):
        return False
    return any((t := input_at(node, i)) is not None and id(t) not in topology.data for i in (0, 1))


def _dims(shape: Shape) -> str:
    return "×".join("?" if d is None else str(d) for d in shape)


def region_macs(model: Model, region: Region) -> int:
    """Count the multiply-accumulates of a region for one image.

    Args:
        model: The model.
        region: The region.

    Returns:
        The number.

    Raises:
        ModelError: A shape is unknown.
    """
    return sum(node_macs(node, tensor_shapes(model)) for node in region.nodes)
