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
SETTLED = 6
"""Steps without a change after which the mask is taken."""
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
    values: Tensor
    """Eigenvalues of h."""
    vectors: Tensor
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
        with one_thread():
            values, vectors = torch.linalg.eigh(normed)
        w = (goal * scale).float()
        return Problem(w, normed.float(), values.clamp_min(0).float(), vectors.float(), scale)

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
        sparse = self._admm(choice, steps)
        return refit(self.w, self.h, sparse, refits).double() / self.scale

    def _admm(self, choice: MaskChoice, steps: int) -> Tensor:
        """Run step 2: return the unconstrained solution on the final mask."""
        pull = self.w @ self.h
        mask = choice.mask(self.w.abs())
        sparse, dual, free = torch.where(mask, self.w, 0.0), torch.zeros_like(self.w), self.w
        rho, still = RHO, 0
        for step in range(steps):
            right = (pull + rho * sparse - dual) @ self.vectors
            free = (right / (self.values[:, None] + rho)) @ self.vectors.transpose(1, 2)
            both = free + dual / rho
            new = choice.mask(both.abs())
            sparse = torch.where(new, both, 0.0)
            dual = dual + rho * (free - sparse)
            moved = int((new & ~mask).sum()) / max(int(new.sum()), 1)
            mask, still = new, 0 if moved else still + 1
            if still == SETTLED:
                break
            if step % 3 == 2:
                rho *= next(growth for share, growth in GROWTH if moved >= share)
        return torch.where(mask, free, 0.0)


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
