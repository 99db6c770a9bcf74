"""Ridge regression of a layer's weight on patches of its input: the one solver, and all its λ.

A layer W, b (groups G, outputs O, inputs x taps F) reads x and should give t. With centred second moments

    H = E[(x − x̄)(x − x̄)ᵀ]      C = E[(t − t̄ − W (x − x̄))(x − x̄)ᵀ]      W* = W + C (H + λ I)⁻¹

W* is the least squares target: where inputs say little, it stays what W was. Its offset is b* = t̄ − W* x̄.
Each λ is a share of the mean diagonal of H, the variance of what the layer reads; all were chosen on
networks and inputs of their own, and none may be larger where inputs are real ones:

| λ             | of what                                             | why so large                      |
|---------------|-----------------------------------------------------|-----------------------------------|
| TARGET_REAL   | target of pruning, and of refitting on real inputs  | numerics, and the patches' noise  |
| TARGET_MADE   | target of refitting on inputs that are made         | they mislead where they vary less |
| TARGET_4_BITS | target of rounding to 4 bits; doubled with each bit | as much misleads less to repair   |
| ROUNDING      | H that weighs errors of rounding                    | other images have other moments   |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxcompress.errors import InputError
from onnxcompress.optimize.deterministic_threads import in_turn, one_thread

TARGET_REAL = 1e-2
TARGET_MADE = 0.3
TARGET_4_BITS = 1.0
FOLDS = 4
"""Parts of the images of which each is left out once, where λ is chosen by cross-validation."""
LADDER = tuple(TARGET_REAL * 4**step for step in range(7))
"""The λ that are tried."""
MORE_ROWS = 0.5
"""λ for a fit on all folds over the one chosen: the best λ falls with the number of rows."""
ROUNDING = 0.1
TARGET_ROWS = 4
"""Patches per weight of an output that the target takes at least: with fewer it is the layer's own W."""
DEAD = 1e-4
"""Least mean diagonal of a group's H that the damping assumes, relative to the mean of all groups."""


@dataclass
class LayerMoments:
    """First and second moments of a layer's input, and their cross moments with its residual; float64.

    They are about `reference`, the mean of the first part that was added: a part is summed in float32,
    where a channel that hardly varies about a large mean would lose its variance.
    """

    gram: Tensor
    """Σ (x − reference)(x − reference)ᵀ, (G, F, F)"""
    cross: Tensor
    """Σ r (x − reference)ᵀ, (G, O, F), r = t − W x: as the layer is."""
    inputs: Tensor
    """Σ (x − reference), (G, F)"""
    residual: Tensor
    """Σ r, (G, O)"""
    rows: int = 0
    reference: Tensor | None = None
    """(G, F)"""

    def check_finite(self, label: str) -> None:
        """Check that the sums have not overflowed: nothing could be fitted to them.

        Args:
            label: Name of the layer.

        Raises:
            InputError: They have.
        """
        if not all(bool(sums.isfinite().all()) for sums in (self.gram, self.cross)):
            raise InputError(
                f"{label!r}: what it reads or gives is too large for its squares to be summed up; check "
                "--preprocess, or the weights in front of it"
            )

    @staticmethod
    def empty(weight: Tensor) -> LayerMoments:
        """Create moments of nothing.

        Args:
            weight: The layer's weight, (G, O, F).

        Returns:
            Moments of its shape, on its device.
        """
        groups, outputs, fan = weight.shape
        zeros = torch.zeros(groups, fan, fan, dtype=torch.float64, device=weight.device)
        cross = torch.zeros(groups, outputs, fan, dtype=torch.float64, device=weight.device)
        return LayerMoments(zeros, cross, zeros[:, 0].clone(), cross[..., 0].clone())

    def add(self, x: Tensor, residual: Tensor | None) -> None:
        """Add patches and residuals.

        Args:
            x: Patches of the layer's input, (G, F, R).
            residual: What the layer's output lacks there, r = t − W x, (G, O, R); None: nothing.
        """
        if self.reference is None:
            self.reference = x.mean(2)
        x = x - self.reference[..., None]
        self.gram += x @ x.transpose(1, 2)  # in float32: a part has few rows
        self.inputs += x.sum(2)
        self.rows += x.shape[2]
        if residual is not None:
            self.cross += residual @ x.transpose(1, 2)
            self.residual += residual.sum(2)

    def merge(self, other: LayerMoments) -> None:
        """Add the samples of other moments, which may be about another reference.

        With d the difference of the references: Σ (x + d)(x + d)ᵀ.

        Args:
            other: The other moments, not empty.
        """
        assert other.reference is not None
        if self.reference is None:
            self.reference = other.reference
        off = other.reference.double() - self.reference.double()
        along = other.inputs + 0.5 * other.rows * off
        self.gram += other.gram  # in place, as what follows: memory is what this costs
        self.gram.baddbmm_(torch.stack([along, off], 2), torch.stack([off, along], 1))
        self.cross += other.cross
        self.cross.baddbmm_(other.residual[..., None], off[:, None])
        self.inputs += other.inputs + other.rows * off
        self.residual += other.residual
        self.rows += other.rows

    @property
    def mean(self) -> Tensor:
        """Mean of the layer's input, (G, F)."""
        off = self.inputs / max(self.rows, 1)
        return off if self.reference is None else off + self.reference

    def shift(self, weight: Tensor, new: Tensor) -> Tensor:
        """Compute what to add to the bias when a new weight replaces the layer's own.

        Args:
            weight: The layer's weight, (G, O, F).
            new: The new weight, (G, O, F).

        Returns:
            The change of the bias, (G, O).
        """
        change = new.double() - weight.double()
        return self.residual / max(self.rows, 1) - torch.einsum("gof,gf->go", change, self.mean)


def merged(parts: Iterable[LayerMoments]) -> LayerMoments:
    """Add up moments of parts of the samples, one after the other.

    Args:
        parts: The moments of the parts, at least one; they stay as they are.

    Returns:
        The moments of all samples.
    """
    first, *others = parts
    whole = LayerMoments(
        first.gram.clone(), first.cross.clone(), first.inputs.clone(), first.residual.clone(),
        first.rows, first.reference,
    )  # fmt: skip
    for part in others:
        if part.rows:
            whole.merge(part)
    return whole


def choose_target(weight: Tensor, folds: Sequence[LayerMoments], *, bias: bool = True) -> float:
    """Choose λ of the target by cross-validation over images.

    A layer is fitted on all folds but one. With Δ = W* − W its error on the fold left out, less that of W,
    is ⟨ΔH, Δ⟩ − 2⟨Δ, C⟩ with the fold's own moments: so λ = ∞, which keeps W, has 0. Patches of one image
    are alike: a rule that takes them for independent, as generalized cross-validation does, finds far too
    small a λ where images are few.

    Args:
        weight: The weight, (G, O, F).
        folds: Moments of parts of the images.
        bias: As for `least_squares`.

    Returns:
        λ for a fit on all folds, as a share of the mean diagonal of H.
    """
    held = [fold for fold in folds if fold.rows]
    if len(held) < 2:
        return TARGET_MADE

    def errors_on(index: int) -> Tensor:
        """Errors on one fold, for each λ of the ladder."""
        fold = held[index]
        rest = merged(other for other in held if other is not fold)
        (h, c), (own_h, own_c) = _centred(fold, bias=bias), _centred(rest, bias=bias)
        errors = []
        for target in LADDER:
            damped = own_h + torch.diag_embed((target * _size(own_h))[:, None].expand(-1, own_h.shape[1]))
            # Cholesky's, twice as fast as `least_squares`: only λ is kept of it
            change = torch.cholesky_solve(own_c.mT, torch.linalg.cholesky(damped)).mT
            errors.append(((change @ h) * change).sum() - 2 * (change * c).sum())
        return torch.stack(errors)

    errors = torch.stack(list(in_turn(errors_on, len(held), weight.device))).sum(0)
    best = int(errors.argmin())
    return MORE_ROWS * LADDER[best] if errors[best] < 0 else float("inf")


def least_squares(
    weight: Tensor, moments: LayerMoments, *, ridge: float, target: float, bias: bool = True
) -> tuple[Tensor, Tensor]:
    """Compute the least squares target of a layer's weight, and the damped second moments.

    Args:
        weight: The weight, (G, O, F).
        moments: Moments of the layer's input and residual.
        ridge: λ of H, as a share of its mean diagonal.
        target: λ of the target, likewise; infinity: the target is the layer's own W.
        bias: Whether the layer has an offset that is fitted, too; else moments are about 0.

    Returns:
        W*, (G, O, F), and H, (G, F, F); both float64.
    """
    h, c = _centred(moments, bias=bias)
    size = _size(h)
    w = weight.double()
    if target != float("inf"):
        damped = h + torch.diag_embed((target * size)[:, None].expand(-1, h.shape[1]))
        with one_thread():
            w = w + torch.linalg.solve(damped, c.transpose(1, 2)).transpose(1, 2)
    h = h + torch.diag_embed((ridge * size)[:, None].expand(-1, h.shape[1]))
    return w, h


def _size(h: Tensor) -> Tensor:
    """Mean diagonal of H in each group, (G,), above 0 where groups read nothing, too."""
    size = h.diagonal(dim1=1, dim2=2).mean(1)
    return size.clamp_min(DEAD * float(size.mean()) + 1e-12)


def _centred(moments: LayerMoments, *, bias: bool) -> tuple[Tensor, Tensor]:
    """Second moments H and C about the means, or about 0 for a layer without an offset."""
    rows = max(moments.rows, 1)
    off = moments.inputs / rows
    h = moments.gram / rows - off[:, :, None] * off[:, None]
    c = moments.cross / rows - (moments.residual / rows)[..., None] * off[:, None]
    if bias:
        return h, c
    h = h + moments.mean[:, :, None] * moments.mean[:, None]
    return h, c + (moments.residual / rows)[..., None] * moments.mean[:, None]
