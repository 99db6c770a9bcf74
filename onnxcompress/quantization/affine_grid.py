"""Uniform grids: the numbers that a quantized tensor can hold.

    q = clip(round_half_even(x / s) + z, low, high)        x̂ = (q − z) s

`low` and `high` are the integers in use; where they are fewer than the storage type has (6 bits in a
uint8), the file says so: stored weights stay inside, activations pass a Clip before their QuantizeLinear.
Asymmetric activations include zero exactly, as zero padding needs. Does not handle: block-wise scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SMALLEST = 1e-8
"""Least scale: of a tensor that is zero throughout."""


@dataclass(frozen=True)
class Grid:
    """One grid, or one for each channel."""

    scale: np.ndarray
    """float32, of shape () or (channels,)."""
    zero_point: int
    low: int
    high: int
    storage: str
    """The ONNX type: `int8`, `uint8`, `int4`, `uint4`."""

    @property
    def narrow(self) -> bool:
        """Whether the storage type has more integers than are used."""
        return (self.low, self.high) != limits(self.storage)

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and largest number of a grid with one scale."""
        scale = float(self.scale)
        return (self.low - self.zero_point) * scale, (self.high - self.zero_point) * scale

    @property
    def bits(self) -> int:
        return int(np.ceil(np.log2(self.high - self.low + 1)))


def limits(storage: str) -> tuple[int, int]:
    """Least and largest integer of a type."""
    bits = int(storage.lstrip("uint"))
    return (0, 2**bits - 1) if storage.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def activation_grid(
    low: float, high: float, bits: int, *, storage: str = "uint8", symmetric: bool = False
) -> Grid:
    """The grid whose ends are near `low` and `high`, zero on it. Symmetric: as many steps on both sides."""
    low, high = min(low, 0.0), max(high, 0.0)
    signed = not storage.startswith("u")
    first = -(2 ** (bits - 1)) if signed else 0
    steps = 2**bits - 1
    if symmetric:
        scale = max(high, -low) / (steps // 2)
        zero, first, last = (0, -(steps // 2), steps // 2) if signed else (first, first, first + steps)
    else:
        scale = (high - low) / steps
        last = first + steps
        zero = first + round(-low / max(scale, SMALLEST))
    return Grid(_inside(max(scale, SMALLEST), high, last - zero), zero, first, last, storage)


def _inside(scale: float, high: float, steps: int) -> np.ndarray:
    """The scale in float32, a little less where rounding would carry the grid's end beyond `high`.

    onnxruntime drops a Clip to `high` only before a QuantizeLinear that never gives more.
    """
    rounded = np.float32(scale)
    while (
        steps > 0 and scale * steps <= high * (1 + 1e-6) and rounded * np.float32(steps) > np.float32(high)
    ):
        rounded = np.nextafter(rounded, np.float32(0))
    return np.asarray(rounded, np.float32)


def weight_limits(bits: int) -> tuple[int, int]:
    """Integers of symmetric weights: [-127, 127] of 8 bits, all of fewer: [-8, 7] of 4."""
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
