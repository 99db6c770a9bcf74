"""How sure a ratio is: against simulation, of samples that are independent and of such that are not."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.runtime.block_latency import Additivity, Share, added, additivity_text
from onnxcompress.runtime.bootstrap import bootstrap, half_width, ratio_of


def noise(rounds: int, memory: float, seed: int) -> np.ndarray:
    """Around 1, each round remembering `memory` of the one before; deviation 0.1."""
    rng = np.random.default_rng(seed)
    values, last = np.empty(rounds), 0.0
    for index in range(rounds):
        last = memory * last + np.sqrt(1 - memory**2) * rng.standard_normal()
        values[index] = 1 + 0.1 * last
    return values


def width(memory: float) -> float:
    """Mean width of the interval of a median of 200 rounds."""
    found = [half_width(noise(200, memory, seed)[:, None]) for seed in range(12)]
    return float(np.mean(found))


def test_samples_that_hang_together_have_a_wider_interval() -> None:
    """Of independent ones it is 1.96 √(π/2) σ/√n; blocks of neighbours see that others say less."""
    plain = width(0.0)
    assert plain == pytest.approx(1.96 * np.sqrt(np.pi / 2) * 0.1 / np.sqrt(200), rel=0.15)
    assert width(0.8) > 1.6 * plain


def test_an_interval_holds_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 pairs with the ratio 2: 95 % and 50 % of them."""
    monkeypatch.setattr("onnxcompress.runtime.bootstrap.RESAMPLES", 300)
    pairs = [np.array([noise(60, 0.0, 2 * seed), 2 * noise(60, 0.0, 2 * seed + 1)]).T for seed in range(24)]
    for confidence, least, most in ((0.95, 20, 24), (0.5, 7, 17)):
        found = [ratio_of(pair, confidence) for pair in pairs]
        assert least <= sum(one.low <= 2 <= one.high for one in found) <= most
        assert all(one.low <= one.value <= one.high for one in found)
    assert found[0].value == pytest.approx(np.median(pairs[0][:, 1] / pairs[0][:, 0]))


def test_medians_are_of_rounds_that_all_models_ran_in() -> None:
    """Columns are drawn together: the second is always twice the first."""
    first = noise(50, 0.0, 0)
    medians = bootstrap(np.array([first, 2 * first]).T, 100)
    assert medians.shape == (100, 2)
    np.testing.assert_allclose(medians[:, 1], 2 * medians[:, 0])
    assert len(np.unique(medians[:, 0])) > 10


def test_savings_add_up_with_the_ends_of_their_intervals() -> None:
    found = added([Share(0.2, 0.1, 0.25), Share(0.05, -0.05, 0.1)])
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.05, 0.35))


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        ([0.2, 0.16, 0.24], "they add up, within the intervals"),
        ([0.1, 0.05, 0.16], "they add up, within the intervals"),
        ([0.37, 0.33, 0.41], "they add up, within the intervals"),
        ([0.1, 0.05, 0.14], "they do not add up"),
        ([0.4, 0.36, 0.5], "they do not add up"),
    ],
)
def test_whether_savings_add_up_is_a_sentence(measured: list[float], verdict: str) -> None:
    text = additivity_text(Additivity(Share(0.25, 0.15, 0.35), Share(*measured)))
    value, low, high = (100 * part for part in measured)
    assert text == (
        "the blocks' shares τ add up to 25.0 % (15.0 to 35.0 %), measured are "
        f"{value:.1f} % ({low:.1f} to {high:.1f} %): {verdict}"
    )
