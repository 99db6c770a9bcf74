"""The scales that equalize layers: one shared by a channel group, or one for each layer that meets there.

Let r be the largest magnitude in a writer's row or a reader's column, at the current scales, and R the
largest of the whole layer. Nagel et al. (ICCV 2019, §4.1) maximize the sum over channels c of (r_w,c / R_w)
(r_r,c / R_r) for one writer w and one reader r, and find

    s_c = √(r_w,c · r_r,c) / r_w,c = √(r_r,c / r_w,c)          row c ·= s_c,  column c /= s_c

This has two parts: a pattern over c, which follows r relative to R, and a level, the same for all c, which
changes no layer's precision. With many writers and readers (a residual stream) the pattern is the same
formula with the largest relative range among the writers and among the readers, because the scale of a
whole tensor is set by its largest value; the level takes geometric means over writers and over readers:

    s_c = √( max_r r_r,c/R_r  /  max_w r_w,c/R_w ) · √( mean_r R_r / mean_w R_w )

which for a pair is Nagel's s_c again. Levels do not act on patterns, and follow from a linear system
(`level_solver`).

Per-layer scales (Horton et al., arXiv 2011.09058, §3.2): every layer that writes or reads the channels has
a scale of its own, and all are brought to the geometric means of their patterns and of their levels; for
one writer and one reader both scales are s_c again: the method's v₂ᵒ and v₁ⁱ.

Patterns of streams depend on each other through the layers between them: they are updated in turn until
none moves by more than TOLERANCE. Channels that are dead on a side (below DEAD of the layer's largest) do
not count there, and where a group has no living writer or no living reader its scale stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcompress.graph.channel_groups.groups import ChannelGroups, LabelledLayer, Labels
from onnxcompress.graph.query import attribute
from onnxcompress.passes.equalize.level_solver import LevelSystem, Meeting
from onnxcompress.progress import Progress, silent

TOLERANCE = 3e-4
"""Largest |log s| of a sweep after which scales count as converged."""
BALANCED = 2e-3
"""Largest |log s| that is too small to be worth a change."""
PER_LAYER_FACTOR = 30.0
"""Factor by which both are larger for per-layer scales: in dense blocks all depend on each other."""
SWEEPS = 300
"""Sweeps over all streams, at most."""
DEAD = 1e-3
"""Range relative to the layer's largest below which a channel counts as dead."""


@dataclass
class Side:
    """The rows (of a writer) or columns (of a reader) of a layer, with their current scales."""

    layer: int
    reads: bool
    labels: Labels
    shift: np.ndarray
    """Log of what the rows were multiplied by, or the columns divided by, (channels,)."""
    unique: Labels
    """The channel groups on this side."""
    inverse: np.ndarray
    """Position in `unique` of each channel's group, (channels,)."""

    @property
    def sign(self) -> float:
        """1 for rows, -1 for columns."""
        return -1.0 if self.reads else 1.0

    @property
    def index(self) -> int:
        """Position among the sides of all layers."""
        return 2 * self.layer + int(self.reads)


class Balance:
    """The scales of a network's layers, all 1 at first; `solve` equalizes them."""

    def __init__(
        self, groups: ChannelGroups, shared_scale: np.ndarray, per_layer_scale: np.ndarray
    ) -> None:
        """Set all scales to 1.

        Args:
            groups: The channel groups.
            shared_scale: Mask of the channel groups with one scale for all layers, (groups,).
            per_layer_scale: Mask of the channel groups with one scale for each layer, (groups,).
        """
        self.shared_scale, self.per_layer_scale = shared_scale, per_layer_scale
        self.sweeps, self.converged = 0, False
        self._magnitudes = [_magnitudes(layer) for layer in groups.layers]
        self.sides: list[Side] = []
        for at, layer in enumerate(groups.layers):
            for reads, labels in ((False, layer.writes), (True, layer.reads)):
                unique, inverse = np.unique(labels, return_inverse=True)
                self.sides.append(Side(at, reads, labels, np.zeros(len(labels)), unique, inverse))
        moving = shared_scale | per_layer_scale
        self.all_streams = _streams(self.sides, groups.count)
        self.streams = [
            s
            for s in self.all_streams
            if len({side.reads for side in s}) == 2 and any(moving[side.unique].any() for side in s)
        ]

    def writes(self, layer: int) -> np.ndarray:
        """Look up the log of the factor of each row of a layer.

        Args:
            layer: Index of the layer.

        Returns:
            The log factors, (output channels,).
        """
        return self.sides[2 * layer].shift

    def reads(self, layer: int) -> np.ndarray:
        """Look up the log of the divisor of each column of a layer.

        Args:
            layer: Index of the layer.

        Returns:
            The log divisors, (input channels,).
        """
        return self.sides[2 * layer + 1].shift

    def scales(self, count: int) -> np.ndarray:
        """Collect the shared scales.

        Args:
            count: Number of channel groups.

        Returns:
            Log of the scale of each channel group with a shared scale, (groups,); 0 for others.
        """
        found = np.zeros(count)
        for side in self.sides:
            at = self.shared_scale[side.labels]
            found[side.labels[at]] = side.shift[at]
        return found

    def solve(self, progress: Progress = silent) -> bool:
        """Equalize the layers.

        Args:
            progress: Called with the stage, the sweeps done and the sweeps at most.

        Returns:
            Whether scales moved; False where all layers are balanced already.
        """
        steps = [self._largest(stream, self._pattern(stream)) for stream in self.streams]
        steps += [
            self._largest([s], [np.array([y])]) for s, y in zip(self.sides, self._levels(), strict=True)
        ]
        if max(steps, default=0.0) < BALANCED:
            self.converged = True
            return False
        while self.sweeps < SWEEPS and not self.converged:
            self.sweeps += 1
            largest = max(self._sweep(stream) for stream in self.streams)
            self.converged = largest < TOLERANCE
            progress("equalizing", SWEEPS if self.converged else self.sweeps, SWEEPS)
        for side, level in zip(self.sides, self._levels(), strict=True):
            side.shift += level
        return True

    def settle(self) -> None:
        """Drop the per-layer scales from which no layer would gain: they would cost a Mul."""
        for side in self.sides:
            own = self.per_layer_scale[side.labels]
            if abs(side.shift[own]).max(initial=0.0) < BALANCED * PER_LAYER_FACTOR:
                side.shift[own] = 0.0

    def lost_bits(self) -> float:
        """Measure the precision that one scale for a layer's weights costs a channel.

        Returns:
            Binary digits: the mean of log2(R / r) over the living channels of all sides that may move,
            where a depthwise layer counts once.
        """
        moving = self.shared_scale | self.per_layer_scale
        found = [np.zeros(0)]
        for side in (side for stream in self.streams for side in stream):
            if side.reads and self._magnitudes[side.layer].shape[1:] == (1, 1):
                continue
            ranges = self._grouped(side)
            top = ranges.max(initial=0.0)
            found.append(np.log2(top / ranges[moving[side.unique] & (ranges > DEAD * top)]))
        bits = np.concatenate(found)
        return float(bits.mean()) if bits.size else 0.0

    def ranges(self, side: Side) -> np.ndarray:
        """Compute the largest magnitude in each row or column at the current scales.

        Args:
            side: The rows or columns of a layer.

        Returns:
            The magnitudes, (channels,).
        """
        weight = self._magnitudes[side.layer]
        groups, outputs, inputs = weight.shape
        rows = np.exp(self.writes(side.layer)).reshape(groups, outputs, 1)
        columns = np.exp(-self.reads(side.layer)).reshape(groups, 1, inputs)
        if side.reads:
            return np.asarray((weight * rows).max(1, keepdims=True) * columns).reshape(-1)
        return np.asarray((weight * columns).max(2, keepdims=True) * rows).reshape(-1)

    def _grouped(self, side: Side) -> np.ndarray:
        """Compute the largest range of each channel group on a side, (groups on it,)."""
        ranges = np.zeros(len(side.unique))
        np.maximum.at(ranges, side.inverse, self.ranges(side))
        return ranges

    def _sweep(self, stream: list[Side]) -> float:
        """Update one stream and return its largest step."""
        steps = self._pattern(stream)
        looped = len({side.layer for side in stream}) < len(stream)
        for side, step in zip(stream, steps, strict=True):
            side.shift += step / 2 if looped else step  # rows and columns of one layer move each other
        return self._largest(stream, steps)

    def _largest(self, stream: list[Side], steps: list[np.ndarray]) -> float:
        """Return the largest step; steps of per-layer scales count 1 / PER_LAYER_FACTOR."""
        pairs = zip(stream, steps, strict=True)
        found = [
            (abs(s) / np.where(self.per_layer_scale[a.labels], PER_LAYER_FACTOR, 1.0)).max(initial=0.0)
            for a, s in pairs
        ]
        return float(max(found))

    def _pattern(self, stream: list[Side]) -> list[np.ndarray]:
        """Compute the log steps that equalize each side's channels relative to the layer's largest."""
        relative, alive = [], []
        for side in stream:
            ranges = self._grouped(side)
            top = ranges.max(initial=0.0)
            alive.append(ranges > DEAD * top)
            relative.append(np.log(np.where(alive[-1], ranges, 1.0) / (top or 1.0)))
        groups = np.unique(np.concatenate([side.unique for side in stream]))
        places = [np.searchsorted(groups, side.unique) for side in stream]
        largest = np.full((2, len(groups)), -np.inf)
        total, number = np.zeros(len(groups)), np.zeros((2, len(groups)))
        for side, place, values, living in zip(stream, places, relative, alive, strict=True):
            at, row = place[living], int(side.reads)
            largest[row, at] = np.maximum(largest[row, at], values[living])
            total[at] += values[living]
            number[row, at] += 1
        both: np.ndarray = np.asarray((number > 0).all(0))
        common = np.where(both, total / np.maximum(number.sum(0), 1), 0.0)
        with np.errstate(invalid="ignore"):
            pull = np.where(both & self.shared_scale[groups], (largest[1] - largest[0]) / 2, 0.0)
        steps = []
        for side, place, values, living in zip(stream, places, relative, alive, strict=True):
            own = both[place] & self.per_layer_scale[side.unique] & living
            step = pull[place] + np.where(own, side.sign * (common[place] - values), 0.0)
            steps.append(step[side.inverse])
        return steps

    def _levels(self) -> np.ndarray:
        """Solve for the log factor of each side, (sides,), that equalizes the layers' largest ranges."""
        unknown = self._unknowns()
        tops = np.array([np.log(self.ranges(side).max(initial=0.0) or 1.0) for side in self.sides])
        signs = np.array([side.sign for side in self.sides])
        meetings = [
            Meeting([side.index for side in stream], bool(self.shared_scale[stream[0].unique].all()))
            for stream in self.streams
            if unknown[stream[0].index] >= 0
        ]
        return LevelSystem(unknown, signs, meetings).solve(tops)

    def _unknowns(self) -> np.ndarray:
        """Assign a number to the unknown level of each side; -1: it has none (a layer of zeros)."""
        unknown, count = np.full(len(self.sides), -1), 0
        for stream in self.streams:
            if not all(self._magnitudes[side.layer].any() for side in stream):
                continue
            labels = np.concatenate([side.unique for side in stream])
            if self.shared_scale[labels].all():
                unknown[[side.index for side in stream]] = count
                count += 1
            elif self.per_layer_scale[labels].all():
                unknown[[side.index for side in stream]] = range(count, count + len(stream))
                count += len(stream)
        return unknown


def _magnitudes(layer: LabelledLayer) -> np.ndarray:
    """Compute the largest magnitude over the taps of the kernel, (groups, outputs, inputs).

    Weights that are not finite tell nothing of a range: the layer's others, and other layers, go by theirs.
    """
    linear = layer.linear
    weight = linear.view(linear.weight)
    largest = np.maximum(weight.max(3), -weight.min(3)).astype(np.float64)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    return np.asarray(
        largest * abs(attribute(linear.node, "alpha", 1.0)) if linear.node.op == "Gemm" else largest
    )


def _streams(sides: list[Side], count: int) -> list[list[Side]]:
    """Group the sides that share a channel group, directly or indirectly, in order of the first side."""
    from scipy.sparse import coo_array  # slow to import
    from scipy.sparse.csgraph import connected_components

    places = np.repeat(np.arange(len(sides)), [len(side.unique) for side in sides])
    labels = np.concatenate([np.empty(0, np.int64), *(side.unique for side in sides)])
    size = len(sides) + count
    shared = coo_array((np.ones(len(labels), bool), (places, len(sides) + labels)), shape=(size, size))
    _, component = connected_components(shared, directed=False)
    streams: dict[int, list[Side]] = {}
    for side, stream in zip(sides, component.tolist(), strict=False):  # labels follow
        streams.setdefault(stream, []).append(side)
    return list(streams.values())
