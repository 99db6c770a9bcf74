"""Ranges of activations: against the best of a fine grid of ends, and what the samples are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onnxcompress.optimize.reconstruction.activation_range import (
    SAMPLES,
    fake,
    least_error_reaches,
    least_squares,
    samples,
)
from onnxcompress.quantization.affine_grid import Grid, activation_grid

NORMAL = torch.randn(4000, generator=torch.Generator().manual_seed(0))
KINDS = {
    "normal": NORMAL,
    "of one sign": NORMAL.relu(),
    "heavy tails": NORMAL.sign() * NORMAL.abs() ** 4,
    "outliers on both sides": torch.cat([NORMAL, torch.tensor([12.0, -12.0])]),
    "an outlier above": torch.cat([NORMAL, torch.tensor([9.0])]),
    "more above than below": torch.where(NORMAL < 0, NORMAL / 4, NORMAL.abs() ** 3),
}


def error(x: Tensor, grid: Grid) -> float:
    return float((fake(x, grid) - x).square().mean())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_are_near_the_best_of_a_fine_grid(kind: str, bits: int) -> None:
    x = KINDS[kind]
    low, high = float(x.min()), float(x.max())
    shares = torch.linspace(0.05, 1, 60).tolist()
    lows = [s * low for s in shares] if low < 0 else [0.0]
    best = min(error(x, activation_grid(a, s * high, bits)) for a in lows for s in shares)
    assert error(x, least_squares(x, bits, "uint8", False)) <= 1.06 * best


@pytest.mark.parametrize("kind", ["normal", "outliers on both sides"])
def test_symmetric_ends_are_near_the_best_of_a_fine_grid(kind: str) -> None:
    x = KINDS[kind]
    low, high = float(x.min()), float(x.max())
    tried = (s / 100 for s in range(5, 101))
    best = min(
        error(x, activation_grid(s * low, s * high, 4, storage="int8", symmetric=True)) for s in tried
    )
    found = least_squares(x, 4, "int8", True)
    assert found.zero_point == 0
    assert error(x, found) <= 1.02 * best


def test_samples_are_drawn_by_the_seed_and_hold_the_ends() -> None:
    x = torch.arange(3.0 * SAMPLES).reshape(3, -1)
    first, again, other = (samples([x], seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first) == 2**16 + 2
    assert (float(first.min()), float(first.max())) == (0, 3 * SAMPLES - 1)
    assert 0.32 < float((first[:-2] < SAMPLES).float().mean()) < 0.35
    assert torch.equal(samples([x[:, :5]], 0), x[:, :5].reshape(-1))


@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 7)])
def test_a_symmetric_grid_reaches_as_far_below_zero_as_above(bits: int, steps: int) -> None:
    found = activation_grid(-3.0, 2.0, bits, storage="int8", symmetric=True)
    assert found.bounds[1] == pytest.approx(3)
    assert -3 - float(found.scale) <= found.bounds[0] <= -3 + 1e-6
    assert (found.zero_point, found.high) == (0, steps)
    assert float(found.scale) == pytest.approx(3 / steps)


def test_a_grid_has_its_ends_and_zero() -> None:
    """Zero is one of the numbers, so that the ends move by half a step at most."""
    found = activation_grid(-1.0, 3.0, 8)
    assert found.bounds == pytest.approx((-1, 3), abs=2 / 255)
    assert float(found.scale) == pytest.approx(4 / 255)
    assert activation_grid(1.0, 3.0, 4).bounds == pytest.approx((0, 3))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("signs", [KINDS.keys() - {"of one sign"}, {"of one sign"}], ids=["both", "one"])
def test_each_channel_reaches_as_far_as_errs_least(signs: set[str], bits: int) -> None:
    """Against a fine grid of ends, each channel for itself, whatever its size."""
    rows = [KINDS[kind][:4000] * size for kind in sorted(signs) for size in (0.01, 100.0)]
    low, high = (0, 2**bits - 1) if signs == {"of one sign"} else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def loss(x: Tensor, reach: float) -> float:
        scale = reach / high
        return float(((x / scale).round().clamp(low, high) * scale - x).square().mean())

    for x, reach in zip(rows, least_error_reaches(torch.stack(rows), bits).tolist(), strict=True):
        best = min(loss(x, s * float(x.abs().max())) for s in torch.linspace(0.02, 1, 200).tolist())
        assert loss(x, reach) <= 1.1 * best
