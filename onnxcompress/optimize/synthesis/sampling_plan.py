"""Which tensors are drawn, and which nodes run, to get values of a tensor from known statistics.

Walking back from the wanted tensors, each carries how many recorded levels it may still go back (its
budget). A recorded tensor with budget 0 is drawn; with more, it is computed from what lies behind it, with
one less, and standardized. Inputs of the graph are always drawn. A tensor reached twice has the larger
budget, so that each is computed once. Of a tensor that only a Shape or Size reads, the shape is enough.

The nodes that run are cut into pieces: one begins where a drawn tensor is first read, so that it is drawn
no earlier, and one ends where a tensor is to be standardized. All of this is linear in the nodes.
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
    """A node as it was when it was looked at, by names of tensors that depend on the graph's inputs."""

    reads: tuple[str, ...]
    makes: tuple[str, ...]
    sizes_only: bool
    """It reads the shape of its input alone."""


@dataclass
class Piece:
    """Nodes that run together, after `fresh` is drawn."""

    nodes: list[Node] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    feeds: tuple[str, ...] = ()
    """All that the nodes read and do not make."""
    outputs: tuple[str, ...] = ()
    """What is wanted, to be standardized, or read later."""
    done: tuple[str, ...] = ()
    """Tensors that nothing reads any more."""


@dataclass(frozen=True)
class Cut:
    """What `cut` found."""

    drawn: tuple[str, ...]
    """In the order of the graph."""
    shapes_only: frozenset[str]
    standardized: frozenset[str]
    pieces: tuple[Piece, ...]


def snapshot(model: Model) -> list[Node]:
    """The nodes that an input reaches, in topological order."""
    topology = Topology(model)
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
    """What to draw and run for `wanted`, all of them names of `inputs` or made by `nodes`.

    recorded: names with known statistics. depth: levels to go back; None: to the inputs.
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
    """Levels that each needed tensor may go back, and the tensors of which only the shape is needed."""
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
    """Fill in what goes from piece to piece."""
    last = {name: at for at, piece in enumerate(pieces) for node in piece.nodes for name in node.reads}
    for at, piece in enumerate(pieces):
        makes = {name for node in piece.nodes for name in node.makes if name not in given}
        reads = {name for node in piece.nodes for name in node.reads}
        piece.feeds = tuple(sorted(reads - makes))
        piece.outputs = tuple(sorted(n for n in makes if n in kept or last.get(n, -1) > at))
        alive = (*piece.feeds, *piece.fresh, *piece.outputs)
        piece.done = tuple(n for n in dict.fromkeys(alive) if last.get(n, -1) <= at)
