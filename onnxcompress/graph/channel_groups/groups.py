"""Labels of channels: which must be scaled together, and which cannot be scaled (see `tracer`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph.linear_layer import Linear

MAX_LABELS = 1 << 22
"""Limit for the elements of a label array: no channel layout needs more."""
ACCURATE = ("float32", "float64")
"""Types in which a scaled weight rounds to less than 1e-5 of itself."""

Labels = np.ndarray


class Unknown(Exception):
    """Raised by a rule that cannot determine the labels of the channels."""

    def __init__(self, rule: str, remedy: str = "") -> None:
        super().__init__(rule)
        self.rule, self.remedy = rule, remedy


@dataclass(frozen=True)
class LabelledLayer:
    """A linear layer with a constant weight, and the labels of its channels."""

    linear: Linear
    reads: Labels
    """Labels of the input channels, shape (input channels,)."""
    writes: Labels
    """Labels of the output channels, shape (output channels,)."""
    own: bool
    """Whether this node alone reads the weight."""

    @property
    def scalable(self) -> bool:
        """Whether the weight may be replaced by a scaled one, exact except for rounding."""
        return self.own and self.linear.weight.dtype.name in ACCURATE


@dataclass(frozen=True)
class Offset:
    """A constant operand of Add, Sub, Sum, Max or Min, to be multiplied by the scales of its channels."""

    node: gs.Node
    operand: int
    labels: Labels


@dataclass(frozen=True)
class Bounds:
    """A Clip whose bounds must be multiplied by the scales of its channels; ±inf for a missing bound."""

    node: gs.Node
    low: float
    high: float
    labels: Labels


@dataclass
class ChannelGroups:
    """The channel groups of a model. Labels, except in `origins`, are those that represent their groups."""

    layers: list[LabelledLayer] = field(default_factory=list)
    tensors: dict[str, Labels] = field(default_factory=dict)
    origins: dict[str, Labels] = field(default_factory=dict)
    """As `tensors`, but with labels before they are tied: the channel that the layer wrote."""
    offsets: list[Offset] = field(default_factory=list)
    bounds: list[Bounds] = field(default_factory=list)
    unscalable: dict[int, Refusal] = field(default_factory=dict)
    """The first reason why a channel group cannot be scaled, by group."""
    overflow: set[int] = field(default_factory=set)
    """Barred groups whose scaled values would overflow their type."""
    untraced: set[int] = field(default_factory=set)
    """Groups that end at an operator without a rule, though they may go on behind it."""
    count: int = 0
    """Number of labels; all labels are below it."""

    @cached_property
    def layer_of(self) -> dict[int, LabelledLayer]:
        """Layers by id of their node.

        Returns:
            All layers.
        """
        return {id(layer.linear.node): layer for layer in self.layers}


class ChannelLabels:
    """Labels, which of them are tied (union-find), and which are barred."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._reasons: list[tuple[int, Refusal]] = []
        self._marked: set[int] = set()

    def new_labels(self, shape: tuple[int, ...]) -> Labels:
        """Create new labels that are tied to nothing.

        Args:
            shape: Shape of the label array.

        Returns:
            The labels.

        Raises:
            Unknown: There would be more than MAX_LABELS.
        """
        start, count = len(self._parent), int(np.prod(shape))
        if count > MAX_LABELS:
            raise Unknown("has too many channels to follow")
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count).reshape(shape)

    def union(self, *arrays: Labels) -> Labels:
        """Tie labels element by element: these channels must have the same scale.

        Args:
            *arrays: Label arrays whose shapes broadcast.

        Returns:
            The labels, broadcast to the common shape.

        Raises:
            Unknown: The shapes do not broadcast, or there are more than MAX_LABELS elements.
        """
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

    def union_along(self, labels: Labels, axes: tuple[int, ...]) -> Labels:
        """Tie all labels along some axes.

        Args:
            labels: The labels.
            axes: Axes that are reduced to size 1.

        Returns:
            The labels, of the same rank.

        Raises:
            Unknown: An axis has size 0.
        """
        if not all(labels.shape[axis] for axis in axes):
            raise Unknown("reduces over nothing")
        first = labels
        for axis in axes:
            first = first.take([0], axis)
        if first.shape != labels.shape:
            self.union(labels, first)
        return first

    def mark_unscalable(self, labels: Labels, refusal: Refusal) -> Labels:
        """Mark channels that cannot be scaled.

        Args:
            labels: Labels of the channels.
            refusal: The reason.

        Returns:
            The same labels.
        """
        for label in np.unique(labels).tolist():
            self._reasons.append((label, refusal))
            self._marked.add(label)
        return labels

    def is_unscalable(self, labels: Labels) -> bool:
        """Whether each of these labels is barred itself, and not through a label that it is tied to.

        Args:
            labels: The labels.

        Returns:
            True where all are barred.
        """
        return all(label in self._marked for label in np.unique(labels).tolist())

    def _root(self, label: int) -> int:
        root = label
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[label] != root:
            self._parent[label], label = root, self._parent[label]
        return root

    def roots(self) -> np.ndarray:
        """Compute for each label the label that represents its group.

        Returns:
            Shape (labels,), int64.
        """
        return np.array([self._root(label) for label in range(len(self._parent))], np.int64)

    def unscalable(self, roots: np.ndarray) -> dict[int, Refusal]:
        """Collect for each barred group the first reason that was given.

        Args:
            roots: The result of `roots`.

        Returns:
            Refusals by the label that represents the group.
        """
        reasons: dict[int, Refusal] = {}
        for label, refusal in self._reasons:
            reasons.setdefault(int(roots[label]), refusal)
        return reasons
