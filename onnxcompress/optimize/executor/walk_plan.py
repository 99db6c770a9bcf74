"""The plan of a walk through a network: its nodes, when tensors are freed, and how many images are held.

The nodes between two places at which the tensors of all images fit into memory are a section.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from onnxcompress.graph.order import node_reads
from onnxcompress.graph.query import data_input
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model, Shape

MEMORY = 384 << 20
"""Bytes of the tensors that are held; where all images would need more, fewer go node by node."""
HANDOVER = 0.4
"""Share of MEMORY that the tensors of all images may take between two sections."""


@dataclass(frozen=True)
class Step:
    """A node of the teacher, with the student's node that makes the same tensors."""

    node: gs.Node
    own: gs.Node | None
    """The student's node; None: it has none."""
    outputs: list[str]
    reads: list[str]
    """Tensors with data that the teacher's node needs, itself or through computations of shapes."""
    own_reads: list[str]
    done: frozenset[str] = frozenset()
    """Tensors of the teacher that no later node needs."""
    own_done: frozenset[str] = frozenset()
    held: int = 0
    """Numbers of an image that are held in front of the node or behind it, whichever is more."""
    behind: int = 0
    """Numbers of an image that are held behind the node."""
    made: int = 0
    """Numbers of an image that the node computes."""


@dataclass(frozen=True)
class Section:
    """Neighbouring nodes, and how many images go through them node by node."""

    steps: list[Step]
    images: int


def sections(steps: list[Step], count: int, networks: int = 2) -> list[Section]:
    """Cut a walk into sections whose tensors fit into MEMORY.

    Args:
        steps: The nodes of the walk.
        count: Images that there are.
        networks: Networks whose tensors are held.

    Returns:
        The sections in order; one with all images where these fit everywhere, none without nodes.
    """
    if not steps:
        return []
    each = 4 * networks * count
    if each * max((step.held for step in steps), default=0) <= MEMORY:
        return [Section(steps, count)]
    found: list[Section] = []
    part: list[Step] = []
    before = 0
    for step in steps:
        part.append(step)
        if step is steps[-1] or 0 < each * step.behind <= HANDOVER * MEMORY:
            room = MEMORY - each * max(before, step.behind)
            images = room // (4 * networks * max(1, *(own.held for own in part)))
            found.append(Section(part, max(1, min(count, images))))
            part, before = [], step.behind
    return found


def affordable(steps: list[Step], count: int, copies: int) -> int:
    """Count the images that fit into MEMORY everywhere.

    Args:
        steps: The nodes of the walk.
        count: Images that there are.
        copies: Copies that are held of each tensor.

    Returns:
        The number of images, at least 1.
    """
    most = max((step.held for step in steps), default=0)
    return max(1, min(count, MEMORY // (4 * copies * max(most, 1))))


def plan_steps(
    model: Model, topology: Topology, own: Topology, start: str | None, stop: str | None
) -> list[Step]:
    """List the nodes of a walk.

    Args:
        model: The teacher.
        topology: Its topology.
        own: The topology of the student, which may lack some of the nodes.
        start: Name of the tensor of the trunk that is fed; None: the network's one input.
        stop: Name of the tensor of the trunk at which the walk ends; None: the end of the network.

    Returns:
        The nodes in topological order.

    """
    nodes = nodes_between(topology, start, stop)
    mine = {t.name: node for node in own.order for t in node.outputs if not t.is_empty()}
    pairs = []
    for node in nodes:
        outputs = [t.name for t in node.outputs if not t.is_empty()]
        other = node if own is topology else mine.get(outputs[0])
        reads = needs(node, topology)
        own_reads = reads if other is node else needs(other, own) if other is not None else []
        pairs.append(Step(node, other, outputs, reads, own_reads))
    source = str(data_input(model).name) if start is None else start
    return _freed(model, pairs, source, stop)


def _freed(model: Model, steps: list[Step], source: str, stop: str | None) -> list[Step]:
    """Say of each node what is no longer needed behind it, and how much is held there."""
    shapes = tensor_shapes(model)
    last = {name: place for place, step in enumerate(steps) for name in (*step.outputs, *step.reads)}
    own_last = {
        name: place
        for place, step in enumerate(steps)
        for name in (*(step.outputs if step.own else ()), *step.own_reads)
    }
    live, found = {source}, []
    for place, step in enumerate(steps):
        done = frozenset(n for n in {*live, *step.outputs} if last.get(n, -1) <= place and n != stop)
        own_done = frozenset(n for n, at in own_last.items() if at == place and n != stop)
        before = sum(floats(shapes.get(n)) for n in live)
        live = {*live, *step.outputs} - done
        behind = sum(floats(shapes.get(n)) for n in live)
        held, made = max(before, behind), sum(floats(shapes.get(n)) for n in step.outputs)
        found.append(replace(step, done=done, own_done=own_done, held=held, behind=behind, made=made))
    return found


def nodes_between(topology: Topology, start: str | None, stop: str | None) -> list[gs.Node]:
    """List the nodes that make data between two tensors of the trunk.

    Args:
        topology: The network's topology.
        start: Name of the earlier tensor; None: the network's input.
        stop: Name of the later tensor; None: the end of the network.

    Returns:
        The nodes in topological order, the producer of `stop` included.
    """
    places = {t.name: topology.position(t) for t in topology.trunk()}
    first = 0 if start is None else places[start] + 1
    end = len(topology.order) if stop is None else places[stop] + 1
    return [n for n in topology.order[first:end] if any(id(t) in topology.data for t in n.outputs)]


def needs(node: gs.Node, topology: Topology) -> list[str]:
    """List the tensors with data that a node reads, itself or through computations of shapes.

    Args:
        node: The node.
        topology: The network's topology.

    Returns:
        Names of the tensors.
    """
    found: dict[str, None] = {}
    pending, seen = node_reads(node), set()
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen or id(tensor) not in topology.dynamic:
            continue
        seen.add(id(tensor))
        if id(tensor) in topology.data:
            found[tensor.name] = None
        else:
            pending += [t for maker in tensor.inputs for t in node_reads(maker)]
    return list(found)


def floats(shape: Shape | None) -> int:
    """Count the numbers that a tensor holds for one image, as far as its sizes are known.

    Args:
        shape: The tensor's shape, (N, …); None: unknown.

    Returns:
        The product of the sizes behind the batch.
    """
    return math.prod(d for d in (shape or ())[1:] if isinstance(d, int)) if shape else 0
