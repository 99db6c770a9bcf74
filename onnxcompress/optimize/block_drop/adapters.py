"""Adapters: linear 1×1 maps on the residual stream of a dropped block, and folding them (PRACTISE §3.1).

After a convolution that writes to the stream:   A (W x + b) + a   =  (A W) x + (A b + a)
Before a convolution that reads it:              W ∗ (A x)         =  (W A) ∗ x     at each kernel position

A before-adapter has no bias: zero padding would not see it, and the fold would be wrong at the borders.
Grouped and depthwise convolutions take no dense adapter. Folding is done in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
