"""Inputs for networks that take no pictures: sequences, volumes, images of many channels, codes.

Floats are drawn as layer-wise inputs are (`synthesis.colored_noise`): with the recorded mean and deviation
of the input where the file has them, else with mean 0 and deviation 1. Half of them are white noise, half
have the falling spectrum of natural signals. Where pixels are wanted (a stated normalization, or images of
integers), the noise becomes pixels from 0 to 255 first. Other integers are small codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from onnxcompress.data.image_set import ImageSet, as_type
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import require
from onnxcompress.runtime.inference import random_values
from onnxcompress.statistics.record import ChannelStatistics

if TYPE_CHECKING:
    from torch import Tensor

LIGHT, CONTRAST = 0.45, 0.25
"""Mean and deviation of pixels that are made of noise, as shares of their range."""


@dataclass(frozen=True)
class DrawnSet:
    """Inputs that are no pictures, in the type and shape that the network takes."""

    values: np.ndarray
    """(N, …)"""

    def __len__(self) -> int:
        return len(self.values)

    def array(self) -> np.ndarray:
        """Return all inputs.

        Returns:
            The inputs, (N, …).
        """
        return self.values

    def normalized(self, part: slice) -> np.ndarray:
        """Return some of the inputs as the network takes them.

        Args:
            part: Which of them.

        Returns:
            The inputs, (n, …).
        """
        return self.values[part]

    def batches(self, batch: int) -> Iterator[np.ndarray]:
        """Split the inputs into batches.

        Args:
            batch: Inputs in a batch.

        Yields:
            The batches in order, (batch, …); the last may be smaller.
        """
        for start in range(0, len(self), batch):
            yield self.values[start : start + batch]

    def take(self, indices: Sequence[int] | np.ndarray) -> DrawnSet:
        """Select inputs.

        Args:
            indices: Their places.

        Returns:
            The selected inputs.
        """
        return replace(self, values=self.values[np.asarray(indices)])

    def spread(self, count: int) -> DrawnSet:
        """Select inputs evenly from all.

        Args:
            count: How many.

        Returns:
            That many inputs, or all where there are fewer.
        """
        if count >= len(self):
            return self
        return replace(self, values=self.values[np.linspace(0, len(self) - 1, count).astype(int)])


Samples = ImageSet | DrawnSet
"""What a network is run on."""


@dataclass(frozen=True)
class NormalizedImages:
    """Inputs whose slices are normalized when they are read, so that not all are held as floats."""

    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, part: slice) -> Tensor:
        import torch

        return torch.from_numpy(self.samples.normalized(part))


def drawn_inputs(
    shape: Sequence[int],
    dtype: np.dtype[np.generic],
    seed: int,
    *,
    statistics: ChannelStatistics | None = None,
    preprocess: Preprocess | None = None,
) -> DrawnSet:
    """Draw inputs at random.

    Args:
        shape: (N, …), channels on axis 1.
        dtype: The type of the network's input.
        seed: Random seed; the same seed gives the same inputs.
        statistics: Statistics of the input's channels, where they are known.
        preprocess: How the network's inputs are normalized, where that is stated.

    Returns:
        The inputs.

    Raises:
        RuntimeUnavailable: torch is missing, which the noise of float inputs needs.
    """
    if dtype.kind in "iub" and len(shape) != 4:
        return DrawnSet(random_values(np.random.default_rng(seed), dtype, tuple(shape)))
    noise = _noise(shape, seed, statistics)
    if preprocess is None:
        return DrawnSet(as_type(noise, dtype))
    pixels = np.clip(LIGHT + CONTRAST * noise, 0, 1) * 255
    mean, std = float(np.mean(preprocess.mean)), float(np.mean(preprocess.std))
    return DrawnSet(as_type((pixels / preprocess.scale - mean) / std, dtype))


def _noise(shape: Sequence[int], seed: int, statistics: ChannelStatistics | None) -> np.ndarray:
    """Draw white and coloured noise by turns."""
    require("drawing inputs that are no pictures", "torch")
    from onnxcompress.optimize.synthesis.colored_noise import WHITE, Noise, draw_input, generator

    count, *sizes = shape
    values = np.empty(tuple(shape), np.float32)
    for first, noise in enumerate((WHITE, Noise())):
        part = values[first::2]
        if len(part):
            stream = generator(seed, f"input {first}", count)
            part[...] = draw_input((len(part), *sizes), statistics, noise, stream).numpy()
    return values
