"""Bounds on a layer's integer weights with which no kernel's sums saturate.

On a CPU with AVX2 or AVX-512 but no VNNI, onnxruntime's kernels for uint8 times int8 (VPMADDUBSW) add two
products in 16 bits and cut off what is beyond: of activations 0 ≤ a ≤ 255,

    a₁ q₁ + a₂ q₂   is exact whenever   −128 ≤ q₁, q₂, q₁ + q₂ ≤ 128        (255 · 128 < 2¹⁵)

Which two are added is known: neighbours 2k, 2k + 1 of the reduced axis, in a convolution counted with the
channels last (taps, inputs). So it is enough that no *pair* of one sign is too large; each weight may have
all 8 bits, where onnxruntime's own `reduce_range` leaves every one 7. The room of a pair is divided before
rounding, by what both weights would take unbounded: so columns can be rounded one by one.

`tests/benchmarks/overflow.py` shows it on an emulated CPU without VNNI.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxcompress.quantization.affine_grid import weight_limits
from onnxcompress.quantization.qdq_plan import QuantizedLayer

PAIR = 128
"""Largest sum of the weights of a pair."""


@dataclass(frozen=True)
class SaturationBounds:
    """Least and largest integer of a weight, and which weights form pairs."""

    low: int
    high: int
    partner: Tensor | None = None
    """(F,): the column that a column is paired with, itself where it is alone; None: no pairs."""

    @staticmethod
    def of(layer: QuantizedLayer, bits: int, *, saturation_safe: bool) -> SaturationBounds:
        """Determine the bounds of a layer's weight, as a matrix with columns (inputs x taps).

        Args:
            layer: The layer.
            bits: Bits of its weight.
            saturation_safe: Whether sums of pairs must not overflow.

        Returns:
            The bounds; pairs only for 8 bits.
        """
        low, high = weight_limits(bits)
        if bits < 8 or not saturation_safe or layer.linear.depthwise:
            return SaturationBounds(low, high)
        inputs, *kernel = layer.linear.view(layer.linear.weight).shape[2:]
        return SaturationBounds(low, high, partners(inputs, math.prod(kernel)))

    def least_scale(self, weight: Tensor) -> Tensor:
        """Compute the smallest scale of each row at which no weight is clipped.

        Args:
            weight: The weight, (G, O, F).

        Returns:
            The scales, (G, O, 1).
        """
        largest = weight.abs().amax(2, keepdim=True) / self.high
        if self.partner is None:
            return largest
        paired = self.partner != torch.arange(len(self.partner))
        sums = [(part + part[..., self.partner] * paired) for part in (weight.relu(), (-weight).relu())]
        return torch.maximum(largest, torch.maximum(*sums).amax(2, keepdim=True) / PAIR)

    def bounds(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the least and the largest integer of each weight, with the room of each pair divided.

        Args:
            values: Integers before rounding, (G, O, F).

        Returns:
            Least and largest integers, each (G, O, F).
        """
        return -self._room(-values, -self.low), self._room(values, self.high)

    def _room(self, values: Tensor, most: int) -> Tensor:
        """Return the largest value that each weight may have."""
        if self.partner is None:
            return torch.full_like(values, most)
        wanted = values.round().clamp(0, most)
        spare = PAIR - wanted - wanted[..., self.partner]
        place = torch.arange(len(self.partner))
        share = torch.where(place < self.partner, (spare / 2).ceil(), (spare / 2).floor())
        return torch.where(place == self.partner, most, (wanted + share).clamp_max(most))


def partners(inputs: int, taps: int) -> Tensor:
    """Pair the columns of a layer's matrix whose products a kernel adds in 16 bits.

    Args:
        inputs: Input channels of a group.
        taps: Taps of the kernel.

    Returns:
        For each column (inputs x taps) the other one of its pair, or itself, (inputs * taps,).
    """
    size = inputs * taps
    place = torch.arange(size).reshape(inputs, taps)
    last = torch.arange(size).reshape(taps, inputs).T.reshape(-1)  # with the channels last
    other = last ^ 1
    other = torch.where(other < size, other, last)
    return place.T.reshape(-1)[other]
