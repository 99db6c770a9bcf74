"""Adapters: linear 1×1 maps on the residual stream of a dropped block, and folding them (PRACTISE §3.1).

After a convolution that writes to the stream:   A (W x + b) + a   =  (A W) x + (A b + a)
Before a convolution that reads it:              W ∗ (A x)         =  (W A) ∗ x     at each kernel position

A before-adapter has no bias: zero padding would not see it, and the fold would be wrong at the borders.
Grouped and depthwise convolutions take no dense adapter. Folding is done in float64.

The least-squares adapter of a tensor x that takes the place of y (both (N, C, H, W)):
    A = argmin ‖A x − y‖² + λ ‖A − I‖²  =  (Y Xᵀ + λ I)(X Xᵀ + λ I)⁻¹,   X, Y: (C, N·H·W)
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-2
"""λ as a share of the mean of X Xᵀ's diagonal."""


def fold_after(
    weight: Tensor, bias: Tensor | None, adapter: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Weight (O, I, h, w) and bias (O,) of the convolution followed by A (O, O) and a (O,)."""
    folded = torch.einsum("po,oihw->pihw", adapter.double(), weight.double()).to(weight.dtype)
    total = None if bias is None else adapter.double() @ bias.double()
    if offset is not None:
        total = offset.double() if total is None else total + offset.double()
    return folded, None if total is None else total.to(weight.dtype)


def fold_before(weight: Tensor, adapter: Tensor) -> Tensor:
    """Weight (O, I, h, w) of the convolution whose input is first mapped by A (I, I)."""
    return torch.einsum("oihw,ij->ojhw", weight.double(), adapter.double()).to(weight.dtype)


def least_squares_adapter(cross: Tensor, gram: Tensor, ridge: float = RIDGE) -> Tensor:
    """A (C, C) in float64 from Y Xᵀ and X Xᵀ, both (C, C)."""
    gram, cross = gram.double(), cross.double()
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    damping = ridge * gram.diagonal().mean().clamp_min(1e-12) * eye
    solved: Tensor = torch.linalg.solve(gram + damping, (cross + damping).T)
    return solved.T


def moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(Y Xᵀ, X Xᵀ) of two (N, C, H, W) tensors, each (C, C) in float32."""
    flat_x = x.float().transpose(0, 1).flatten(1)
    flat_y = y.float().transpose(0, 1).flatten(1)
    return flat_y @ flat_x.T, flat_x @ flat_x.T
