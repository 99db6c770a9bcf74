"""Rounding of weights to a grid, given what the layer reads: closed form, column by column.

A layer W, b (groups G, outputs O, inputs x taps F) reads x and should give t. With centred second moments

    H = E[(x − x̄)(x − x̄)ᵀ] + λ I      C = E[(t − t̄ − W (x − x̄))(x − x̄)ᵀ]      W* = W + C H⁻¹

the error of any Ŵ with its best offset b̂ = t̄ − Ŵ x̄ is, but for a constant, tr (Ŵ − W*) H (Ŵ − W*)ᵀ: the
least squares target W* makes up for the error of what comes before, and b̂ is the bias correction.

 1. scales: of a row, the fraction of its largest magnitude with the least diag(H)-weighted rounding error;
 2. GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded in turn, and what is lost moves on to the
    columns not yet rounded through the Cholesky factor of H⁻¹;
 3. coordinate descent (Behdin et al., QuantEase, arXiv 2309.01885): each column in turn takes the integers
    that are best given all others; between sweeps the scale is refitted in closed form.

Columns go in blocks, so that nearly all work is matrix products. Layers of any group count are one batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onnxcompress.optimize.deterministic_threads import one_thread
from onnxcompress.optimize.reconstruction.saturation import SaturationBounds

BLOCK = 64
RATIOS = 30
"""Clipping ratios tried, evenly from LEAST to 1."""
LEAST = 0.4
SWEEPS = 3
DEAD = 1e-4
"""Of the mean group: what a group is damped by as if it read at least so much."""


@dataclass
class Moments:
    """First and second moments of what a layer reads, and of its residual; float64.

    About `reference`, the mean of what was added first: a part is summed in float32, where a channel that
    hardly varies about a large mean would lose its variance.
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

    @staticmethod
    def empty(weight: Tensor) -> Moments:
        groups, outputs, fan = weight.shape
        zeros = torch.zeros(groups, fan, fan, dtype=torch.float64)
        cross = torch.zeros(groups, outputs, fan, dtype=torch.float64)
        return Moments(zeros, cross, zeros[:, 0].clone(), cross[..., 0].clone())

    def add(self, x: Tensor, residual: Tensor) -> None:
        """x: (G, F, R), residual: (G, O, R)."""
        if self.reference is None:
            self.reference = x.mean(2)
        x = x - self.reference[..., None]
        self.gram += x @ x.transpose(1, 2)  # in float32: a part has few rows
        self.cross += residual @ x.transpose(1, 2)
        self.inputs += x.sum(2)
        self.residual += residual.sum(2)
        self.rows += x.shape[2]

    def merge(self, other: Moments) -> None:
        """Take in moments that were summed about another reference: Σ (x + d)(x + d)ᵀ, d what it is off."""
        assert other.reference is not None
        if self.reference is None:
            self.reference = other.reference
        off = other.reference.double() - self.reference.double()
        along = other.inputs + 0.5 * other.rows * off
        both = along[..., None] * off[:, None]
        self.gram += other.gram + both + both.transpose(1, 2)
        self.cross += other.cross + other.residual[..., None] * off[:, None]
        self.inputs += other.inputs + other.rows * off
        self.residual += other.residual
        self.rows += other.rows

    @property
    def mean(self) -> Tensor:
        """E x, (G, F)"""
        off = self.inputs / max(self.rows, 1)
        return off if self.reference is None else off + self.reference

    def shift(self, weight: Tensor, new: Tensor) -> Tensor:
        """What to add to the bias where the new weight takes the place of the layer's own, (G, O)."""
        change = new.double() - weight.double()
        return self.residual / max(self.rows, 1) - torch.einsum("gof,gf->go", change, self.mean)


@dataclass(frozen=True)
class Rounded:
    """A layer's weight on its grid."""

    integers: Tensor
    """(G, O, F)"""
    scale: Tensor
    """(G, O, 1), all equal per tensor; float32."""
    shift: Tensor
    """What to add to the bias, (G, O)."""
    error: float
    """Mean square of what the layer gives less what it should, over that of rounding to nearest."""

    @property
    def weight(self) -> Tensor:
        return self.integers * self.scale


def nearest(
    weight: Tensor, allowed: SaturationBounds, per_channel: bool, hessian: Tensor | None = None
) -> Rounded:
    """Each weight to its nearest integer, scales by the least (weighted) error."""
    diagonal = (
        torch.ones_like(weight[:, :1]) if hessian is None else hessian.diagonal(dim1=1, dim2=2)[:, None]
    )
    scale = best_scale(weight, diagonal.to(weight), allowed, per_channel)
    integers = torch.round(weight / scale).clamp(*allowed.bounds(weight / scale))
    return Rounded(integers, scale, torch.zeros_like(weight[..., 0]), 1.0)


def reconstruct(
    weight: Tensor,
    moments: Moments,
    allowed: SaturationBounds,
    per_channel: bool,
    *,
    ridge: float,
    target: float,
) -> Rounded:
    """Integers and scales with the least error on the outputs.

    weight: (G, O, F) float32. ridge: λ, as a share of H's mean diagonal. target: as `ridge`, of the least
    squares target W*; infinity: the layer's own W.
    """
    w, h = least_squares(weight, moments, ridge=ridge, target=target)
    goal, hessian = w.float(), h.float()
    start = nearest(goal, allowed, per_channel, hessian)
    scale = start.scale
    low, high = allowed.bounds(goal / scale)
    integers = _gptq(goal, h, scale, low, high)
    for sweep in range(SWEEPS):
        if sweep:
            scale = _refit(goal, hessian, integers, scale, per_channel)
        integers = _descend(goal, hessian, integers, scale, low, high)
    before, after = (_error(goal - one, hessian) for one in (start.weight, integers * scale))
    shift = moments.shift(weight, integers * scale)
    return Rounded(integers, scale, shift.float(), float(after) / max(float(before), 1e-30))


def least_squares(
    weight: Tensor, moments: Moments, *, ridge: float, target: float
) -> tuple[Tensor, Tensor]:
    """W* and H, float64; arguments as of `reconstruct`."""
    rows = max(moments.rows, 1)
    off = moments.inputs / rows
    h = moments.gram / rows - off[:, :, None] * off[:, None]
    c = moments.cross / rows - (moments.residual / rows)[..., None] * off[:, None]
    size = h.diagonal(dim1=1, dim2=2).mean(1)
    size = size.clamp_min(DEAD * float(size.mean()) + 1e-12)  # groups that read nothing, too
    w = weight.double()
    if target != float("inf"):
        damped = h + torch.diag_embed((target * size)[:, None].expand(-1, h.shape[1]))
        with one_thread():
            w = w + torch.linalg.solve(damped, c.transpose(1, 2)).transpose(1, 2)
    h = h + torch.diag_embed((ridge * size)[:, None].expand(-1, h.shape[1]))
    return w, h


def best_scale(weight: Tensor, diagonal: Tensor, allowed: SaturationBounds, per_channel: bool) -> Tensor:
    """(G, O, 1): scales with the least weighted squared error of rounding and clipping."""
    whole = allowed.least_scale(weight)
    if not per_channel:
        whole = whole.amax().expand_as(whole)
    whole = whole.clamp_min(1e-10)
    best = torch.full_like(whole, float("inf"))
    chosen = whole
    for step in range(RATIOS):
        scale = whole * (LEAST + (1 - LEAST) * step / (RATIOS - 1))
        off = torch.round(weight / scale).clamp(*allowed.bounds(weight / scale)) * scale - weight
        error = (off.square() * diagonal).sum(2, keepdim=True)
        if not per_channel:
            error = error.sum().expand_as(whole)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return chosen.contiguous()


def _gptq(w: Tensor, h: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Integers by error feedback, large diagonal entries first."""
    order = h.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True)
    with one_thread():
        inverse = torch.linalg.inv(h[:, order][:, :, order])
        factor = torch.linalg.cholesky((inverse + inverse.transpose(1, 2)) / 2, upper=True).float()
    left = w[..., order].clone()
    low, high = low[..., order], high[..., order]
    integers = torch.empty_like(left)
    fan = left.shape[2]
    for start in range(0, fan, BLOCK):
        end = min(start + BLOCK, fan)
        block = left[..., start:end].clone()
        lost = torch.empty_like(block)
        own = factor[:, start:end, start:end]
        columns = zip(
            *(_columns(t[..., start:end]) for t in (integers, low, high)), _columns(block), _columns(lost),
            strict=True,
        )  # fmt: skip
        for j, (integer, least, most, column, off) in enumerate(columns):
            integer.copy_(_inside(column / scale, least, most))
            off.copy_((column - integer * scale) / own[:, j, j, None, None])
            block[..., j:].addcmul_(off, own[:, j : j + 1, j:], value=-1)
        left[..., end:] -= lost @ factor[:, start:end, end:]
    result = torch.empty_like(integers)
    result[..., order] = integers
    return result


def _columns(values: Tensor) -> tuple[Tensor, ...]:
    """(G, O, 1) views of the columns of (G, O, F); one call costs less than a slice each."""
    return torch.split(values, 1, dim=2)


def _inside(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Rounded, in place."""
    return values.round_().clamp_(low, high)


def _descend(w: Tensor, h: Tensor, integers: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """One sweep of coordinate descent over the columns."""
    integers = integers.clone()
    slope = (w - integers * scale) @ h  # half the negative gradient
    diagonal = h.diagonal(dim1=1, dim2=2)
    fan = w.shape[2]
    for start in range(0, fan, BLOCK):
        end = min(start + BLOCK, fan)
        before = integers[..., start:end].clone()
        local = slope[..., start:end].clone()
        curvatures = diagonal[:, None, start:end] * scale
        columns = zip(
            *(_columns(part[..., start:end]) for part in (integers, low, high)),
            *map(_columns, (local, curvatures)),
            torch.split(h[:, start:end, start:end], 1, dim=1),
            strict=True,
        )
        for integer, least, most, column, curvature, row in columns:
            new = _inside(integer + column / curvature, least, most)
            local.addcmul_((new - integer) * scale, row, value=-1)
            integer.copy_(new)
        slope -= ((integers[..., start:end] - before) * scale) @ h[:, start:end]
    return integers


def _refit(w: Tensor, h: Tensor, integers: Tensor, scale: Tensor, per_channel: bool) -> Tensor:
    """The scale with the least error for these integers: ⟨w, q⟩_H / ⟨q, q⟩_H."""
    product = integers @ h
    top, bottom = (w * product).sum(2, keepdim=True), (integers * product).sum(2, keepdim=True)
    if not per_channel:
        top, bottom = top.sum().expand_as(top), bottom.sum().expand_as(bottom)
    found = top / bottom.clamp_min(1e-30)
    usable = (found > 0.5 * scale) & (found < 2 * scale)
    return torch.where(usable, found, scale)


def _error(off: Tensor, h: Tensor) -> Tensor:
    return ((off @ h) * off).sum()
