"""The loss of fine-tuning: squared errors of features and of tensors around them, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxcompress.optimize.deterministic_threads import in_turn
from onnxcompress.optimize.device import autocast
from onnxcompress.optimize.executor import Executor

PIECE = 16
"""Images of a batch that go through at once on a CPU."""


@dataclass(frozen=True)
class Matched:
    """The tensors that are brought together, by name in the student and in the teacher."""

    source: str
    """Name of the input."""
    feature: tuple[str, str]
    levels: tuple[tuple[str, str], ...] = ()
    """Tensors on the way to the features."""
    pooled: tuple[tuple[str, str], ...] = ()
    """What the global pool makes of the features, where there is one."""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The features first."""
        return (self.feature, *self.levels, *self.pooled)


@dataclass(frozen=True)
class Objective:
    """The loss as a pure function of a batch, the teacher's tensors of it, and the values of `names`."""

    student: Executor
    matched: Matched
    names: Sequence[str]
    scales: Sequence[float]
    """Factor of the mean squared error of each pair of tensors."""

    def loss(self, x: Tensor, *given: Tensor) -> Tensor:
        """Compute the loss of a batch; its mean over batches is that of all their images.

        Args:
            x: The batch, as the network takes it.
            given: The teacher's tensors of it, one for each pair, then the values of `names`.

        Returns:
            A scalar.
        """
        ours = [name for name, _ in self.matched.pairs]
        wanted, values = given[: len(ours)], given[len(ours) :]
        with autocast(self.student.device, cached=False):  # a CUDA graph casts weights anew
            feeds, own = {self.matched.source: x}, dict(zip(self.names, values, strict=True))
            got = self.student.run(feeds, ours, own)
        total = torch.zeros((), device=x.device)
        for name, theirs, scale in zip(ours, wanted, self.scales, strict=True):
            norm = torch.linalg.vector_norm(got[name] - theirs, dtype=torch.float32)  # no copy in 32 bits
            total = total + scale * norm.square() / theirs.numel()
        return total


def add_slopes(objective: Objective, x: Tensor, wanted: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Give the values the gradients of the loss on a batch, on a CPU taken piece by piece.

    Args:
        objective: The loss.
        x: The batch, as the network takes it.
        wanted: The teacher's tensors of it.
        leaves: The values; their `grad` is set.
    """
    size = PIECE if x.device.type == "cpu" else len(x)
    pieces = list(zip(*(torch.split(part, size) for part in (x, *wanted)), strict=True))

    def slopes(index: int) -> tuple[Tensor, ...]:
        share = len(pieces[index][0]) / len(x)
        loss = share * objective.loss(*pieces[index], *leaves)
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    columns = zip(*in_turn(slopes, len(pieces), x.device), strict=True)
    for leaf, parts in zip(leaves, columns, strict=True):
        leaf.grad = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
