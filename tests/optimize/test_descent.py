"""Steps of fine-tuning: matrices are moved alike in all directions, others as Adam moves them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onnxcompress.optimize.reconstruction.descent import BETAS, SIZE, Descent, is_matrix, orthogonalized


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 6, 20), (1, 20, 6), (3, 8, 8)])
def test_singular_values_come_near_1_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    x = random(*shape)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonalized(x) @ vh.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.3
    assert float((inner - torch.diag_embed(values)).abs().max()) < 1e-4


def test_a_matrix_of_zeros_stays() -> None:
    assert not orthogonalized(torch.zeros(1, 3, 4)).any()


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((8, 4, 3, 3), True), ((5, 7), True), ((4, 1, 3, 3), False), ((4,), False), ((1, 4, 1, 1), False)],
)
def test_which_weights_are_matrices(shape: tuple[int, ...], wanted: bool) -> None:
    """Not depthwise ones, biases and factors for channels."""
    assert is_matrix(torch.zeros(shape)) is wanted


def moved(values: list[Tensor], sizes: list[float], share: float = 1.0) -> list[Tensor]:
    """What one step adds to each value, with random gradients."""
    leaves = [value.clone().requires_grad_() for value in values]
    descent = Descent(leaves, sizes, 0.1)
    for at, leaf in enumerate(leaves):
        leaf.grad = random(*leaf.shape, seed=at + 1)
    descent.step(share)
    return [leaf.detach() - value for leaf, value in zip(leaves, values, strict=True)]


def test_a_step_of_a_matrix_is_as_long_as_rate_and_size_say_and_against_the_gradient() -> None:
    weights = [random(6, 4, 3, 3), random(6, 36, seed=3), random(8, 3, seed=4)]
    for at, (step, size) in enumerate(
        zip(moved(weights, [1.0, 2.0, 0.5], 0.25), (1.0, 2.0, 0.5), strict=True)
    ):
        assert float(step.square().mean().sqrt()) == pytest.approx(SIZE * 0.1 * 0.25 * size, rel=1e-3)
        assert float((step * random(*step.shape, seed=at + 1)).sum()) < 0


def test_matrices_of_one_shape_do_not_depend_on_each_other() -> None:
    both = moved([random(6, 5), random(6, 5, seed=8)], [1.0, 1.0])
    torch.testing.assert_close(both[0], moved([random(6, 5)], [1.0])[0], rtol=1e-4, atol=1e-6)


def test_others_take_adams_step() -> None:
    bias = torch.zeros(5)
    found = moved([bias], [2.0], 0.5)[0]
    wanted = torch.zeros(5, requires_grad=True)
    wanted.grad = random(5, seed=1)
    torch.optim.Adam([wanted], lr=0.1 * 2.0 * 0.5, betas=BETAS).step()
    torch.testing.assert_close(found, wanted.detach())


def test_a_badly_scaled_problem_is_solved_in_few_steps() -> None:
    """A gradient that is 1,000 times as large in one direction does not hide the others."""
    scale = torch.logspace(0, -1.5, 8)
    target, value = random(8, 8), torch.zeros(8, 8, requires_grad=True)
    descent = Descent([value], [1.0], 0.3)
    for step in range(60):
        value.grad = (value.detach() - target) * scale**2
        descent.step(1 - step / 60)
    assert float((value.detach() - target).square().mean()) < 0.1


def test_without_orthogonal_steps_all_are_those_of_adam() -> None:
    value = torch.arange(12.0).reshape(3, 4).requires_grad_()
    other = value.detach().clone().requires_grad_()
    descent = Descent([value], [2.0], 0.01, orthogonal=False)
    adam = torch.optim.Adam([other], lr=0.02, betas=(0.9, 0.98))
    for scale in (1.0, -3.0):
        for x in (value, other):
            x.grad = scale * torch.linspace(-1, 1, 12).reshape(3, 4)
        descent.step(1.0)
        adam.step()
    assert torch.equal(value, other)


def test_slowing_down_divides_the_rates_and_forgets_what_was_learned() -> None:
    """A step after it is that of a new descent at the smaller rate."""
    generator = torch.Generator().manual_seed(0)
    slopes = [torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator)]
    found = []
    for fresh in (False, True):
        values = [torch.zeros(3, 4, requires_grad=True), torch.zeros(4, requires_grad=True)]
        descent = Descent(values, [1.0, 2.0], 0.1 / 4 if fresh else 0.1)
        if not fresh:
            for value in values:
                value.grad = torch.ones_like(value)
            descent.step(1.0)
            descent.slow_down(4.0)
            for value in values:
                value.data.zero_()
        for value, slope in zip(values, slopes, strict=True):
            value.grad = slope.clone()
        descent.step(1.0)
        found.append([value.detach().clone() for value in values])
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))
    assert all(value.abs().max() > 0 for value in found[0])
