"""Random views of images with what the teacher makes of them, several batches at once.

The teacher's forward pass is about a third of the work of a step. So each view is used REPEATS times: as
many views as fit STORE_BYTES are drawn with the teacher's tensors, come in a new random order REPEATS
times, and are replaced by new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxcompress.optimize.device import laid_out, sent
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction.augment import augment

REPEATS = 3
"""How often a view comes."""
STORE_BYTES = 1 << 29
"""Memory of the views and the teacher's tensors, unless a single batch takes more."""
FEWEST_BATCHES = 4
"""Batches of which a store must have room for views to come again: else they would come in a row."""
LAUNCHED = 4
"""Batches that the teacher runs at once on a GPU, which a batch alone does not keep busy."""
Batch = tuple[Tensor, tuple[Tensor, ...]]
"""Views, (N, …), and the teacher's tensors of them, (N, …) each."""


@dataclass(frozen=True)
class TaughtViews:
    """Draws views and runs the teacher on them."""

    teacher: Executor
    source: str
    """Name of the input."""
    names: Sequence[str]
    """Names of the teacher's tensors."""
    images: Tensor
    """Normalized images, (N, C, H, W)."""
    shares: Tensor | None
    """How often each image is drawn, relative to the others, (N,); None: equally often."""
    batch: int
    """Views in a batch; on a CPU the teacher runs as many at once."""
    nhwc: bool = False
    """Whether the network takes channels last."""

    def batches(self, count: int, seed: int) -> Iterator[Batch]:
        """Draw batches.

        Args:
            count: Number of batches.
            seed: Random seed.

        Yields:
            The batches.
        """
        generator = torch.Generator().manual_seed(seed)
        sample, theirs = self._taught(self._views(torch.Generator())[:1])
        room = max(1, STORE_BYTES // (self.batch * sum(t.nbytes for t in (sample, *theirs))))
        repeats = REPEATS if room >= FEWEST_BATCHES else 1
        while count > 0:
            drawn = [self._views(generator) for _ in range(min(room, -(-count // repeats)))]
            views, wanted = self._taught(torch.cat(drawn))
            del drawn
            for _ in range(repeats):
                order = sent(torch.randperm(len(views), generator=generator), views.device)
                for index in torch.split(order, self.batch)[:count]:
                    yield laid_out(views[index]), tuple(t[index] for t in wanted)
                count = max(0, count - len(views) // self.batch)

    def _views(self, generator: torch.Generator) -> Tensor:
        x = augment(self.images, self.batch, generator, self.shares, self.teacher.device)
        return x.permute(0, 2, 3, 1) if self.nhwc else x

    def _taught(self, views: Tensor) -> Batch:
        """Run the teacher on views; its tensors are kept in 16 bits."""
        batch = self.batch if self.teacher.device.type == "cpu" else LAUNCHED * self.batch
        made = self.teacher.run_batched(
            {self.source: views}, self.names, count=len(views), batch=batch, mixed=True,
            kept_as=torch.bfloat16,
        )  # fmt: skip
        return views, tuple(made[name] for name in self.names)
