"""How far the channels of tensors are from recorded statistics: a loss with a fast gradient.

    mismatch = mean_c ( (μ_c − β_c)² / γ_c² + (σ_c / |γ_c| − 1)² )

μ_c, σ_c: mean and deviation of channel c of a tensor, over images and places; β_c, |γ_c|: as recorded.
Relative errors weigh all layers alike. The backward pass of the moments is one multiply-add.

Source: DeepInversion (Yin et al., CVPR 2020), eq. 4, in a relative form.
Does not handle: tensors whose channels are not axis 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxcompress.statistics.record import ChannelStatistics

TENSORS = 20
"""Tensors that are matched, at most, evenly spread over the network."""
BLOCK = 1 << 17
"""Numbers whose moments are computed at once."""

Targets = Mapping[str, tuple[Tensor, Tensor]]
"""Tensor -> the mean and deviation that its channels are to have, each (channels,)."""


def targets_of(
    names: Sequence[str], statistics: Mapping[str, ChannelStatistics], device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Select the statistics to match: at most TENSORS of the known tensors, evenly spread.

    Args:
        names: Names of tensors, in the order of the graph.
        statistics: Statistics of the known tensors, by name.
        device: Where the result lies.

    Returns:
        Name -> mean and deviation, each (channels,).
    """
    known = [name for name in names if name in statistics]
    places = np.linspace(0, len(known) - 1, min(TENSORS, len(known))).round().astype(int)
    return {
        known[i]: (
            torch.from_numpy(statistics[known[i]].mean.copy()).to(device),
            torch.from_numpy(statistics[known[i]].std.copy()).to(device),
        )
        for i in places
    }


def mismatch(values: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Compute the squared errors of mean and deviation, relative to the deviation, averaged over channels.

    Args:
        values: The values of a tensor, (N, C, …).
        mean: The wanted mean of each channel, (C,).
        deviation: The wanted deviation of each channel, (C,).

    Returns:
        The mismatch, a scalar; channels that should not vary count as 0.
    """
    return moments_mismatch(*moments_of(values), mean, deviation)


def moments_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Take the moments of each channel.

    Args:
        values: The values of a tensor, (N, C, …).

    Returns:
        Mean and mean square of each channel, both (C,) float32.
    """
    first, second = _Moments.apply(values)  # type: ignore[no-untyped-call, unused-ignore]
    return first, second


def moments_mismatch(first: Tensor, second: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Compute `mismatch` from the moments of the values.

    Args:
        first: The mean of each channel, (C,).
        second: The mean square of each channel, (C,).
        mean: The wanted mean of each channel, (C,).
        deviation: The wanted deviation of each channel, (C,).

    Returns:
        The mismatch, a scalar; channels that should not vary count as 0.
    """
    found = (second - first.square()).clamp_min(1e-12).sqrt()
    alive = deviation > 1e-3 * deviation.mean()  # a channel that never changes says nothing
    scale = torch.where(alive, deviation, 1.0)
    errors = ((first - mean) / scale).square() + (found / scale - 1).square()
    relative: Tensor = torch.where(alive, errors, 0.0).mean()
    return relative


def _sums(rows: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Compute Σ x and Σ x² along an axis of (rows, columns), float32; along rows, for each part of them.

    Parts fit a CPU's cache, so that memory is read only once.
    """
    size = max(1, BLOCK // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
    first, second = [], []
    for part in torch.split(rows, size):
        part = part.float()
        first.append(part.sum(axis))
        second.append(part.square().sum(axis))
    join = torch.stack if axis == 0 else torch.cat
    return join(first), join(second)


class _Moments(torch.autograd.Function):
    """Mean and mean square of each channel (axis 1), float32, with a fast backward pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the moments.

        Args:
            ctx: Keeps the values for the backward pass.
            values: The values, (N, C, …).

        Returns:
            Mean and mean square, each (C,).
        """
        ctx.save_for_backward(values)
        count = values.numel() // values.shape[1]
        if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
            first, second = _sums(values.movedim(1, -1).reshape(-1, values.shape[1]), 0)
            return first.sum(0) / count, second.sum(0) / count
        first, second = _sums(values.reshape(values.shape[0] * values.shape[1], -1), 1)
        shape = values.shape[:2]
        return first.view(shape).sum(0) / count, second.view(shape).sum(0) / count

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        """Compute the gradient of the values.

        Args:
            ctx: Has the values.
            first: Gradient of the mean, (C,).
            second: Gradient of the mean square, (C,).

        Returns:
            The gradient, (N, C, …).
        """
        (values,) = ctx.saved_tensors
        shape = (1, -1, *[1] * (values.dim() - 2))
        share = values.shape[1] / values.numel()
        slope = (2 * share * second).to(values.dtype).view(shape)
        return torch.addcmul((share * first).to(values.dtype).view(shape), values, slope)
