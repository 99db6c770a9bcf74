"""Channel groups, as `tracer.find_channel_groups` finds them: which channels must be scaled together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph.linear_layer import Linear

MAX_LABELS = 1 << 22
"""Limit for the elements of a label array: no channel layout needs more."""
ACCURATE = ("float32", "float64")
"""Types in which a scaled weight rounds to less than 1e-5 of itself."""

Labels = np.ndarray
"""Integers that name channels; two channels of one group have the same label in a `ChannelGroups`."""


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


@dataclass(frozen=True)
class Member:
    """The channels of one side of a layer that belong to a group."""

    layer: LabelledLayer
    side: Literal["inputs", "outputs"]
    channels: np.ndarray
    """Positions among the layer's input or output channels, shape (channels of the group, copies).

    Row c is channel c of the group; a Gemm behind a Flatten reads each channel once per pixel (copies).
    """


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that the same layers write and read, such as those of a residual stream.

    Channel c can be scaled by any s > 0 where `unscalable` is None: with weights and biases of `outputs`
    times s, weights of `inputs` divided by s, and the constants and bounds with its label
    (`ChannelGroups.offsets`, `.bounds`) times s, the network computes the same.

    For removing channels these groups are too small in places: the inputs and outputs of a grouped
    convolution go together then, and so do a gate and what it multiplies. Operators that only forbid a
    scale (Sigmoid, Clip, BatchNormalization) are no obstacle there.
    """

    labels: Labels
    """The label of each channel, shape (channels,)."""
    members: tuple[Member, ...]
    """In topological order of the layers."""
    unscalable: Refusal | None
    """The first reason why the channels cannot be scaled, if any."""


@dataclass
class ChannelGroups:
    """The channel groups of a model. Labels, except in `origins`, are those that represent their groups."""

    layers: list[LabelledLayer] = field(default_factory=list)
    tensors: dict[str, Labels] = field(default_factory=dict)
    origins: dict[str, Labels] = field(default_factory=dict)
    """As `tensors`, but with the labels that each channel had before groups were joined."""
    offsets: list[Offset] = field(default_factory=list)
    bounds: list[Bounds] = field(default_factory=list)
    unscalable: dict[int, Refusal] = field(default_factory=dict)
    """The first reason why a channel cannot be scaled, by label."""
    overflow: set[int] = field(default_factory=set)
    """Unscalable labels whose scaled values would overflow their type."""
    untraced: set[int] = field(default_factory=set)
    """Labels that end at an operator without a rule, though their channels may go on behind it."""
    count: int = 0
    """Number of labels; all labels are below it."""

    @cached_property
    def layer_of(self) -> dict[int, LabelledLayer]:
        """Layers by id of their node."""
        return {id(layer.linear.node): layer for layer in self.layers}

    def groups(self) -> list[ChannelGroup]:
        """List the channels that layers write or read, those with the same layers as one group.

        Returns:
            Each channel in one group; a Concat makes no group of its own: its reader is a member of the
            groups of all that it joins.
        """
        places: dict[int, dict[tuple[int, bool], list[int]]] = {}
        for at, layer in enumerate(self.layers):
            for reads, labels in ((False, layer.writes), (True, layer.reads)):
                for channel, label in enumerate(labels.tolist()):
                    places.setdefault(label, {}).setdefault((at, reads), []).append(channel)
        alike: dict[tuple[object, Refusal | None], list[int]] = {}
        for label, sides in places.items():
            copies = tuple((side, len(channels)) for side, channels in sides.items())
            alike.setdefault((copies, self.unscalable.get(label)), []).append(label)
        return [
            ChannelGroup(np.array(labels), tuple(self._members(labels, places)), refusal)
            for (_, refusal), labels in alike.items()
        ]

    def _members(
        self, labels: list[int], places: dict[int, dict[tuple[int, bool], list[int]]]
    ) -> Iterator[Member]:
        for at, reads in places[labels[0]]:
            channels = np.array([places[label][at, reads] for label in labels])
            yield Member(self.layers[at], "inputs" if reads else "outputs", channels)


class Unknown(Exception):
    """Raised by a rule that cannot determine the labels of the channels."""

    def __init__(self, rule: str, remedy: str = "") -> None:
        super().__init__(rule)
        self.rule, self.remedy = rule, remedy


class ChannelLabels:
    """Labels, which of them belong to one group, and which channels cannot be scaled."""

    def __init__(self) -> None:
        self._count = 0
        self._joined: list[np.ndarray] = []
        self._reasons: list[tuple[int, Refusal]] = []
        self._marked: set[int] = set()

    def new_labels(self, shape: tuple[int, ...]) -> Labels:
        """Create new labels, each a group of its own.

        Args:
            shape: Shape of the label array.

        Returns:
            The labels.

        Raises:
            Unknown: There would be more than MAX_LABELS.
        """
        start, count = self._count, int(np.prod(shape))
        if count > MAX_LABELS:
            raise Unknown("has too many channels to follow")
        self._count += count
        return np.arange(start, start + count).reshape(shape)

    def union(self, *arrays: Labels) -> Labels:
        """Join the groups of labels element by element: these channels must have the same scale.

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
            self._joined.append(np.unique(np.stack([first.reshape(-1), other.reshape(-1)]), axis=1))
        return np.ascontiguousarray(first)

    def union_along(self, labels: Labels, axes: tuple[int, ...]) -> Labels:
        """Join the groups of all labels along some axes.

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
        """Return whether each of these labels is marked itself, not only through others of its group.

        Args:
            labels: The labels.

        Returns:
            True where all are marked.
        """
        return all(label in self._marked for label in np.unique(labels).tolist())

    def roots(self) -> np.ndarray:
        """Compute for each label the one that represents its group: the smallest.

        Returns:
            Shape (labels,), int64.
        """
        from scipy.sparse import coo_array  # slow to import
        from scipy.sparse.csgraph import connected_components

        first, second = np.concatenate([np.empty((2, 0), np.int64), *self._joined], axis=1)
        joined = coo_array((np.ones(len(first), bool), (first, second)), shape=(self._count, self._count))
        _, group = connected_components(joined, directed=False)
        _, smallest = np.unique(group, return_index=True)
        return np.asarray(smallest[group], np.int64)

    def unscalable(self, roots: np.ndarray) -> dict[int, Refusal]:
        """Collect for each unscalable group the first reason that was given.

        Args:
            roots: The result of `roots`.

        Returns:
            Refusals by the label that represents the group.
        """
        reasons: dict[int, Refusal] = {}
        for label, refusal in self._reasons:
            reasons.setdefault(int(roots[label]), refusal)
        return reasons
