"""The search for sets of blocks, against all subsets."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.optimize.block_drop.subsets import cheapest_sets

VALUE = st.floats(0.001, 1)


def all_sets(
    losses: list[float], shares: list[float], target: float
) -> list[tuple[float, tuple[int, ...]]]:
    """All subsets that reach the target and need each of their blocks for it, the lowest loss first."""
    places = range(len(losses))
    sets = chain.from_iterable(combinations(places, size) for size in range(1, len(losses) + 1))
    total = {s: sum(shares[i] for i in s) for s in sets}
    reach = [s for s in total if total[s] >= target and all(total[s] - shares[i] < target for i in s)]
    return sorted((sum(losses[i] for i in s), s) for s in reach)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(VALUE, VALUE), min_size=1, max_size=8), st.floats(0.05, 0.95))
def test_the_sets_are_the_best_of_all_in_order(blocks: list[tuple[float, float]], part: float) -> None:
    losses, shares = [b[0] for b in blocks], [b[1] for b in blocks]
    target = part * sum(shares)
    found = list(cheapest_sets(losses, shares, target, 8))
    expected = all_sets(losses, shares, target)
    assert len(set(found)) == len(found)
    assert found
    for chosen, (loss, _) in zip(found, expected, strict=False):
        assert sum(losses[i] for i in chosen) == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert sum(shares[i] for i in chosen) >= target - 1e-6


@pytest.mark.parametrize("percent", range(5, 45, 5))
@pytest.mark.parametrize("seed", range(5))
def test_the_loss_of_twelve_blocks_is_that_of_the_best_subset(seed: int, percent: int) -> None:
    rng = np.random.default_rng(seed)
    losses, shares = rng.lognormal(-3, 1.5, 12).tolist(), rng.uniform(0.01, 0.09, 12).tolist()
    if sum(shares) < percent / 100:
        assert not list(cheapest_sets(losses, shares, percent / 100, 1))
        return
    (best,) = cheapest_sets(losses, shares, percent / 100, 1)
    loss, _ = all_sets(losses, shares, percent / 100)[0]
    assert sum(losses[i] for i in best) == pytest.approx(loss, rel=1e-3)


def test_no_block_that_the_target_does_not_need() -> None:
    """By R / τ the first two would go and then the third, which saves enough with the second."""
    assert next(cheapest_sets([0.01, 0.02, 0.05], [0.08, 0.09, 0.15], 0.24, 1)) == (1, 2)
    for chosen in cheapest_sets([0.0, 0.0, 0.1], [0.1, 0.1, 0.1], 0.2, 4):
        assert len(chosen) == 2
