"""Allocate a budget of bits or zeros to layers so that the sum of the layers' errors is least.

    min Σ e_l(c_l)   with   Σ c_l <= B        c_l: the cost of layer l (bits), or what it gives up (zeros)

Only the lower convex hull of each layer's (c, e) counts; steps along all hulls are taken in the order of
their slope, steepest first: the solution of the Lagrangian (Shoham & Gersho, Efficient bit allocation for
an arbitrary set of quantizers, 1988). Zeros can be divided at will, so this is exact for them; with bits, a
step that no longer fits is skipped, and later ones that fit are taken. The errors are those of one layer at
a time (`sensitivity`): that they add up is an assumption.

Between two measured numbers of bits the error is interpolated on a logarithmic scale: one bit less
multiplies its power by about 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from onnxcompress.errors import InputError, OptionError
from onnxcompress.sensitivity.rows import Kind, Row

Curve = dict[float, float]
"""Amount (bits, or share of zeros) -> error."""


@dataclass(frozen=True)
class Point:
    """One possible choice for a layer."""

    cost: float
    error: float
    amount: float
    """The choice: bits, or the share of zeros."""


@dataclass(frozen=True)
class _Step:
    name: str
    start: Point
    end: Point

    @property
    def slope(self) -> float:
        return (self.end.error - self.start.error) / (self.end.cost - self.start.cost)


def curves(rows: Iterable[Row], kind: Kind) -> dict[str, Curve]:
    """Group the measured errors by weight.

    Args:
        rows: The rows of a sensitivity analysis.
        kind: The kind of change to select.

    Returns:
        Name of the weight -> its error at each measured amount.
    """
    by_weight: dict[str, Curve] = {}
    for row in rows:
        if row.kind == kind:
            by_weight.setdefault(row.weight, {})[row.value] = row.error
    return by_weight


def error_at(curve: Curve, bits: int) -> float:
    """Interpolate the error at a number of bits, linearly in its logarithm.

    Args:
        curve: The measured errors.
        bits: A number of bits within the range of the measured ones.

    Returns:
        The error.
    """
    if bits in curve:
        return curve[bits]
    below, above = max(b for b in curve if b < bits), min(b for b in curve if b > bits)
    low, high = (math.log(max(curve[b], 1e-30)) for b in (below, above))
    return math.exp(low + (high - low) * (bits - below) / (above - below))


def stored_bits(bits: int, small_types: bool) -> int:
    """Compute how many bits one element of a weight costs.

    Args:
        bits: Bits to which it is rounded.
        small_types: Whether the file has 4-bit types: then an element takes 4 or 8 bits, else `bits`
            counts.

    Returns:
        The bits to be counted.
    """
    return bits if not small_types else 4 if bits <= 4 else 8


def mixed_bits(
    rows: Sequence[Row],
    sizes: Mapping[str, int],
    floors: Mapping[str, int],
    most: int,
    budget: float,
    *,
    small_types: bool = False,
) -> dict[str, int]:
    """Allocate bits to weights within a budget, with the least sum of errors.

    Args:
        rows: Errors of a sensitivity analysis over weight bits.
        sizes: Name of the weight -> number of elements.
        floors: Name of the weight -> least number of bits.
        most: Largest number of bits.
        budget: Bits of all weights together.
        small_types: Whether the file has 4-bit types, see `stored_bits`.

    Returns:
        Name of the weight -> bits, from its floor to `most`.

    Raises:
        OptionError: Even the floors exceed the budget.
        InputError: A weight that has a choice was not measured, or at other numbers of bits.
    """
    known = curves(rows, "weight_bits")
    hulls = {}
    for name, count in sizes.items():
        points = [
            Point(count * stored_bits(bits, small_types), error, bits)
            for bits, error in _choices(name, known.get(name, {}), floors[name], most)
        ]
        hulls[name] = hull(points)
    at = {name: points[0] for name, points in hulls.items()}
    left = budget - sum(point.cost for point in at.values())
    if left < 0:
        total = max(1, sum(sizes.values()))
        raise OptionError(
            f"a budget of {budget / total:.2f} bits a weight: the least is {(budget - left) / total:.2f}; "
            "allow more, or give the first and last layer fewer bits with --first-last 0"
        )
    for step in _steps(hulls):
        if step.slope < 0 and step.end.cost - step.start.cost <= left and at[step.name] is step.start:
            left -= step.end.cost - step.start.cost
            at[step.name] = step.end
    return {name: int(point.amount) for name, point in at.items()}


def _choices(name: str, curve: Curve, floor: int, most: int) -> list[tuple[int, float]]:
    """List the (bits, error) that a layer may have."""
    if floor >= most:
        return [(floor, 0.0)]
    if len(curve) < 2:
        raise InputError(
            f"weight {name!r}: its error must be known at two numbers of bits at least; measure it with "
            "onnxcompress sensitivity MODEL --weight-bits 2,4,8"
        )
    allowed = range(max(floor, int(min(curve))), min(most, int(max(curve))) + 1)
    if not allowed:
        raise InputError(
            f"weight {name!r}: measured at {min(curve):g} to {max(curve):g} bits, it may have {floor} to "
            f"{most}; measure it there with onnxcompress sensitivity MODEL --weight-bits"
        )
    return [(bits, error_at(curve, bits)) for bits in allowed]


def sparsity_budget(rows: Sequence[Row], sizes: Mapping[str, int], overall: float) -> dict[str, float]:
    """Allocate zeros to weights so that `overall` of all elements are zero, with the least sum of errors.

    Between 0 and the measured sparsities the error is interpolated linearly, and no layer gets more than
    the largest sparsity that was measured for it.

    Args:
        rows: Errors of a sensitivity analysis over at least one sparsity.
        sizes: Name of each weight to be pruned -> number of elements.
        overall: Share of zeros of all these elements, from 0 to below 1.

    Returns:
        Name of the weight -> share of zeros.

    Raises:
        OptionError: The share is out of range, or beyond what was measured.
        InputError: A weight was not measured.
    """
    if not 0 <= overall < 1:
        raise OptionError(f"sparsity {overall:g}: expected a share from 0 to below 1")
    known = curves(rows, "sparsity")
    hulls = {}
    for name, count in sizes.items():
        if name not in known:
            raise InputError(
                f"weight {name!r}: its error was not measured at any sparsity; measure it with "
                "onnxcompress sensitivity MODEL --sparsity 0.5,0.7,0.9"
            )
        measured = [Point(count * share, error, share) for share, error in known[name].items()]
        hulls[name] = hull([Point(0.0, 0.0, 0.0), *measured])
    wanted = left = overall * sum(sizes.values())
    shares = dict.fromkeys(sizes, 0.0)
    for step in _steps(hulls):
        taken = min(left, step.end.cost - step.start.cost)
        shares[step.name] += taken / max(1, sizes[step.name])
        left -= taken
    if left > 1e-9 * max(1.0, wanted):
        reach = sum(points[-1].cost for points in hulls.values()) / max(1, sum(sizes.values()))
        raise OptionError(
            f"sparsity {overall:g}: layers were measured up to {reach:.2f} in all; measure higher ones "
            "with onnxcompress sensitivity MODEL --sparsity"
        )
    return shares


def hull(points: Iterable[Point]) -> list[Point]:
    """Compute the lower convex hull of points.

    Args:
        points: The choices of a layer.

    Returns:
        The hull, by rising cost.
    """
    points_on_hull: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.error)):
        if points_on_hull and point.cost == points_on_hull[-1].cost:
            continue
        while len(points_on_hull) > 1 and _above(points_on_hull[-2], points_on_hull[-1], point):
            points_on_hull.pop()
        points_on_hull.append(point)
    return points_on_hull


def _above(a: Point, b: Point, c: Point) -> bool:
    """Return whether b lies on or above the line from a to c."""
    return (b.error - a.error) * (c.cost - a.cost) >= (c.error - a.error) * (b.cost - a.cost)


def _steps(hulls: Mapping[str, list[Point]]) -> list[_Step]:
    """Sort the steps of all hulls by slope, least first; steps of one hull keep their order."""
    steps = [_Step(name, a, b) for name, points in hulls.items() for a, b in pairwise(points)]
    return sorted(steps, key=lambda step: step.slope)
