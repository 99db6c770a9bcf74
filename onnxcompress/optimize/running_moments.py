"""Mean and deviation of each channel of a tensor that comes in batches.

They are taken for each batch in float64 and merged (Chan, Golub, LeVeque, The American Statistician 37,
1983): with n, m, S (count, mean, squares about it) of what came before, n', m', S' of the batch and
δ = m' − m,

    m ← m + δ n' / (n + n')        S ← S + S' + δ² n n' / (n + n')
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onnxcompress.errors import InputError, OptionError
from onnxcompress.statistics.record import ChannelStatistics

if TYPE_CHECKING:
    import torch

IN_CACHE = 1 << 17
"""Elements that are summed up at once on the CPU: ten times as fast as a whole batch."""


@dataclass
class RunningMoments:
    """Count, mean and squares about the mean of each channel, of what was added so far."""

    count: int = 0
    mean: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0

    @staticmethod
    def of(values: torch.Tensor, name: str) -> RunningMoments:
        """Compute the moments of a tensor.

        Args:
            values: The values, (N, C, …).
            name: Name of the tensor, for messages.

        Returns:
            The moments of each channel.

        Raises:
            OptionError: The tensor has no axis of channels.
            InputError: A value is not finite.
        """
        moments = RunningMoments()
        moments.add(values, name)
        return moments

    def merge(self, other: RunningMoments) -> None:
        """Add the values that other moments were computed from.

        Args:
            other: The other moments.
        """
        self._merge(other.count, np.asarray(other.mean), np.asarray(other.squares))

    def add(self, values: torch.Tensor, name: str) -> None:
        """Add the values of a tensor.

        Args:
            values: The values, (N, C, …).
            name: Name of the tensor, for messages.

        Raises:
            OptionError: The tensor has no axis of channels.
            InputError: A value is not finite.
        """
        if values.ndim < 2:
            raise OptionError(f"tensor {name!r}: shape {list(values.shape)} has no channels on axis 1")
        flat = values.flatten(2) if values.ndim > 2 else values.unsqueeze(2)
        at_once = max(1, IN_CACHE // flat[0].numel()) if flat.device.type == "cpu" else len(flat)
        for start in range(0, len(flat), at_once):
            part = flat[start : start + at_once].double()
            total = part.shape[0] * part.shape[2]
            mean = part.sum(2).sum(0) / total
            squares = (part - mean[:, None]).square_().sum(2).sum(0)
            self._merge(total, mean.cpu().numpy(), squares.cpu().numpy())
        if not np.isfinite(self.squares).all():
            raise InputError(f"tensor {name!r} is not finite on these images; check --preprocess")

    def _merge(self, count: int, mean: np.ndarray, squares: np.ndarray) -> None:
        total = self.count + count
        step = mean - self.mean
        self.mean = self.mean + step * (count / total)
        self.squares = self.squares + squares + step**2 * (self.count * count / total)
        self.count = total

    def statistics(self, source: str) -> ChannelStatistics:
        """Convert the moments to an entry of the record.

        Args:
            source: What the entry gives as its source.

        Returns:
            Mean and deviation of each channel, (C,) float32.
        """
        mean, std = np.asarray(self.mean), np.sqrt(np.asarray(self.squares) / self.count)
        return ChannelStatistics(mean.astype(np.float32), std.astype(np.float32), source)
