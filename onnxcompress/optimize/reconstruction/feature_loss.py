"""The loss of fine-tuning: squared errors of features and of tensors before them, and its gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from onnxcompress.errors import CompressError, CompressWarning, one_line
from onnxcompress.optimize.deterministic_threads import in_turn
from onnxcompress.optimize.device import autocast
from onnxcompress.optimize.executor import Executor

PIECE = 16
"""Images of a batch that go through at once on a CPU."""
Loss = Callable[..., Tensor]
"""(batch, *the teacher's tensors, *values) -> scalar."""


@dataclass(frozen=True)
class Matched:
    """The tensors that are brought together, by name in the student and in the teacher."""

    source: str
    """Name of the input."""
    feature: tuple[str, str]
    levels: tuple[tuple[str, str], ...] = ()
    """Tensors on the way to the features."""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The features first."""
        return (self.feature, *self.levels)


@dataclass(frozen=True)
class Objective:
    """The loss as a pure function of a batch, the teacher's tensors of it, and the values of `names`."""

    student: Executor
    matched: Matched
    names: Sequence[str]
    scales: Sequence[float]
    """Factor of the mean squared error of each pair of tensors."""
    cached: bool = True
    """Whether autocast casts weights once each."""

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
        with autocast(self.student.device, cached=self.cached):
            feeds, own = {self.matched.source: x}, dict(zip(self.names, values, strict=True))
            got = self.student.run(feeds, ours, own)
        total = torch.zeros((), device=x.device)
        for name, theirs, scale in zip(ours, wanted, self.scales, strict=True):
            norm = torch.linalg.vector_norm(got[name] - theirs, dtype=torch.float32)  # no copy in 32 bits
            total = total + scale * norm.square() / theirs.numel()
        return total


def add_slopes(objective: Objective, x: Tensor, wanted: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Give the values the gradients of the loss on a batch, taken piece by piece.

    Args:
        objective: The loss.
        x: The batch, as the network takes it.
        wanted: The teacher's tensors of it.
        leaves: The values; their `grad` is set.
    """
    pieces = list(zip(*(torch.split(part, PIECE) for part in (x, *wanted)), strict=True))

    def slopes(index: int) -> tuple[Tensor, ...]:
        share = len(pieces[index][0]) / len(x)
        loss = share * objective.loss(*pieces[index], *leaves)
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    columns = zip(*in_turn(slopes, len(pieces)), strict=True)
    for leaf, parts in zip(leaves, columns, strict=True):
        leaf.grad = torch.stack(parts).sum(0)


def captured(objective: Objective, x: Tensor, wanted: Sequence[Tensor], leaves: Sequence[Tensor]) -> Loss:
    """Record the loss and its backward pass as CUDA graphs, once each, for batches of this shape.

    Where the recording fails (an operator that waits for the device), return the loss as it is, and warn.

    Args:
        objective: The loss.
        x: A batch of the shape that all batches have.
        wanted: The teacher's tensors of it.
        leaves: The values.

    Returns:
        What computes the loss from a batch, the teacher's tensors and the values.
    """
    plain = replace(objective, cached=False).loss
    sample = (x.clone(), *(part.clone() for part in wanted), *leaves)
    try:
        made = torch.cuda.make_graphed_callables(plain, sample)
    except torch.OutOfMemoryError:
        raise
    except (CompressError, RuntimeError, AssertionError) as error:
        text = f"no CUDA graph of a step ({one_line(error)}): fine-tuning goes on without"
        warnings.warn(text, CompressWarning, stacklevel=3)
        return plain
    return cast("Loss", made)
