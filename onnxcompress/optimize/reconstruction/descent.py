"""Steps along the gradient for fine-tuning: orthogonalized momentum for matrices, Adam for the rest.

A weight of a dense layer is a matrix, a row for each output. Its step is the momentum with all singular
values made alike: directions in which the gradient is small are not left behind. Source: Jordan et al.,
Muon: an optimizer for hidden layers in neural networks (2024). Biases, scales and the weights of depthwise
layers, which have one input each, take steps of Adam.

`torch.optim.Muon` takes matrices one by one and always multiplies in bfloat16, for which many CPUs have no
instructions. Here those of one shape are multiplied together, in float32 on a CPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxcompress.optimize.deterministic_threads import in_turn
from onnxcompress.optimize.gradient_steps import Adam

MOMENTUM = 0.9
BETAS = (0.9, 0.98)
"""Of Adam."""
SIZE = 0.3
"""Root mean square of a step of a matrix, relative to the rate: about that of Adam's steps."""
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration X ← a X + (b A + c A²) X with A = X Xᵀ, as published: singular values come
near 1 in few iterations, not exactly to it."""


@dataclass
class _Stack:
    """Matrices of one shape."""

    values: list[Tensor]
    rates: list[float]
    momentum: Tensor
    """(K, O, F)."""


class Descent:
    """Changes values along their gradients, each at a rate relative to its size."""

    def __init__(
        self, values: Sequence[Tensor], sizes: Sequence[float], rate: float, orthogonal: bool = True
    ) -> None:
        """Sort the values into matrices and others.

        Args:
            values: Leaves of the graph of gradients; they are changed in place.
            sizes: Size of each, to which its rate is proportional.
            rate: Peak rate.
            orthogonal: Whether steps of matrices are orthogonalized; otherwise all are steps of Adam.
        """
        self.device, self.slower = values[0].device, 1.0
        by_shape: dict[tuple[int, int], list[tuple[Tensor, float]]] = defaultdict(list)
        others: list[tuple[Tensor, float]] = []
        for value, size in zip(values, sizes, strict=True):
            if orthogonal and is_matrix(value):
                by_shape[len(value), value[0].numel()].append((value, rate * size))
            else:
                others.append((value, rate * size))
        self._stacks = [
            _Stack([v for v, _ in rows], [r for _, r in rows], values[0].new_zeros(len(rows), *shape))
            for shape, rows in by_shape.items()
        ]
        self._adam = Adam([v for v, _ in others], [r for _, r in others], BETAS)

    @property
    def state(self) -> list[Tensor]:
        """What steps change besides the values."""
        return [*(stack.momentum for stack in self._stacks), *self._adam.state]

    def step(self, share: float | Tensor) -> None:
        """Change the values by one step along their `grad`.

        Args:
            share: Rate of this step as a part of the peak rate; on a GPU it may be a tensor, ().
        """
        self._adam.step([_slope(value) for value in self._adam.values], share)
        for _ in in_turn(lambda i: self._move(self._stacks[i], share), len(self._stacks), self.device):
            pass

    def slow_down(self, factor: float) -> None:
        """Divide all rates and forget the momentum, for values that were set back.

        Args:
            factor: What rates are divided by.
        """
        self.slower *= factor
        for stack in self._stacks:
            stack.rates = [rate / factor for rate in stack.rates]
            stack.momentum.zero_()
        self._adam.slow_down(factor)

    @torch.no_grad()
    def _move(self, stack: _Stack, share: float | Tensor) -> None:
        """Take a step of the matrices of one shape, with Nesterov's momentum."""
        slopes = torch.stack([_slope(value).flatten(1) for value in stack.values])
        stack.momentum.lerp_(slopes, 1 - MOMENTUM)
        steps = orthogonalized(stack.momentum.lerp(slopes, 1 - MOMENTUM))
        steps = _normalized(steps) * (SIZE * steps[0].numel() ** 0.5)
        for value, rate, step in zip(stack.values, stack.rates, steps, strict=True):
            value.sub_(step.reshape(value.shape) * (share * rate))


def is_matrix(value: Tensor) -> bool:
    """Return whether a parameter is the weight of a layer whose outputs have several inputs in common.

    Args:
        value: The parameter, with a row for each output.

    Returns:
        Whether it is; a depthwise weight (C, 1, h, w) is none.
    """
    return value.ndim >= 2 and len(value) > 1 and value.shape[1] > 1


def orthogonalized(matrices: Tensor) -> Tensor:
    """Bring all singular values of matrices near 1, the singular vectors stay.

    Args:
        matrices: (K, O, F).

    Returns:
        The matrices, (K, O, F); one of zeros stays.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = _normalized(matrices.mT if tall else matrices)
    x = x.bfloat16() if x.device.type == "cuda" else x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


def _normalized(matrices: Tensor) -> Tensor:
    """Divide each matrix by its Frobenius norm."""
    norms: Tensor = torch.linalg.matrix_norm(matrices, keepdim=True)
    return matrices / norms.clamp(min=1e-30)


def _slope(value: Tensor) -> Tensor:
    assert value.grad is not None
    return value.grad
