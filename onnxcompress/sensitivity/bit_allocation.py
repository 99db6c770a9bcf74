"""What each layer gets under a budget, so that the sum of the layers' errors is least.

    min Σ e_l(c_l)   with   Σ c_l <= B        c_l: what layer l costs (bits), or gives up (zeros)

Of each layer only the lower convex hull of (c, e) counts; steps along all hulls are taken by their slope,
the best first: the solution of the Lagrangian (Shoham & Gersho, Efficient bit allocation for an arbitrary
set of quantizers, 1988). Zeros can be divided at will, so that this is exact; of bits, what is left by a
step that no longer fits goes to the next ones that do. The errors are those of one layer at a time
(`sensitivity`): that they add up is an assumption.

Between two measured numbers of bits the error's logarithm is linear: a bit less quarters its power.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from onnxcompress.errors import InputError, OptionError
from onnxcompress.sensitivity.rows import Kind, Row

Curve = dict[float, float]
"""Amount (bits, share of zeros) -> error."""


@dataclass(frozen=True)
class Point:
    """One choice for a layer."""

    cost: float
    error: float
    amount: float
    """What is chosen: bits, or the share of zeros."""


@dataclass(frozen=True)
class _Step:
    name: str
    start: Point
    end: Point

    @property
    def slope(self) -> float:
        return (self.end.error - self.start.error) / (self.end.cost - self.start.cost)


def curves(rows: Iterable[Row], kind: Kind) -> dict[str, Curve]:
    """By weight name."""
    found: dict[str, Curve] = {}
    for row in rows:
        if row.kind == kind:
            found.setdefault(row.weight, {})[row.value] = row.error
    return found


def error_at(curve: Curve, bits: int) -> float:
    """At a number of bits within the measured ones."""
    if bits in curve:
        return curve[bits]
    below, above = max(b for b in curve if b < bits), min(b for b in curve if b > bits)
    low, high = (math.log(max(curve[b], 1e-30)) for b in (below, above))
    return math.exp(low + (high - low) * (bits - below) / (above - below))


def stored_bits(bits: int, small_types: bool) -> int:
    """What a weight costs: its bits as information, or with 4-bit types those of the type it is held in."""
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
    """Weight name -> bits, from its floor to `most`, for `budget` bits in all.

    sizes: weight name -> elements. Raises OptionError where even the floors are more, InputError where a
    weight with a choice was not measured.
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
    """(bits, error) that a layer may have."""
    if floor >= most:
        return [(floor, 0.0)]
    if len(curve) < 2:
        raise InputError(
            f"weight {name!r}: its error must be known at two numbers of bits at least; measure it with "
            "onnxcompress sensitivity MODEL --weight-bits 2,4,8"
        )
    found = range(max(floor, int(min(curve))), min(most, int(max(curve))) + 1)
    if not found:
        raise InputError(
            f"weight {name!r}: measured at {min(curve):g} to {max(curve):g} bits, it may have {floor} to "
            f"{most}; measure it there with onnxcompress sensitivity MODEL --weight-bits"
        )
    return [(bits, error_at(curve, bits)) for bits in found]


def sparsity_budget(rows: Sequence[Row], sizes: Mapping[str, int], overall: float) -> dict[str, float]:
    """Weight name -> share of zeros, so that `overall` of all elements are zero.

    rows: of `sensitivity` with one sparsity or more; between 0 and those the error is taken to be linear,
    and no layer gets more than was measured of it. sizes: weight name -> elements, of the weights to be
    pruned. Raises OptionError where the budget is out of reach, InputError where a weight was not measured.
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
    found = dict.fromkeys(sizes, 0.0)
    for step in _steps(hulls):
        taken = min(left, step.end.cost - step.start.cost)
        found[step.name] += taken / max(1, sizes[step.name])
        left -= taken
    if left > 1e-9 * max(1.0, wanted):
        reach = sum(points[-1].cost for points in hulls.values()) / max(1, sum(sizes.values()))
        raise OptionError(
            f"sparsity {overall:g}: layers were measured up to {reach:.2f} in all; measure higher ones "
            "with onnxcompress sensitivity MODEL --sparsity"
        )
    return found


def hull(points: Iterable[Point]) -> list[Point]:
    """The lower convex hull, by rising cost."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.error)):
        if found and point.cost == found[-1].cost:
            continue
        while len(found) > 1 and _above(found[-2], found[-1], point):
            found.pop()
        found.append(point)
    return found


def _above(a: Point, b: Point, c: Point) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b.error - a.error) * (c.cost - a.cost) >= (c.error - a.error) * (b.cost - a.cost)


def _steps(hulls: Mapping[str, list[Point]]) -> list[_Step]:
    """Of all hulls, least slope first; of one hull in its order."""
    found = [_Step(name, a, b) for name, points in hulls.items() for a, b in pairwise(points)]
    return sorted(found, key=lambda step: step.slope)
