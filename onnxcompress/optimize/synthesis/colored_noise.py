"""Random tensors with given statistics: per-channel mean and deviation, and a spatial spectrum.

A draw of samples n with channels c and places p is

    z = √(1 − o) · s + √o · m        x[n, c, p] = mean[c] + std[c] · z̃[n, c, p]

s is white noise whose spectrum is multiplied by |f|^(−a/2), so that its power falls as 1/f^a, without its
mean over the places; m[n, c] is one number for a whole channel of a sample, because the spatial mean of a
feature map varies from image to image; z̃ is z brought to mean 0 and deviation 1 in each channel over the
whole draw. At the graph's input, z = √(1 − h) · z + √h · z' where z' is one such draw shared by all
channels, because the channels of an image are similar. White noise (a = o = h = 0) is what Horton et al.
draw (arXiv 2011.09058, §3.1); natural images have a ≈ 2 (Field, J. Opt. Soc. Am. A 1987).

Does not handle: covariance between channels, and distributions that are not Gaussian.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxcompress.errors import OptionError
from onnxcompress.statistics.record import ChannelStatistics

CONSTANT = 1e-6
"""Deviation of a channel, relative to its magnitude, below which it is only rounding."""


@dataclass(frozen=True)
class Noise:
    """The noise that is drawn.

    The defaults were chosen by the error that is left on real inputs when half the weights of a layer are
    pruned and the others refitted by least squares on inputs that the network made of the noise: geometric
    mean of 12 layers, relative to a refit on real inputs.

        ResNet-56, EfficientNet-Lite0        ResNet-56, EfficientNet-Lite0
        not refitted        5.81  3.40       a 2, o 0.2, h 0      1.28  1.16
        dead leaves         1.13  1.10       a 3, o 0.3, h 0.8    1.15  1.15
    """

    exponent: float = 3.0
    """a, 0 to 8: the power of spatial frequency f is 1/f^a; 0 is white."""
    offset: float = 0.3
    """o, 0 to 1: share of a channel's variance that lies between samples."""
    shared: float = 0.8
    """h, 0 to 1: share of the variance that the channels of the graph's input have in common."""

    def __post_init__(self) -> None:
        for name in ("offset", "shared"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"noise: {name} {getattr(self, name):g}; expected a share from 0 to 1")
        if not 0 <= self.exponent <= 8:
            raise OptionError(f"noise: exponent {self.exponent:g}; expected 0 (white) to 8")


WHITE = Noise(exponent=0.0, offset=0.0, shared=0.0)
"""As published by Horton et al.: independent numbers."""


def generator(seed: int, name: str, count: int) -> torch.Generator:
    """Create the random stream of one tensor, which depends on the arguments only.

    Args:
        seed: The seed of the whole draw.
        name: Name of the tensor.
        count: Number of samples.

    Returns:
        A generator on the CPU.
    """
    digest = hashlib.sha256(f"{seed}\n{count}\n{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw(
    shape: Sequence[int], statistics: ChannelStatistics, noise: Noise, stream: torch.Generator
) -> Tensor:
    """Draw a tensor with given statistics over all samples and places.

    Args:
        shape: Its shape, (N, C, …).
        statistics: Mean and deviation of each channel.
        noise: Spectrum of the noise.
        stream: Source of random numbers.

    Returns:
        The tensor, float32.
    """
    z = _field(tuple(shape), noise, stream)
    return _standardized(z, statistics) if z.numel() > z.shape[1] else _affine(z, statistics)


def draw_input(
    shape: Sequence[int], statistics: ChannelStatistics | None, noise: Noise, stream: torch.Generator
) -> Tensor:
    """Draw a stand-in for normalized images.

    Args:
        shape: Its shape, (N, C, …). Without statistics, channels may also be the last of four axes, if only
            that axis has size 1 or 3.
        statistics: Mean and deviation of each channel; None: mean 0 and deviation 1.
        noise: Spectrum of the noise.
        stream: Source of random numbers.

    Returns:
        The tensor, float32.
    """
    if len(shape) < 2:
        return torch.randn(tuple(shape), generator=stream)
    last = statistics is None and len(shape) == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3)
    count, channels, *sides = (shape[0], shape[3], *shape[1:3]) if last else shape
    z = _field((count, channels, *sides), noise, stream)
    if sides and channels > 1:
        common = _field((count, 1, *sides), noise, stream)
        z = z.mul_((1 - noise.shared) ** 0.5).add_(common.mul_(noise.shared**0.5))
    if statistics is None:
        statistics = ChannelStatistics(np.zeros(channels), np.ones(channels))
    z = _standardized(z, statistics) if z.numel() > channels else _affine(z, statistics)
    return z.movedim(1, -1).contiguous() if last else z


def _standardized(x: Tensor, statistics: ChannelStatistics) -> Tensor:
    """Bring each channel of (N, C, …) to the recorded mean and deviation over all samples and places.

    A channel that is constant becomes its recorded mean, because nothing says how it would vary.
    """
    axes = [axis for axis in range(x.ndim) if axis != 1]
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    varies = variance.sqrt() > CONSTANT * (mean.abs() + variance.sqrt())
    scale = torch.where(varies, variance.rsqrt(), torch.zeros_like(variance))
    return _affine((x - mean).mul_(scale), statistics)


def _affine(z: Tensor, statistics: ChannelStatistics) -> Tensor:
    shape = (-1, *[1] * (z.ndim - 2))
    mean, std = (torch.tensor(v).to(z).reshape(shape) for v in (statistics.mean, statistics.std))
    return z.mul_(std).add_(mean)


def _field(shape: tuple[int, ...], noise: Noise, stream: torch.Generator) -> Tensor:
    """Draw z, with mean 0 and variance 1 in expectation."""
    z = torch.randn(shape, generator=stream)
    if z[0, 0].numel() == 1 or noise.exponent == noise.offset == 0:
        return z
    per_sample = torch.randn(shape[:2], generator=stream).mul_(noise.offset**0.5)
    z = _coloured(z, noise.exponent).mul_((1 - noise.offset) ** 0.5)
    return z.add_(per_sample.reshape(*shape[:2], *[1] * (len(shape) - 2)))


def _coloured(white: Tensor, exponent: float) -> Tensor:
    """Give noise the power 1/f^exponent, variance 1, and no mean over the places of a channel."""
    axes = tuple(range(2, white.ndim))
    *sides, last = white.shape[2:]
    squared = torch.fft.rfftfreq(last).square()
    for side in reversed(sides):
        squared = torch.fft.fftfreq(side).square().reshape(-1, *[1] * squared.ndim) + squared
    squared.view(-1)[0] = torch.inf  # frequency 0 gets nothing
    amplitude = squared.pow(-exponent / 4) if exponent else (squared < torch.inf).float()
    coloured: Tensor = torch.fft.irfftn(
        torch.fft.rfftn(white, dim=axes).mul_(amplitude), s=white.shape[2:], dim=axes
    )
    return coloured.div_(coloured.square().mean().sqrt())
