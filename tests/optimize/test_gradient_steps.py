"""Steps are those of torch's classes, which cost a second and 75 MB more."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxcompress.optimize.gradient_steps import Adam, Momentum

RATES = (0.1, 0.02)
SHARES = (0.5, 1.0, 0.25)


def values() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator)]


def slopes_at(step: int) -> list[Tensor]:
    return [(step + 1.0) * value.flip(0) for value in values()]


def by_class(optimizer: torch.optim.Optimizer, changed: list[Tensor]) -> list[Tensor]:
    """Take the same steps by a class of torch; each value has a group of its own."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step, share in enumerate(SHARES):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = share * peak
        for value, slope in zip(changed, slopes_at(step), strict=True):
            value.grad = slope
        optimizer.step()
    return changed


def test_adam() -> None:
    changed, other = values(), values()
    groups = [{"params": [value], "lr": rate} for value, rate in zip(other, RATES, strict=True)]
    adam = Adam(changed, RATES, betas=(0.5, 0.9), eps=1e-6)
    for step, share in enumerate(SHARES):
        adam.step(slopes_at(step), share)
    expected = by_class(torch.optim.Adam(groups, betas=(0.5, 0.9), eps=1e-6), other)
    assert all(map(torch.equal, changed, expected))


def test_momentum() -> None:
    changed, other = values(), values()
    momentum = Momentum(changed, 0.9)
    for step, share in enumerate(SHARES):
        momentum.step(slopes_at(step), 0.1 * share)
    expected = by_class(torch.optim.SGD(other, lr=0.1, momentum=0.9), other)
    assert all(map(torch.equal, changed, expected))
