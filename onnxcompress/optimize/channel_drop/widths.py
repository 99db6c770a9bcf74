"""Which widths groups of channels may have, and the order in which they are narrowed.

Latency falls with the width of a layer in steps: a device computes 8, 16 or 32 channels at once, and a
network with 5 % fewer channels can be slower. So groups keep multiples of a step, the latency of each such
width is measured, and a group goes from one width to the next only where that gains something. A group's
widths on the lower convex hull of cost over gain, all groups' steps in order of cost per gain: any first
part of that order has the least cost for its gain, as far as costs and gains of groups add up (the greedy
solution of the multiple-choice knapsack problem; Sinha & Zoltners, Operations Research 27, 1979).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from onnxcompress.graph.channel_groups.cut_tracer import CutGroup

STEPS = (4, 8, 16, 32)
"""Multiples that groups may keep, the smallest that leaves WIDTHS of them."""
WIDTHS = 8
"""Widths of a group that are tried, at most, where a step allows it."""
TRIED = 3
"""Times that steps are tried to be taken back, or to be replaced by others, at most."""
LEAST_GAIN = 1e-4
"""Part of the whole that a step must gain: less is noise."""


@dataclass(frozen=True)
class Narrowing:
    """A step of a group from one width to the next."""

    group: str
    kept: int
    """Channels that are left after it."""
    cost: float
    gain: float
    """Part of the latency, or of the multiply-accumulates, that it saves."""
    shorter: tuple[Narrowing, ...] = ()
    """Steps from the same width that gain less, the one that costs least first: each costs more for what it
    gains, and can be enough where the last step need not gain all."""


def possible_widths(group: CutGroup, step: int = 0) -> list[int]:
    """List the widths that a group may have besides its own.

    Args:
        group: The group.
        step: Channels that a device likes multiples of; 0: by the width.

    Returns:
        Numbers of channels to keep, the largest first. Where several channels must go together they count
        as one, and the step is divided by their number.
    """
    together = max((m.channels.shape[1] for m in group.group.members if m.side == "outputs"), default=1)
    real = group.width * together
    chosen = step or next(
        (s for s in STEPS if real <= s * WIDTHS), max(STEPS[-1], real // WIDTHS // 32 * 32)
    )
    each = max(1, chosen // together)
    return list(range((group.width - 1) // each * each, 0, -each))


def thinned(widths: Sequence[int], most: int) -> list[int]:
    """Leave out some of many widths, evenly.

    Args:
        widths: The widths.
        most: Widths to keep, at most.

    Returns:
        Some of them in the same order.
    """
    if len(widths) <= most:
        return list(widths)
    return [widths[(place + 1) * len(widths) // (most + 1)] for place in range(most)]


def signature(group: CutGroup) -> Hashable:
    """Describe what the latency of a group's widths depends on.

    Args:
        group: The group.

    Returns:
        Equal values for groups of equal layers.
    """
    members = [
        (
            m.side,
            m.channels.shape,
            m.layer.linear.node.op,
            m.layer.linear.weight.shape,
            m.layer.linear.groups,
        )
        for m in group.group.members
    ]
    return group.macs, group.parameters, tuple(members)


def narrowings(
    costs: Mapping[str, Sequence[float]], gains: Mapping[str, Mapping[int, float]]
) -> list[Narrowing]:
    """Order the steps of all groups by cost per gain.

    Args:
        costs: Name of a group -> cost of losing its first n channels, (channels,).
        gains: Name of a group -> channels kept -> part of the whole that this saves.

    Returns:
        The steps. Those of one group come in the order of its widths.
    """
    steps = []
    for name, widths in gains.items():
        count = len(costs[name])
        points = [(gain, float(costs[name][count - kept]), kept) for kept, gain in widths.items()]
        hull = [(0.0, 0.0, count)]
        for gain, cost, kept in sorted(points, key=lambda point: (point[1], -point[0])):
            if gain <= hull[-1][0] + LEAST_GAIN:
                continue  # it is no faster than one that costs less
            while len(hull) > 1 and _slope(hull[-2], (gain, cost)) <= _slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append((gain, cost, kept))
        for before, after in pairwise(hull):
            inside = [p for p in points if before[0] < p[0] < after[0] and before[1] <= p[1] < after[1]]
            shorter = tuple(_step(name, before, p) for p in sorted(inside, key=lambda point: point[1]))
            steps.append(replace(_step(name, before, after), shorter=shorter))
    return sorted(steps, key=lambda step: step.cost / step.gain)


def _step(name: str, before: tuple[float, float, int], after: tuple[float, float, int]) -> Narrowing:
    return Narrowing(name, after[2], after[1] - before[1], after[0] - before[0])


def _slope(start: Sequence[float], end: Sequence[float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def widths_after(steps: Sequence[Narrowing]) -> dict[str, int]:
    """Compute the widths that steps lead to.

    Args:
        steps: The steps.

    Returns:
        Name of each group that loses channels -> channels that it keeps.
    """
    kept: dict[str, int] = {}
    for step in steps:
        kept[step.group] = min(step.kept, kept.get(step.group, step.kept))
    return kept


@dataclass(frozen=True)
class WidthChoice:
    """Widths of groups, and what they save."""

    kept: Mapping[str, int]
    saved: float


def choose_widths(
    steps: Sequence[Narrowing], target: float, saving: Callable[[Mapping[str, int]], float]
) -> WidthChoice:
    """Find the smallest first part of the steps that saves enough, then better its end.

    The last step is replaced where later ones cost less, and what is not needed is taken back.

    Args:
        steps: Steps of all groups, in the order in which they are taken.
        target: Part of the whole to be saved.
        saving: Measures what widths save.

    Returns:
        The widths; all steps are taken where even they do not save enough.
    """
    if not steps:
        return WidthChoice({}, 0.0)
    sums = list(accumulate(step.gain for step in steps))
    measured: dict[int, float] = {}
    low, high = 0, len(steps)  # the first `low` save too little
    number = bisect_left(sums, target) + 1
    while high - low > 1 or high not in measured:
        number = min(max(number, low + 1), high)
        if number in measured:
            number = (low + high) // 2
        saved = measured[number] = saving(widths_after(steps[:number]))
        if saved >= target:
            high = number
        elif number == len(steps):
            return WidthChoice(widths_after(steps), saved)
        else:
            low = number
        number = bisect_left(sums, target * sums[number - 1] / max(saved, 1e-3)) + 1
    taken, saved = _with_smaller_end(steps, high, measured[high], target, saving)
    return _without_needless(taken, saved, target, saving)


def _with_smaller_end(
    steps: Sequence[Narrowing],
    number: int,
    saved: float,
    target: float,
    saving: Callable[[Mapping[str, int]], float],
) -> tuple[Sequence[Narrowing], float]:
    """Replace the last of the first steps by a shorter one, or by later ones that cost less together.

    The last one may save far more than what the others lack, at a cost to match.
    """
    last, others = steps[number - 1], list(steps[: number - 1])
    scale = saved / max(sum(step.gain for step in steps[:number]), 1e-9)
    tried, before = 0, sum(step.gain for step in others)
    for step in last.shorter:
        if tried < TRIED and scale * (before + step.gain) >= target:
            tried += 1
            smaller = saving(widths_after([*others, step]))
            if smaller >= target:
                return [*others, step], smaller
    tried = 0
    for step in steps[number:]:
        if step.group == last.group:
            continue
        others.append(step)
        if tried == TRIED or sum(s.cost for s in others[number - 1 :]) >= last.cost:
            break
        if scale * sum(s.gain for s in others) >= target:
            tried += 1
            smaller = saving(widths_after(others))
            if smaller >= target:
                return others, smaller
    return steps[:number], saved


def _without_needless(
    steps: Sequence[Narrowing],
    saved: float,
    target: float,
    saving: Callable[[Mapping[str, int]], float],
) -> WidthChoice:
    """Take back the steps that cost most where the others still save enough."""
    taken = list(steps)
    scale = saved / max(sum(step.gain for step in taken), 1e-9)
    tried = 0
    for step in sorted(taken, key=lambda s: -s.cost):
        rest = [s for s in taken if s is not step]
        last = all(s.kept > step.kept for s in rest if s.group == step.group)
        if tried == TRIED or not rest or not last or saved - scale * step.gain < target:
            continue
        tried += 1
        without = saving(widths_after(rest))
        if without >= target:
            taken, saved = rest, without
    return WidthChoice(widths_after(taken), saved)
