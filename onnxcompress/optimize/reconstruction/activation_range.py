"""Ranges of activations: the ends of the grid with the least squared error on samples.

    min over low, high:  E (x − x̂)²

tried over shares of the samples' own ends, first both alike, then each alone. A range that clips rare large
values gives the others finer steps: with 8 bits it clips little, with 4 a lot (Banner et al., arXiv
1810.05723, have the closed form for Laplace and normal densities).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onnxcompress.quantization.affine_grid import Grid, activation_grid

SAMPLES = 1 << 16
SHARES = tuple(float(s) for s in torch.linspace(0.15, 1.0, 52))
NARROWER = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
CHUNK = 1 << 20


def fake(x: Tensor, grid: Grid) -> Tensor:
    """Round values to a grid.

    Args:
        x: The values.
        grid: The grid.

    Returns:
        The nearest values of the grid, as floats.
    """
    scale = float(grid.scale)
    return (
        (torch.round(x / scale) + grid.zero_point)
        .clamp_(grid.low, grid.high)
        .sub_(grid.zero_point)
        .mul_(scale)
    )


def samples(parts: Sequence[Tensor], seed: int) -> Tensor:
    """Draw elements of a tensor at random, the least and the largest among them.

    Args:
        parts: The tensor's parts along its first axis, all but the last one of one size.
        seed: Random seed.

    Returns:
        SAMPLES elements and the two ends, or all elements where there are no more, float32.
    """
    total, size = sum(part.numel() for part in parts), parts[0].numel()
    if total <= SAMPLES:
        return torch.cat([part.reshape(-1) for part in parts]).float()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(total, (SAMPLES,), generator=generator)
    drawn = torch.empty(SAMPLES, dtype=parts[0].dtype)
    owner = chosen // size
    for index, part in enumerate(parts):
        here = (owner == index).nonzero()[:, 0]
        drawn[here] = _elements(part, chosen[here] - index * size)
    ends = torch.stack([end for part in parts for end in torch.aminmax(part)])
    return torch.cat([drawn, ends.amin()[None], ends.amax()[None]]).float()


def _elements(values: Tensor, places: Tensor) -> Tensor:
    """Return elements by their places. For the first torch.unravel_index torch imports sympy: a second."""
    axes = []
    for size in reversed(values.shape):
        axes.append(places % size)
        places = places // size
    return values[tuple(reversed(axes))]


def least_squares(x: Tensor, bits: int, storage: str, symmetric: bool) -> Grid:
    """Choose the grid with the least squared error on samples.

    Args:
        x: The samples.
        bits: Bits of the grid.
        storage: Type of its integers.
        symmetric: Whether 0 lies in its middle.

    Returns:
        The grid.
    """
    low, high = float(x.amin()), float(x.amax())

    def grid(a: float, b: float) -> Grid:
        return activation_grid(a * low, b * high, bits, storage=storage, symmetric=symmetric)

    def error(one: Grid) -> float:
        return float((fake(x, one) - x).square().mean())

    share = min(SHARES, key=lambda s: error(grid(s, s)))
    if low >= 0 or symmetric:
        return grid(share, share)
    a, b = min(((share * p, share * q) for p in NARROWER for q in NARROWER), key=lambda e: error(grid(*e)))
    return grid(a, b)


def least_error_reaches(x: Tensor, bits: int) -> Tensor:
    """Choose for each channel how far its own grid reaches, with the least squared error on samples.

    Args:
        x: Samples of a tensor, (C, n).
        bits: Bits of the grids; without a value below 0 all steps lie above it, else half of them.

    Returns:
        The reaches, (C,), at most the largest magnitude of each channel.
    """
    farthest = x.abs().amax(1).clamp_min(1e-30)
    low, high = (0, 2**bits - 1) if bool((x >= 0).all()) else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    errors = []
    for share in SHARES:
        scale = (share / high * farthest)[:, None]
        errors.append((torch.round(x / scale).clamp_(low, high).mul_(scale) - x).square_().mean(1))
    return farthest * torch.tensor(SHARES)[torch.stack(errors).argmin(0)]
