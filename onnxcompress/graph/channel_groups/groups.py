"""Labels of channels: which must be scaled together, which cannot be scaled. See `_equalize_flow`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph.linear_layer import Linear

MAX_LABELS = 1 << 22
"""Elements from which on a label array is not written out: no channel layout needs it."""
ACCURATE = ("float32", "float64")
"""Types in which a scaled weight rounds to less than 1e-5 of itself."""

Labels = np.ndarray


class Unknown(Exception):
    """A rule's answer where it cannot say what becomes of the channels."""

    def __init__(self, rule: str, remedy: str = "") -> None:
        super().__init__(rule)
        self.rule, self.remedy = rule, remedy


@dataclass(frozen=True)
class Layer:
    """A linear layer with a constant weight."""

    linear: Linear
    name: str
    """Of its output tensor: unique, unlike node names."""
    reads: Labels
    """(input channels,)"""
    writes: Labels
    """(output channels,)"""

    own: bool
    """Whether no other node reads its weight."""

    @property
    def scalable(self) -> bool:
        """Whether it may get a new weight, exact but for rounding."""
        return self.own and self.linear.weight.dtype.name in ACCURATE


@dataclass(frozen=True)
class Offset:
    """A constant operand of Add, Sub, Sum, Max or Min, to be multiplied by the scales of its channels."""

    node: gs.Node
    operand: int
    labels: Labels


@dataclass(frozen=True)
class Bounds:
    """A Clip whose bounds are to be multiplied by the scales of its channels; ±inf where there is none."""

    node: gs.Node
    low: float
    high: float
    labels: Labels


@dataclass
class Flow:
    """What `trace` found. Labels are those that stand for their groups, but in `origins`."""

    layers: list[Layer] = field(default_factory=list)
    tensors: dict[str, Labels] = field(default_factory=dict)
    origins: dict[str, Labels] = field(default_factory=dict)
    """As `tensors`, with labels that are not yet tied: which channel it was when its layer wrote it."""
    offsets: list[Offset] = field(default_factory=list)
    bounds: list[Bounds] = field(default_factory=list)
    barred: dict[int, Refusal] = field(default_factory=dict)
    """Channel group -> the first thing that bars it."""
    overflow: set[int] = field(default_factory=set)
    """Those of them whose scaled values their type could not hold."""
    ended: set[int] = field(default_factory=set)
    """Those that end in an operator without a rule, though they may go on behind it."""
    count: int = 0
    """All labels are below this."""

    @cached_property
    def layer_of(self) -> dict[int, Layer]:
        """id of a node -> the layer that it is."""
        return {id(layer.linear.node): layer for layer in self.layers}


class Channels:
    """Labels, which of them are tied (union-find), and which are barred."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._bars: list[tuple[int, Refusal]] = []
        self._barred: set[int] = set()

    def fresh(self, shape: tuple[int, ...]) -> Labels:
        """New labels, tied to nothing."""
        start, count = len(self._parent), int(np.prod(shape))
        if count > MAX_LABELS:
            raise Unknown("has too many channels to follow")
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count).reshape(shape)

    def tie(self, *arrays: Labels) -> Labels:
        """Tie labels element by element, arrays broadcast onto each other; returns the broadcast ones."""
        try:
            shape = np.broadcast_shapes(*(a.shape for a in arrays))
        except ValueError:
            raise Unknown("has operands whose shapes do not fit together") from None
        if np.prod(shape, dtype=float) > MAX_LABELS:
            raise Unknown("has too many channels to follow")
        first, *others = np.broadcast_arrays(*arrays)
        for other in others:
            pairs = np.unique(np.stack([first.reshape(-1), other.reshape(-1)]), axis=1)
            for a, b in pairs.T.tolist():
                low, high = sorted((self._root(a), self._root(b)))
                self._parent[high] = low
        return np.ascontiguousarray(first)

    def merge(self, labels: Labels, axes: tuple[int, ...]) -> Labels:
        """Tie the labels along axes, which get size 1. Raises Unknown where there are none."""
        if not all(labels.shape[axis] for axis in axes):
            raise Unknown("reduces over nothing")
        first = labels
        for axis in axes:
            first = first.take([0], axis)
        if first.shape != labels.shape:
            self.tie(labels, first)
        return first

    def bar(self, labels: Labels, refusal: Refusal) -> Labels:
        """Say that these channels cannot be scaled."""
        for label in np.unique(labels).tolist():
            self._bars.append((label, refusal))
            self._barred.add(label)
        return labels

    def is_barred(self, labels: Labels) -> bool:
        """Whether all of these channels are barred by themselves already."""
        return all(label in self._barred for label in np.unique(labels).tolist())

    def _root(self, label: int) -> int:
        root = label
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[label] != root:
            self._parent[label], label = root, self._parent[label]
        return root

    def roots(self) -> np.ndarray:
        """For each label, the one that stands for its group."""
        return np.array([self._root(label) for label in range(len(self._parent))], np.int64)

    def barred(self, roots: np.ndarray) -> dict[int, Refusal]:
        """Group -> the first thing that bars it."""
        found: dict[int, Refusal] = {}
        for label, refusal in self._bars:
            found.setdefault(int(roots[label]), refusal)
        return found
