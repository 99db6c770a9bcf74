"""Which weights stay and their values: figures of fixed problems, and the exact solution on a mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from onnxcompress.optimize.reconstruction.admm_mask import MaskChoice, Problem, refit
from onnxcompress.optimize.reconstruction.sparsity_pattern import UNSTRUCTURED, Pattern

KEPT = int(0.4 * 16 * 64)


def problem() -> tuple[Tensor, Tensor]:
    """Weights (1, 16, 64) and the second moments of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 64, generator=generator).double()
    x = x @ torch.randn(1, 64, 256, generator=generator).double()
    h = x @ x.transpose(1, 2) / 256
    h = h + 1e-2 * torch.diag_embed(h.diagonal(dim1=1, dim2=2).mean(1)[:, None].expand(-1, 64))
    return torch.randn(1, 16, 64, generator=generator).double(), h


def error(new: Tensor, w: Tensor, h: Tensor, rows: Tensor) -> float:
    """Over that of no weight at all."""
    lost, whole = ((((off @ h) * off).sum(2) * rows).sum() for off in (new - w, w))
    return float(lost / whole)


@pytest.mark.parametrize(("pattern", "today"), [(UNSTRUCTURED, 0.0275), (Pattern(2, 4), 0.0270)])
def test_the_error_on_a_fixed_problem_is_what_it_was(pattern: Pattern, today: float) -> None:
    """One ADMM step doubles it, a penalty ten times as large makes it 1.7 times as large."""
    w, h = problem()
    rows = torch.ones(1, 16)
    new = Problem.of(w, h, rows).solve(MaskChoice(KEPT, 1, pattern))
    assert error(new, w, h, rows) == pytest.approx(today, rel=0.1)
    assert int((new != 0).sum()) == (KEPT if pattern == UNSTRUCTURED else 16 * 32)


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
def test_a_trial_errs_little_more_than_the_solution(sparsity: float) -> None:
    """It tells sparsities and layers apart; the largest weights, refitted, do worse."""
    w, h = problem()
    rows, choice = torch.ones(1, 16), MaskChoice(round((1 - sparsity) * w.numel()), 1)
    made = Problem.of(w, h, rows)
    tried = made.approximate(choice, made.inverse(), steps=6, refits=60)
    largest = (
        refit(made.w, made.h, torch.where(choice.mask(made.w.abs()), made.w, 0.0)).double() / made.scale
    )
    solved, trial, least = (error(new, w, h, rows) for new in (made.solve(choice), tried, largest))
    assert int((tried != 0).sum()) == choice.count
    assert solved < trial < 1.5 * solved
    assert trial < least


def test_rows_that_are_worth_more_keep_more_weights() -> None:
    w, h = problem()
    rows = torch.logspace(-2, 2, 16)[None]
    new = Problem.of(w, h, rows).solve(MaskChoice(KEPT, 1))
    assert error(new, w, h, rows) == pytest.approx(0.0016, rel=0.1)
    left = (new[0] != 0).sum(1)
    assert left[:4].sum() < 8
    assert (left[-3:] > 50).all()


def test_a_row_that_is_worth_nothing_is_worth_a_ten_thousandth_of_the_mean() -> None:
    w, h = problem()
    rows = torch.ones(1, 16)
    rows[0, 0] = 0
    scale = Problem.of(w, h, rows).scale[0, :, 0]
    assert float(scale[0] / scale[1]) == pytest.approx((1e-4 * 15 / 16) ** 0.5, rel=1e-3)


def test_the_values_are_the_least_squares_on_their_mask() -> None:
    """From weights that were only set to zero, as from the ones that the masks were chosen by."""
    w, h = problem()
    mask = torch.rand(1, 16, 64, generator=torch.Generator().manual_seed(1)) < 0.4
    start = torch.where(mask, w, 0.0)
    found = refit(w, h, start)[0].numpy()
    for row in range(16):
        at = np.flatnonzero(mask[0, row])
        exact = np.linalg.solve(h[0].numpy()[np.ix_(at, at)], (w[0, row] @ h[0]).numpy()[at])
        np.testing.assert_allclose(found[row, at], exact, rtol=0, atol=1e-3 * np.abs(exact).max())
        assert not np.delete(found[row], at).any()


def test_the_largest_scores_stay_and_of_equal_ones_as_many_as_fit() -> None:
    score = torch.tensor([[[3.0, 1.0, 1.0, 2.0], [1.0, 0.0, 5.0, 1.0]]])
    assert MaskChoice(5, 1).mask(score).int().tolist() == [[[1, 1, 1, 1], [0, 0, 1, 0]]]
    assert MaskChoice(0, 1, Pattern(2, 4)).mask(score).sum(2).tolist() == [[2, 2]]
    taps = torch.tensor([[[0.0, 7, 1, 2, 3, 4, 5, 6]]])  # four inputs of two taps
    assert MaskChoice(0, 2, Pattern(1, 4)).mask(taps).int().tolist() == [[[0, 1, 0, 0, 0, 0, 1, 0]]]


def test_the_units_of_the_inputs_change_nothing() -> None:
    w, h = problem()
    unit = torch.logspace(-1, 1, 64).double()
    plain, other = (
        Problem.of(goal, moments, torch.ones(1, 16)).solve(MaskChoice(KEPT, 1))
        for goal, moments in ((w, h), (w / unit, h * unit * unit[:, None]))
    )
    assert torch.equal(plain != 0, other != 0)
    np.testing.assert_allclose(other * unit, plain, rtol=0, atol=1e-3)
