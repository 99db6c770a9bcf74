"""Room for an output of all images, filled batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxcompress.optimize.executor.ops.registry import ExecutionError


class OutputRows:
    """The rows of one output, which each batch copies to their place."""

    def __init__(self, name: str, count: int, dtype: torch.dtype | None) -> None:
        """Wait for the first batch: it tells the shape.

        Args:
            name: Name of the output.
            count: Images in all.
            dtype: Type in which floats are kept; None: their own.
        """
        self.name, self.count, self.dtype = name, count, dtype
        self._values: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """The output of all images, (count times the rows of an image, …)."""
        assert self._values is not None
        return self._values

    def place(self, part: Tensor, start: int, images: int) -> None:
        """Copy the output of a batch to its place.

        Args:
            part: The output, (images times the rows of an image, …).
            start: Images before the batch.
            images: Images in it.

        Raises:
            ExecutionError: The output does not hold one image after the other.
        """
        if self._values is None and part.ndim:
            self._values = self._room(part, len(part) // images)
        each = 0 if self._values is None else len(self._values) // self.count
        if self._values is None or part.shape != (each * images, *self._values.shape[1:]):
            raise ExecutionError(
                f"tensor {self.name!r} of shape {list(part.shape)} does not hold one image after the "
                f"other, of a batch of {images}: such networks are not handled"
            )
        self._values[each * start : each * (start + images)] = part

    def _room(self, part: Tensor, each: int) -> Tensor:
        """Return room for `each` rows of every image, laid out as the part is."""
        last = part.ndim == 4 and part.is_contiguous(memory_format=torch.channels_last)
        return torch.empty(
            (each * self.count, *part.shape[1:]),
            dtype=self.dtype if self.dtype and part.is_floating_point() else part.dtype,
            device=part.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
