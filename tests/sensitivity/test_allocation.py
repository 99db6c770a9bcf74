"""Zeros for each layer by measured costs: against a search through all shares, with costs from the text."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxcompress.errors import OptionError
from onnxcompress.sensitivity.bit_allocation import mixed_bits
from onnxcompress.sensitivity.rows import Row
from onnxcompress.sensitivity.sparsity_allocation import by_cost, by_magnitude, share_of, uniform

LEVELS = (0.3, 0.5, 0.65, 0.8, 0.9, 0.95)
SIZES = {"a": 1000, "b": 400, "c": 4000}


def cost_at(costs: list[float], share: float) -> float:
    """Log-linear between levels and beyond the last, cubic in the share below the first."""
    if share < LEVELS[0]:
        return costs[0] * (share / LEVELS[0]) ** 3
    at = min(int(np.searchsorted(LEVELS, share, side="right")) - 1, len(LEVELS) - 2)
    part = (share - LEVELS[at]) / (LEVELS[at + 1] - LEVELS[at])
    return float(costs[at] ** (1 - part) * costs[at + 1] ** part)


def total(costs: dict[str, list[float]], shares: dict[str, float]) -> float:
    return sum(cost_at(costs[name], share) for name, share in shares.items())


def random_costs(seed: int) -> dict[str, list[float]]:
    """Rising at each level, faster where the layer is more sensitive."""
    rng = np.random.default_rng(seed)
    return {
        name: list(float(rng.lognormal(0, 1.5)) * np.cumprod(rng.uniform(1.5, 6, len(LEVELS))))
        for name in SIZES
    }


@pytest.mark.parametrize("sparsity", [0.15, 0.4, 0.7, 0.93])
@pytest.mark.parametrize("seed", range(3))
def test_zeros_by_cost_are_the_best_of_all_shares(seed: int, sparsity: float) -> None:
    costs, weights = random_costs(seed), sum(SIZES.values())
    found = by_cost(costs, LEVELS, SIZES, weights, sparsity)
    zeros = sum(found[name] * SIZES[name] for name in SIZES)
    assert zeros == pytest.approx(sparsity * weights)
    best = np.inf
    for a, b in itertools.product(np.linspace(0, 0.98, 99), repeat=2):
        c = (sparsity * weights - a * SIZES["a"] - b * SIZES["b"]) / SIZES["c"]
        if 0 <= c <= 0.98:
            best = min(best, total(costs, {"a": float(a), "b": float(b), "c": float(c)}))
    assert total(costs, found) <= 1.02 * best


def test_a_cost_that_falls_with_more_zeros_is_noise() -> None:
    """The largest so far counts: such a layer is not cheaper than one that costs as much all along."""
    rising = {"a": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0], "b": [8.0, 2.0, 4.0, 8.0, 16.0, 32.0]}
    flat = rising | {"b": [8.0, 8.0, 8.0, 8.0, 16.0, 32.0]}
    sizes = {"a": 100, "b": 100}
    one, other = (by_cost(costs, LEVELS, sizes, 200, 0.5) for costs in (rising, flat))
    assert one == pytest.approx(other)


def test_layers_that_stay_dense_leave_more_zeros_to_the_others() -> None:
    assert share_of(300, 400, 0.6) == pytest.approx(0.8)
    assert uniform({"a": 100, "b": 200}, 400, 0.6) == pytest.approx({"a": 0.8, "b": 0.8})
    found = by_cost(random_costs(0), LEVELS, SIZES, 2 * sum(SIZES.values()), 0.3)
    assert sum(found[name] * SIZES[name] for name in SIZES) == pytest.approx(0.6 * sum(SIZES.values()))
    ranks = {"a": np.arange(100.0), "b": np.arange(100.0, 300)}
    assert by_magnitude(ranks, 600, 0.25) == pytest.approx({"a": 0.98, "b": 0.25}, abs=0.01)
    with pytest.raises(OptionError, match=r"only 300 of 400 weights may become 0; at most 0\.73 can"):
        share_of(300, 400, 0.74)


def bits(errors: dict[str, dict[int, float]], sizes: dict[str, int], left: int) -> dict[str, int]:
    """Bits of each weight where `left` bits remain beyond two for each element."""
    rows = [
        Row(name, "Conv", name, sizes[name], "weight_bits", amount, error, None)
        for name, curve in errors.items()
        for amount, error in curve.items()
    ]
    most = max(max(curve) for curve in errors.values())
    budget = 2 * sum(sizes.values()) + left
    return mixed_bits(rows, sizes, dict.fromkeys(sizes, 2), most, budget)


def test_bits_go_where_they_gain_most_for_their_cost() -> None:
    """Two small layers that gain 0.4 each, before one as large as both that gains 0.5."""
    errors = {"large": {2: 1.0, 3: 0.5}, "one": {2: 1.0, 3: 0.6}, "two": {2: 1.0, 3: 0.6}}
    sizes = {"large": 1000, "one": 500, "two": 500}
    assert bits(errors, sizes, 1000) == {"large": 2, "one": 3, "two": 3}


def test_a_step_that_does_not_fit_is_not_skipped_over() -> None:
    """From 2 bits only 6 are worth their cost; where they do not fit, 7 do even less."""
    curve = {2: 1.0, 3: 0.99, 4: 0.98, 5: 0.97, 6: 0.1, 7: 0.05, 8: 0.04}
    assert bits({"a": curve}, {"a": 10}, 10) == {"a": 2}
    assert bits({"a": curve}, {"a": 10}, 40) == {"a": 6}
    assert bits({"a": curve}, {"a": 10}, 59) == {"a": 7}
