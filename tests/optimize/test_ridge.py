"""λ of a layer's target, chosen by cross-validation over images."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from onnxcompress.optimize.reconstruction.ridge import (
    FOLDS,
    LADDER,
    MORE_ROWS,
    TARGET_MADE,
    LayerMoments,
    choose_target,
    least_squares,
    merged,
)

pytestmark = pytest.mark.usefixtures("whole_learning")

FAN, OUTPUTS, PLACES = 20, 3, 16


def layer(
    images: int, seed: int, noise: float, gain: float = 1.0, mean: float = 5.0
) -> tuple[Tensor, list[LayerMoments]]:
    """A weight, and moments of images by fold: all places of an image say the same, and err the same."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(1, OUTPUTS, FAN)
    folds = [LayerMoments.empty(weight) for _ in range(FOLDS)]
    for image in range(images):
        alike = torch.randn(1, FAN, 1, generator=generator)
        residual = gain * true_weight() @ alike + noise * torch.randn(1, OUTPUTS, 1, generator=generator)
        part = LayerMoments.empty(weight)
        part.add(
            alike + 0.05 * torch.randn(1, FAN, PLACES, generator=generator) + mean,
            residual.expand(-1, -1, PLACES),
        )
        folds[image % FOLDS].merge(part)
    return weight, folds


def true_weight() -> Tensor:
    return torch.randn(1, OUTPUTS, FAN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
def test_few_images_are_damped_more_and_many_hardly(bias: bool) -> None:
    few = [layer(16, seed, noise=3.0, mean=5.0 * bias) for seed in range(12)]
    many = [layer(400, seed, noise=0.3, mean=5.0 * bias) for seed in range(3)]

    def error(targets: Sequence[float]) -> float:
        """Mean error of the fits to few images."""
        fitted = [
            least_squares(weight, merged(folds), ridge=0, target=target, bias=bias)[0]
            for (weight, folds), target in zip(few, targets, strict=True)
        ]
        return float((torch.stack(fitted) - true_weight().double()).square().mean())

    chosen = [choose_target(*one, bias=bias) for one in few]
    assert sorted(chosen)[6] > 4 * max(choose_target(*one, bias=bias) for one in many)
    assert error(chosen) < 0.9 * error([LADDER[0]] * 12)
    assert error(chosen) < 1.25 * min(error([target] * 12) for target in LADDER)


def test_what_no_image_tells_leaves_the_weight() -> None:
    weight, folds = layer(8, 0, noise=1.0, gain=0.0)
    assert choose_target(weight, folds) >= MORE_ROWS * LADDER[-2]
    assert torch.equal(
        least_squares(weight, merged(folds), ridge=0, target=float("inf"))[0], weight.double()
    )


def test_one_image_cannot_be_left_out() -> None:
    weight, folds = layer(1, 0, noise=1.0)
    assert choose_target(weight, folds) == TARGET_MADE


def test_folds_stay_as_they_are() -> None:
    weight, folds = layer(9, 0, noise=1.0)
    before = [fold.gram.clone() for fold in folds]
    choose_target(weight, folds)
    whole = merged(folds)
    assert all(torch.equal(a, fold.gram) for a, fold in zip(before, folds, strict=True))
    assert whole.rows == 9 * PLACES
