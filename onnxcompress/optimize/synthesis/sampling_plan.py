"""Plan which tensors are drawn, and which nodes run, to sample a tensor from known statistics.

Going back from the wanted tensors, each tensor carries the number of recorded levels that it may still go
back (its budget). A recorded tensor with budget 0 is drawn; with a larger budget it is computed from the
tensors before it, whose budget is one less, and standardized. Inputs of the graph are always drawn. A
tensor reached twice has the larger budget, so that each is computed once. Where only a Shape or Size reads
a tensor, its shape is enough.

The nodes that run are cut into pieces: a piece begins where a drawn tensor is first read, so that it is
drawn no earlier, and ends where a tensor is to be standardized. All of this is linear in the number of
nodes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from onnxcompress.graph.query import is_op
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model


@dataclass(frozen=True)
class Node:
    """A node at the time of the snapshot, by the names of tensors that depend on the graph's inputs."""

    reads: tuple[str, ...]
    makes: tuple[str, ...]
    sizes_only: bool
    """Whether it reads only the shape of its input."""


@dataclass
class Piece:
    """Nodes that run together, after the tensors `fresh` are drawn."""

    nodes: list[Node] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    feeds: tuple[str, ...] = ()
    """Tensors that the nodes read and do not make."""
    outputs: tuple[str, ...] = ()
    """Tensors that are wanted, to be standardized, or read later."""
    done: tuple[str, ...] = ()
    """Tensors that nothing reads any more."""


@dataclass(frozen=True)
class Cut:
    """The plan that `cut` makes."""

    drawn: tuple[str, ...]
    """Tensors to draw, in the order of the graph."""
    shapes_only: frozenset[str]
    """Tensors of which only the shape is needed."""
    standardized: frozenset[str]
    """Tensors that are brought to their recorded statistics."""
    pieces: tuple[Piece, ...]


def snapshot(model: Model) -> list[Node]:
    """Record the nodes that an input reaches.

    Args:
        model: The network.

    Returns:
        The nodes in topological order.
    """
    topology = model.analysis(Topology)
    found = []
    for node in topology.order:
        reads = tuple(t.name for t in node.inputs if id(t) in topology.dynamic and t.name)
        if reads:
            makes = tuple(t.name for t in node.outputs if t.name)
            found.append(Node(reads, makes, is_op(node, "Shape", "Size")))
    return found


def cut(
    nodes: Sequence[Node],
    inputs: Iterable[str],
    recorded: Collection[str],
    wanted: Sequence[str],
    depth: int | None,
) -> Cut:
    """Plan what to draw and what to run for the wanted tensors.

    Args:
        nodes: The nodes, in topological order.
        inputs: Names of the graph's inputs.
        recorded: Names of the tensors with known statistics.
        wanted: Names of the wanted tensors, each an input or made by a node.
        depth: Recorded levels to go back; None: to the inputs.

    Returns:
        The plan.
    """
    budget, shapes_only = _budgets(nodes, recorded, wanted, math.inf if depth is None else depth)
    drawn = dict.fromkeys(name for name in inputs if name in budget)
    run: list[Node] = []
    standardized: set[str] = set()
    for node in nodes:
        needed = [name for name in node.makes if name in budget]
        drawn.update(dict.fromkeys(n for n in needed if n in recorded and budget[n] == 0))
        standardized.update(n for n in needed if n in recorded and budget[n] > 0)
        if any(name not in drawn for name in needed):
            run.append(node)
    given = {*drawn, *shapes_only}
    pieces = _pieces(run, given, standardized, wanted)
    _connect(pieces, given, standardized.union(wanted))
    return Cut(tuple(drawn), frozenset(shapes_only), frozenset(standardized), tuple(pieces))


def _budgets(
    nodes: Sequence[Node], recorded: Collection[str], wanted: Sequence[str], depth: float
) -> tuple[dict[str, float], set[str]]:
    """Compute the budget of each needed tensor, and the tensors of which only the shape is needed."""
    budget: dict[str, float] = dict.fromkeys(wanted, depth)
    shapes_only: set[str] = set()
    for node in reversed(nodes):
        left = max((budget[n] - (n in recorded) for n in node.makes if n in budget), default=-1)
        if left < 0:
            continue
        if node.sizes_only:
            shapes_only.update(node.reads)
            continue
        for name in node.reads:
            budget[name] = max(budget.get(name, 0), left)
    return budget, shapes_only - budget.keys()


def _pieces(
    nodes: Sequence[Node], given: Collection[str], ends: Collection[str], wanted: Sequence[str]
) -> list[Piece]:
    pieces = [Piece()]
    seen: set[str] = set()
    for node in nodes:
        fresh = [n for n in dict.fromkeys(node.reads) if n in given and n not in seen]
        if fresh and pieces[-1].nodes:
            pieces.append(Piece())
        pieces[-1].nodes.append(node)
        pieces[-1].fresh += fresh
        seen.update(fresh)
        if any(name in ends for name in node.makes):
            pieces.append(Piece())
    pieces += [Piece(fresh=[n]) for n in dict.fromkeys(wanted) if n in given and n not in seen]
    return [piece for piece in pieces if piece.nodes or piece.fresh]


def _connect(pieces: Sequence[Piece], given: Collection[str], kept: Collection[str]) -> None:
    """Fill in the tensors that are handed from piece to piece."""
    last = {name: at for at, piece in enumerate(pieces) for node in piece.nodes for name in node.reads}
    for at, piece in enumerate(pieces):
        makes = {name for node in piece.nodes for name in node.makes if name not in given}
        reads = {name for node in piece.nodes for name in node.reads}
        piece.feeds = tuple(sorted(reads - makes))
        piece.outputs = tuple(sorted(n for n in makes if n in kept or last.get(n, -1) > at))
        alive = (*piece.feeds, *piece.fresh, *piece.outputs)
        piece.done = tuple(n for n in dict.fromkeys(alive) if last.get(n, -1) <= at)
