"""Steps along gradients by torch's own functions for them, each value at a rate of its own.

`torch.optim`'s classes import torch's compiler when the first of them is made: a second of processor time
and 75 MB, which nothing here has a use for. The functions that they call do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980)."""

    def __init__(
        self,
        values: Sequence[Tensor],
        rates: Sequence[float],
        betas: tuple[float, float],
        eps: float = 1e-8,
    ) -> None:
        """Begin with no memory of gradients.

        Args:
            values: Tensors to change in place.
            rates: Peak learning rate of each.
            betas: What the running means of gradients and of their squares keep of themselves in a step.
            eps: What is added to the root of the mean square.
        """
        self.values, self.rates = list(values), list(rates)
        self.betas, self.eps = betas, eps
        self._forget()

    def _forget(self) -> None:
        self._means = [torch.zeros_like(value) for value in self.values]
        self._squares = [torch.zeros_like(value) for value in self.values]
        self._counts = [torch.zeros((), device=value.device) for value in self.values]

    @property
    def state(self) -> list[Tensor]:
        """What steps change besides the values."""
        return [*self._means, *self._squares, *self._counts]

    @torch.no_grad()
    def step(self, slopes: Sequence[Tensor], share: float | Tensor) -> None:
        """Change all values by one step.

        Args:
            slopes: Gradient of each value.
            share: Rate of this step as a part of the peak rates; on a GPU it may be a tensor, ().
        """
        states = zip(self.values, self.rates, self._means, self._squares, self._counts, strict=True)
        for slope, (value, rate, mean, square, count) in zip(slopes, states, strict=True):
            adam(
                [value], [slope], [mean], [square], [], [count],
                fused=value.device.type == "cuda", lr=share * rate, beta1=self.betas[0],
                beta2=self.betas[1], eps=self.eps, weight_decay=0.0, amsgrad=False, maximize=False,
            )  # fmt: skip

    def slow_down(self, factor: float) -> None:
        """Divide all rates and forget the gradients, for values that were set back.

        Args:
            factor: What rates are divided by.
        """
        self.rates = [rate / factor for rate in self.rates]
        self._forget()


class Momentum:
    """Gradient descent with momentum."""

    def __init__(self, values: Sequence[Tensor], momentum: float) -> None:
        """Begin with no memory of gradients.

        Args:
            values: Tensors to change in place.
            momentum: What the running sum of gradients keeps of itself in a step.
        """
        self.values, self.momentum = list(values), momentum
        self._sums: list[Tensor | None] = [None] * len(self.values)

    @torch.no_grad()
    def step(self, slopes: Sequence[Tensor], rate: float) -> None:
        """Change all values by one step.

        Args:
            slopes: Gradient of each value.
            rate: The learning rate.
        """
        sgd(
            self.values, list(slopes), self._sums, momentum=self.momentum, lr=rate,
            weight_decay=0.0, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
