"""Ranges of activations: the ends of the grid with the least squared error on samples.

    min over low, high:  E (x − x̂)²

tried over shares of the samples' own ends, first both alike, then each alone. A range that clips rare large
values gives the others finer steps: with 8 bits it clips little, with 4 a lot (Banner et al., arXiv
1810.05723, have the closed form for Laplace and normal densities).
"""

from __future__ import annotations

import torch
from torch import Tensor

from onnxcompress.quantization.affine_grid import Grid, activation_grid

SAMPLES = 1 << 16
SHARES = tuple(float(s) for s in torch.linspace(0.15, 1.0, 52))
NARROWER = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
CHUNK = 1 << 20


def fake(x: Tensor, grid: Grid) -> Tensor:
    """The values on the grid, as floats."""
    scale = float(grid.scale)
    return (
        (torch.round(x / scale) + grid.zero_point)
        .clamp_(grid.low, grid.high)
        .sub_(grid.zero_point)
        .mul_(scale)
    )


def samples(values: Tensor, seed: int) -> Tensor:
    """Up to SAMPLES elements, drawn at random, the least and the largest among them."""
    flat = values.reshape(-1)
    if flat.numel() > SAMPLES:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(flat.numel(), (SAMPLES,), generator=generator)
        flat = torch.cat([flat[chosen], flat.amin()[None], flat.amax()[None]])
    return flat.float()


def least_squares(x: Tensor, bits: int, storage: str, symmetric: bool) -> Grid:
    """The grid of that many bits with the least squared error on the samples."""
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
