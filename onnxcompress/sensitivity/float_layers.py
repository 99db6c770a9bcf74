"""Which layers to leave as they are, so that the others together lose no more than is allowed.

    fewest layers F   with   Σ over layers not in F, and kinds of change, of  error  <= allowed

Errors of single layers are added, as a budget of bits does (`sensitivity.bit_allocation`): roughly right as
long as they are small. The fewest layers are then those with the largest errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxcompress.errors import OptionError
from onnxcompress.sensitivity.rows import Row


@dataclass(frozen=True)
class FloatLayers:
    """The layers to leave as they are, and what that saves."""

    names: tuple[str, ...]
    """Names of the layers, the most costly first: patterns for `quantize --exclude`."""
    whole: float
    """Error with all layers changed, as the sum of what each costs."""
    left: float
    """Error with these layers left as they are."""


def check_allowed(allowed: float) -> None:
    """Check the largest error of the outputs that is allowed.

    Args:
        allowed: The error: squared, over the outputs' variance.

    Raises:
        OptionError: It is not above 0.
    """
    if not allowed > 0:  # NaN is not, either
        raise OptionError(f"--max-loss {allowed:g}: expected more than 0")


def float_layers(rows: Sequence[Row], allowed: float) -> FloatLayers:
    """Choose the fewest layers to leave as they are.

    Args:
        rows: Rows of a sensitivity analysis; of several values of a kind the first one counts.
        allowed: Largest error of the outputs: squared, over their variance.

    Returns:
        The layers.

    Raises:
        OptionError: The allowed error is not above 0.
    """
    check_allowed(allowed)
    first: dict[str, float] = {}
    costs: dict[str, float] = {}
    for row in rows:
        if first.setdefault(row.kind, row.value) == row.value:
            costs[row.layer] = costs.get(row.layer, 0.0) + row.error
    left = whole = sum(costs.values())
    names: list[str] = []
    for name in sorted(costs, key=lambda name: -costs[name]):
        if left <= allowed:
            break
        names.append(name)
        left = sum(cost for other, cost in costs.items() if other not in names)
    return FloatLayers(tuple(names), whole, left)
