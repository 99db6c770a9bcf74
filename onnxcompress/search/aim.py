"""Candidates that are expected to be just as fast as a limit asks: they lose least of what is fast enough.

Latencies of structures are regular. With the median share τ that a block takes, the share κ of a percent of
cut channels, and what a kind of weights takes of the float network's time,

    ratio = kind · (1 − τ · blocks) · (1 − κ · channels),

and from the nearest measured candidate that differs in its blocks alone, the blocks that are enough follow.
A sampler needs many trials to find this; a search of twenty minutes has no more than a few dozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import median

from onnxcompress.evaluation.gates import Gates
from onnxcompress.search.space import CHANNELS, Candidate, Extent
from onnxcompress.search.trial import Row

Ratios = Mapping[Candidate, float]
"""Candidate -> its latency over the original's."""
MARGIN = 0.01
"""Part by which candidates are to be faster than asked: two measurements differ by as much."""


def wanted_ratio(gates: Gates, rows: Sequence[Row]) -> float | None:
    """Compute the latency over the original's that limits ask for.

    Args:
        gates: The limits.
        rows: Figures of candidates.

    Returns:
        The ratio; None where nothing limits the latency, or it was never measured.
    """
    wanted = [] if gates.min_speedup is None else [1 / gates.min_speedup]
    before = [row["latency_before_ms"] for row in rows if row.get("latency_before_ms")]
    if gates.max_latency is not None and before:
        wanted.append(gates.max_latency / median(before))
    return min(wanted, default=None)


def aimed(known: Ratios, wanted: float, extent: Extent) -> Iterator[Candidate]:
    """List candidates that are expected to be just fast enough: those with fewer channels cut first.

    Args:
        known: What was measured.
        wanted: The latency over the original's that is asked for.
        extent: How far the network can be cut.

    Yields:
        The candidates, also those that are known.
    """
    model = _fit(known)
    if model is None:
        return
    low, high, step = CHANNELS
    cuts = range(low, min(high, extent.channels) + 1, step) if model.channel > 0 else [0]
    left = [kind for kind, ratio in model.kinds.items() if kind.weights == "float32" or ratio < 1]
    for channels in cuts:
        for kind in tuple(left):
            family = replace(kind, channels=channels)
            anchors = [one for one in known if replace(one, blocks=0) == family]
            blocks = model.enough(family, {one.blocks: known[one] for one in anchors}, wanted)
            if blocks <= extent.blocks:
                yield replace(family, blocks=blocks)
            if not blocks:  # fast enough by its weights and channels: more of these would lose more
                left.remove(kind)


@dataclass(frozen=True)
class _Model:
    """What latencies are made of."""

    block: float
    """τ."""
    channel: float
    """κ; 0 where it is not known."""
    kinds: Mapping[Candidate, float]
    """Candidate without cuts -> its latency over the original's."""

    def rest(self, blocks: int, channels: int) -> float:
        """Part of the latency that cuts leave."""
        return max(1 - self.block * blocks, 1e-3) * max(1 - self.channel * channels, 1e-3)

    def enough(self, family: Candidate, anchors: Mapping[int, float], wanted: float) -> int:
        """The blocks that are enough, by the measured candidate of the family that is nearest to them."""
        blocks = 0
        for _ in range(3):  # the nearest one depends on the answer
            at = min(anchors, key=lambda one: abs(one - blocks), default=0)
            expected = self.kinds[replace(family, channels=0)] * self.rest(at, family.channels)
            left = (1 - MARGIN) * wanted / anchors.get(at, expected) * (1 - self.block * at)
            blocks = max(0, ceil((1 - left) / self.block - 1e-9))
        return blocks


def _fit(known: Ratios) -> _Model | None:
    """Fit the model to what was measured; None where no block was dropped alone, or that gained nothing."""
    plain = {one: ratio for one, ratio in known.items() if one.weights == "float32"}
    shares = [(1 - ratio) / one.blocks for one, ratio in plain.items() if one.blocks and not one.channels]
    if not shares or (block := median(shares)) <= 0:
        return None
    shares = [
        (1 - ratio / (1 - block * one.blocks)) / one.channels
        for one, ratio in plain.items()
        if one.channels and block * one.blocks < 1
    ]
    own = _Model(block, max(0.0, median(shares)) if shares else 0.0, {})
    kinds: dict[Candidate, list[float]] = {Candidate(): [1.0]}
    for one, ratio in known.items():
        if one.weights != "float32":
            rest = own.rest(one.blocks, one.channels)
            kinds.setdefault(replace(one, blocks=0, channels=0), []).append(ratio / rest)
    return replace(own, kinds={kind: median(ratios) for kind, ratios in kinds.items()})
