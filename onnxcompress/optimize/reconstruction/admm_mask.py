"""Choose the mask of a layer's weights and the values of those that stay, in closed form.

With the second moments H of a layer's input and its least squares target W* (both from `gptq`), the error
of a sparse Ŵ is, up to a constant,

    e(Ŵ) = Σ over rows o of  g_o (ŵ_o − w*_o) H (ŵ_o − w*_o)ᵀ          g: the weight of a row's error

 1. inputs are scaled to H with diagonal 1, rows by √g: magnitudes then are comparable within the layer;
 2. the mask: ADMM between the quadratic and the projection onto the masks allowed, with a penalty ρ that
    grows while the mask changes (Meng et al., ALPS, arXiv 2406.07831). One eigendecomposition of H serves
    all steps, so that each is a few matrix products, whatever the mask; removing weights one by one (OBS,
    Hassibi and Stork, 1992) would take an inverse for each row;
 3. the values: least squares on the mask, by conjugate gradients on all rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onnxcompress.optimize.deterministic_threads import one_thread
from onnxcompress.optimize.reconstruction.sparsity_pattern import UNSTRUCTURED, Pattern

STEPS = 120
REFITS = 60
RHO = 0.1
"""Initial penalty ρ, relative to H's diagonal."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""(share of the mask that changed in a step, factor by which ρ grows where it is at least that), each third
step."""
SETTLED, SETTLED_SHARE = 2, 0.003
"""Steps in which no more than this share of the mask changes, after which it is taken."""
TRIAL_RHO = 0.6
"""Penalty ρ of `Problem.approximate`, relative to H's diagonal. Two layers of MobileNetV2, with 5 steps:
0.5 dB more error than `Problem.solve` at each sparsity from 30 to 95 %, about 0.8 dB with 0.3 or 1.0; where
the largest weights stay: 1.0 to 1.4 dB."""
MIN_ROW_WEIGHT = 1e-4
"""Least weight of a row's error, relative to the mean."""


@dataclass(frozen=True)
class MaskChoice:
    """How many weights of a layer stay, and in which pattern."""

    count: int
    taps: int
    """Taps of the kernel: columns are (inputs, taps)."""
    pattern: Pattern = UNSTRUCTURED

    def mask(self, score: Tensor) -> Tensor:
        """Select the weights with the largest scores that the pattern allows.

        Args:
            score: The score of each weight, (G, O, F).

        Returns:
            True where a weight stays, (G, O, F).
        """
        if not self.pattern.group:
            flat = score.reshape(-1)
            least = flat.kthvalue(flat.numel() - self.count + 1).values
            mask = flat > least
            ties = (flat == least).nonzero()[:, 0]
            mask[ties[: self.count - int(mask.sum())]] = True
            return mask.reshape(score.shape)
        split = score.reshape(*score.shape[:2], -1, self.pattern.group, self.taps)
        best = split.topk(self.pattern.kept, dim=3).indices
        return torch.zeros_like(split, dtype=torch.bool).scatter_(3, best, True).reshape(score.shape)


@dataclass(frozen=True)
class Problem:
    """A layer's pruning problem, scaled as in step 1; float32."""

    w: Tensor
    """(G, O, F)"""
    h: Tensor
    """(G, F, F)"""
    pull: Tensor
    """w h, (G, O, F)"""
    scale: Tensor
    """What w was multiplied by, float64."""

    @staticmethod
    def of(goal: Tensor, h: Tensor, rows: Tensor) -> Problem:
        """Scale a layer so that magnitudes are comparable within it (step 1).

        Args:
            goal: W*, (G, O, F), float64.
            h: H, (G, F, F), float64.
            rows: g, the weight of each row's error, (G, O).

        Returns:
            The problem.
        """
        unit = h.diagonal(dim1=1, dim2=2).sqrt()
        worth = rows.clamp_min(MIN_ROW_WEIGHT * float(rows.mean())).sqrt()[..., None].to(h)
        scale = unit[:, None] * worth / worth.mean()
        normed = h / unit[:, :, None] / unit[:, None]
        w, h = (goal * scale).float(), normed.float()
        return Problem(w, h, w @ h, scale)

    def solve(self, choice: MaskChoice, *, steps: int = STEPS, refits: int = REFITS) -> Tensor:
        """Choose the mask by ADMM, then the values by least squares.

        Source: ALPS (Meng et al., arXiv 2406.07831).

        Args:
            choice: How many weights stay, and in which pattern.
            steps: Steps of ADMM, at most.
            refits: Steps of conjugate gradients, at most.

        Returns:
            Ŵ, (G, O, F), float64.
        """
        with one_thread():
            values, vectors = torch.linalg.eigh(self.h.double())
        values, vectors = values.clamp_min(0).float(), vectors.float()
        state, rho, still = _Masked.of(self, choice), RHO, 0
        for step in range(steps):
            right = state.pulled(rho) @ vectors
            free = (right / (values[:, None] + rho)) @ vectors.transpose(1, 2)
            moved = state.move(free, rho)
            still = 0 if moved > SETTLED_SHARE else still + 1
            if still == SETTLED:
                break
            if step % 3 == 2:
                rho *= next(growth for share, growth in GROWTH if moved >= share)
        return self._refitted(state, refits)

    def inverse(self) -> Tensor:
        """Compute (H + TRIAL_RHO I)⁻¹ for `approximate`: one serves all choices.

        Returns:
            The inverse, (G, F, F).
        """
        with one_thread():
            h = self.h.double()
            damped = h + TRIAL_RHO * torch.eye(h.shape[2]).to(h)
            return torch.cholesky_inverse(torch.linalg.cholesky(damped)).float()

    def approximate(self, choice: MaskChoice, inverse: Tensor, *, steps: int, refits: int) -> Tensor:
        """Do what `solve` does in few steps of a constant penalty, to learn about how large the error is.

        Args:
            choice: How many weights stay, and in which pattern.
            inverse: What `inverse` returns.
            steps: Steps of ADMM, at least one.
            refits: Steps of conjugate gradients, at most.

        Returns:
            Ŵ, (G, O, F), float64.
        """
        state = _Masked.of(self, choice)
        for _ in range(steps):
            state.move(state.pulled(TRIAL_RHO) @ inverse, TRIAL_RHO)
        return self._refitted(state, refits)

    def _refitted(self, state: _Masked, refits: int) -> Tensor:
        """Run step 3 from the unconstrained solution on the final mask."""
        start = torch.where(state.mask, state.free, 0.0)
        return refit(self.w, self.h, start, refits).double() / self.scale


@dataclass
class _Masked:
    """State of ADMM (step 2), each (G, O, F)."""

    choice: MaskChoice
    pull: Tensor
    mask: Tensor
    sparse: Tensor
    """The projection onto the masks allowed."""
    dual: Tensor
    free: Tensor
    """The unconstrained solution."""

    @staticmethod
    def of(problem: Problem, choice: MaskChoice) -> _Masked:
        """Begin with the largest weights."""
        w = problem.w
        mask = choice.mask(w.abs())
        return _Masked(choice, problem.pull, mask, torch.where(mask, w, 0.0), torch.zeros_like(w), w)

    def pulled(self, rho: float) -> Tensor:
        """Compute the right side of the equations (H + ρ I) ŵ = … of the unconstrained solution."""
        return self.pull + rho * self.sparse - self.dual

    def move(self, free: Tensor, rho: float) -> float:
        """Take a step to a new unconstrained solution, and return the share of the mask that changed."""
        both = free + self.dual / rho
        mask = self.choice.mask(both.abs())
        moved = int((mask & ~self.mask).sum()) / max(int(mask.sum()), 1)
        self.free, self.mask, self.sparse = free, mask, torch.where(mask, both, 0.0)
        self.dual = self.dual + rho * (free - self.sparse)
        return moved


def refit(w: Tensor, h: Tensor, start: Tensor, steps: int = REFITS) -> Tensor:
    """Solve the least squares problem on a mask by conjugate gradients, each row on its own (step 3).

    Args:
        w: The target, (G, O, F).
        h: The second moments, (G, F, F).
        start: Where to start, (G, O, F); its zeros stay zeros.
        steps: Steps of conjugate gradients, at most.

    Returns:
        The weight, (G, O, F).
    """
    mask = (start != 0).to(w)
    x = start
    left = ((w - x) @ h) * mask
    size = first = left.square().sum(2, keepdim=True)
    towards = left
    for _ in range(steps):
        product = (towards @ h) * mask
        step = size / (towards * product).sum(2, keepdim=True).clamp_min(1e-30)
        x, left = x + step * towards, left - step * product
        before, size = size, left.square().sum(2, keepdim=True)
        if bool((size <= 1e-10 * first).all()):
            break
        towards = left + size / before.clamp_min(1e-30) * towards
    return x
