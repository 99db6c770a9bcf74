"""Which weights of a layer stay, and their values, given what the layer reads: closed form.

With the second moments H of what a layer reads and its least squares target W* (`rounding` has both), the
error of a sparse Ŵ is, but for a constant,

    e(Ŵ) = Σ over rows o of  g_o (ŵ_o − w*_o) H (ŵ_o − w*_o)ᵀ          g: what a row's error is worth

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
"""Of H's diagonal, at first."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Where more than this share of the mask changed in a step: what ρ grows by, each third step."""
SETTLED = 6
"""Steps without a change after which the mask is taken."""
MIN_ROW_WEIGHT = 1e-4
"""Of the mean row: what a row is worth at least."""


@dataclass(frozen=True)
class Choice:
    """How many weights of a layer stay, and of what pattern."""

    count: int
    taps: int
    """Of the kernel: columns are (inputs, taps)."""
    pattern: Pattern = UNSTRUCTURED

    def mask(self, score: Tensor) -> Tensor:
        """The best by score, (G, O, F)."""
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
    """A layer scaled as in step 1; float32."""

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
        """goal: W* (G, O, F) and h: H (G, F, F), float64; rows: g (G, O)."""
        unit = h.diagonal(dim1=1, dim2=2).sqrt()
        worth = rows.clamp_min(MIN_ROW_WEIGHT * float(rows.mean())).sqrt()[..., None].to(h)
        scale = unit[:, None] * worth / worth.mean()
        normed = h / unit[:, :, None] / unit[:, None]
        with one_thread():
            values, vectors = torch.linalg.eigh(normed)
        w = (goal * scale).float()
        return Problem(w, normed.float(), values.clamp_min(0).float(), vectors.float(), scale)

    def solve(self, choice: Choice, *, steps: int = STEPS, refits: int = REFITS) -> Tensor:
        """Ŵ (G, O, F), float64."""
        sparse = self._admm(choice, steps)
        return refit(self.w, self.h, sparse, refits).double() / self.scale

    def _admm(self, choice: Choice, steps: int) -> Tensor:
        """Step 2: the free solution on the mask that the two sides agreed on."""
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
    """Least squares on the entries of `start` that are not 0, each row on its own."""
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
