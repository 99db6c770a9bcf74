"""Adapters: linear 1×1 maps on the residual stream of a dropped block, and folding them (PRACTISE §3.1).

After a convolution that writes to the stream:   A (W x + b) + a   =  (A W) x + (A b + a)
Before a convolution that reads it:              W ∗ (A x)         =  (W A) ∗ x     at each kernel position

An adapter before a convolution has no bias: zero padding would not see it, and the fold would be wrong at
the borders. Grouped and depthwise convolutions take no dense adapter. Folding is done in float64. Source:
Wang & Wu, Practical Network Acceleration with Tiny Sets (CVPR 2023, arXiv 2202.07861).
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold_after(
    weight: Tensor, bias: Tensor | None, adapter: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Fold an adapter into the convolution before it: W' = A W, b' = A b + a.

    Args:
        weight: W, (O, I, h, w).
        bias: b, (O,), or None.
        adapter: A, (O, O).
        offset: a, (O,), or None.

    Returns:
        The weight (O, I, h, w) and the bias (O,), which is None where neither a bias nor an offset is
        given.
    """
    folded = torch.einsum("po,oihw->pihw", adapter.double(), weight.double()).to(weight.dtype)
    total = None if bias is None else adapter.double() @ bias.double()
    if offset is not None:
        total = offset.double() if total is None else total + offset.double()
    return folded, None if total is None else total.to(weight.dtype)


def fold_before(weight: Tensor, adapter: Tensor) -> Tensor:
    """Fold an adapter into the convolution after it: W' = W A.

    Args:
        weight: W, (O, I, h, w).
        adapter: A, (I, I).

    Returns:
        The weight, (O, I, h, w).
    """
    return torch.einsum("oihw,ij->ojhw", weight.double(), adapter.double()).to(weight.dtype)
