"""A network as the chain of its blocks and of what lies between them, from the input to the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxcompress.errors import ModelError
from onnxcompress.graph.blocks import Block
from onnxcompress.graph.macs import node_macs
from onnxcompress.graph.query import node_label
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model, Shape


@dataclass(frozen=True)
class Segment:
    """A block, or the nodes between two blocks."""

    name: str
    """Name of the block; else of the heaviest node, with the number of other layers."""
    droppable: bool
    exit: str
    """Name of the last tensor."""
    shape: Shape
    """Shape of that tensor."""
    macs: int
    """Multiply-accumulates for one image."""


def chain(model: Model, blocks: Sequence[Block]) -> tuple[Segment, ...]:
    """Cut a network into its blocks and what lies between them.

    Args:
        model: The network.
        blocks: Its blocks, in topological order, none inside another.

    Returns:
        The segments, from the input to the output. Nodes beside a block count for the segment that follows
        the last block which ends before them; segments without multiply-accumulates are left out.

    Raises:
        ModelError: A size is unknown.
    """
    shapes, topology = tensor_shapes(model), model.analysis(Topology)
    inside = {tensor: at for at, block in enumerate(blocks) for tensor in block.inner}
    between: dict[int, list[gs.Node]] = {}
    ended = 0
    for node in topology.order:
        first = node.outputs[0].name
        if first not in inside:
            if id(node.outputs[0]) in topology.dynamic:  # else it computes a constant
                between.setdefault(ended, []).append(node)
        elif first == blocks[inside[first]].exit:
            ended = inside[first] + 1
    segments: list[Segment] = []
    for at in range(len(blocks) + 1):
        if (rest := _between(between.get(at, []), shapes)) is not None:
            segments.append(rest)
        if at < len(blocks):
            b = blocks[at]
            segments.append(Segment(b.name, True, b.exit, b.shape, b.macs))
    return tuple(segments)


def _between(nodes: Sequence[gs.Node], shapes: dict[str, Shape]) -> Segment | None:
    macs = [_macs(node, shapes) for node in nodes]
    if not any(macs):
        return None
    heaviest = node_label(nodes[macs.index(max(macs))])
    layers = sum(count > 0 for count in macs)
    name = heaviest if layers <= 1 else f"{heaviest} + {layers - 1}"
    last = nodes[-1].outputs[0].name
    return Segment(name, False, last, shapes.get(last, ()), sum(macs))


def _macs(node: gs.Node, shapes: dict[str, Shape]) -> int:
    try:
        return node_macs(node, shapes)
    except ModelError:  # of another domain, say
        return 0
