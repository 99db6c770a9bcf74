"""Uniform affine grids: the numbers that a quantized tensor can represent.

    q = clip(round_half_even(x / s) + z, low, high)        x̂ = (q − z) s

`low` and `high` are the integers in use. Where they are fewer than the storage type has (6 bits in a
uint8), the file enforces it: stored weights stay inside, activations pass a Clip before their
QuantizeLinear. Asymmetric activations represent zero exactly, as zero padding needs. Does not handle:
block-wise scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SMALLEST = 1e-8
"""Smallest scale, which a tensor of zeros gets."""


@dataclass(frozen=True)
class Grid:
    """A uniform affine grid, with one scale for the tensor or one for each of its channels."""

    scale: np.ndarray
    """Step between neighbouring numbers: float32, shape () or (channels,)."""
    zero_point: int
    low: int
    high: int
    storage: str
    """ONNX type: `int4`, `int8`, `int16`, or `uint` in place of `int`."""

    @property
    def narrow(self) -> bool:
        """Whether the storage type has more integers than are used."""
        return (self.low, self.high) != limits(self.storage)

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest number that a grid with one scale can represent."""
        scale = float(self.scale)
        return (self.low - self.zero_point) * scale, (self.high - self.zero_point) * scale

    @property
    def bits(self) -> int:
        """Bits that the integers in use need."""
        return int(np.ceil(np.log2(self.high - self.low + 1)))


def limits(storage: str) -> tuple[int, int]:
    """Look up the range of an integer type.

    Args:
        storage: ONNX type: `int4`, `int8`, `int16`, or `uint` in place of `int`.

    Returns:
        Smallest and largest integer.
    """
    bits = int(storage.lstrip("uint"))
    return (0, 2**bits - 1) if storage.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def activation_grid(
    low: float, high: float, bits: int, *, storage: str = "uint8", symmetric: bool = False
) -> Grid:
    """Choose the grid that covers an activation's range, zero included.

    Args:
        low: Smallest value.
        high: Largest value.
        bits: Bits of the grid, at most those of the storage type.
        storage: ONNX type, such as `uint8`.
        symmetric: Use as many steps below zero as above it; of a whole type one more below.

    Returns:
        A grid with one scale.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    signed = not storage.startswith("u")
    first = -(2 ** (bits - 1)) if signed else 0
    steps = 2**bits - 1
    if symmetric:
        scale = max(high, -low) / (steps // 2)
        zero = first + 2 ** (bits - 1)
        ends = limits(storage)
        whole = 2**bits == ends[1] - ends[0] + 1  # the type itself ends there: no Clip
        first, last = (first, first + steps) if whole else (zero - steps // 2, zero + steps // 2)
    else:
        scale = (high - low) / steps
        last = first + steps
        zero = first + round(-low / max(scale, SMALLEST))
    return Grid(_inside(max(scale, SMALLEST), high, last - zero), zero, first, last, storage)


def _inside(scale: float, high: float, steps: int) -> np.ndarray:
    """Round the scale to float32, slightly down where rounding would move the grid's end beyond `high`.

    onnxruntime removes a Clip to `high` only before a QuantizeLinear that never exceeds it.
    """
    rounded = np.float32(scale)
    while (
        steps > 0 and scale * steps <= high * (1 + 1e-6) and rounded * np.float32(steps) > np.float32(high)
    ):
        rounded = np.nextafter(rounded, np.float32(0))
    return np.asarray(rounded, np.float32)


def weight_limits(bits: int) -> tuple[int, int]:
    """Look up the integers of symmetrically quantized weights.

    Args:
        bits: Bits of a weight, at most 8.

    Returns:
        Smallest and largest integer: [-127, 127] for 8 bits, all that there are for fewer, such as [-8, 7].
    """
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
