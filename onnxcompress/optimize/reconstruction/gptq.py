"""Round a layer's weight to a grid so that its output changes least: in closed form, column by column.

A layer W, b (groups G, outputs O, inputs x taps F) reads x and should give t. With centred second moments

    H = E[(x − x̄)(x − x̄)ᵀ] + λ I      C = E[(t − t̄ − W (x − x̄))(x − x̄)ᵀ]      W* = W + C H⁻¹

the error of any Ŵ with its best offset b̂ = t̄ − Ŵ x̄ is, up to a constant, tr (Ŵ − W*) H (Ŵ − W*)ᵀ: the
least squares target W* makes up for the error of earlier layers, and b̂ is the bias correction.

 1. scales: of a row, the fraction of its largest magnitude with the least diag(H)-weighted rounding error;
 2. GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded in turn, and what is lost moves on to the
    columns not yet rounded through the Cholesky factor of H⁻¹;
 3. coordinate descent (Behdin et al., QuantEase, arXiv 2309.01885): each column in turn takes the integers
    that are best given all others; between sweeps the scale is refitted in closed form.

Columns go in blocks, so that nearly all work is matrix products. Layers of any group count are one batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onnxcompress.optimize.deterministic_threads import one_thread
from onnxcompress.optimize.reconstruction.ridge import LayerMoments, least_squares
from onnxcompress.optimize.reconstruction.saturation import SaturationBounds

BLOCK = 64
RATIOS = 30
"""Clipping ratios tried, evenly from LEAST to 1."""
LEAST = 0.4
SWEEPS = 3


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
        """The weight on its grid, (G, O, F)."""
        return self.integers * self.scale


def nearest(
    weight: Tensor,
    allowed: SaturationBounds,
    per_channel: bool,
    hessian: Tensor | None = None,
    ratios: int = RATIOS,
) -> Rounded:
    """Round each weight to its nearest integer, with the scales of the least (weighted) rounding error.

    Args:
        weight: The weight, (G, O, F).
        allowed: The integers allowed.
        per_channel: Whether each output has a scale.
        hessian: H, (G, F, F), whose diagonal weighs the errors; None: all alike.
        ratios: Clipping ratios that are tried.

    Returns:
        The weight on its grid.
    """
    diagonal = (
        torch.ones_like(weight[:, :1]) if hessian is None else hessian.diagonal(dim1=1, dim2=2)[:, None]
    )
    scale = best_scale(weight, diagonal.to(weight), allowed, per_channel, ratios)
    integers = torch.round(weight / scale).clamp(*allowed.bounds(weight / scale))
    return Rounded(integers, scale, torch.zeros_like(weight[..., 0]), 1.0)


def reconstruct(
    weight: Tensor,
    moments: LayerMoments,
    allowed: SaturationBounds,
    per_channel: bool,
    *,
    ridge: float,
    target: float,
    ratios: int = RATIOS,
    sweeps: int = SWEEPS,
) -> Rounded:
    """Choose integers and scales with the least error on the layer's outputs.

    Sources: GPTQ (Frantar et al., arXiv 2210.17323); QuantEase (Behdin et al., arXiv 2309.01885).

    Args:
        weight: The weight, (G, O, F), float32.
        moments: Moments of the layer's input and residual.
        allowed: The integers allowed.
        per_channel: Whether each output has a scale.
        ridge: λ, as a share of the mean diagonal of H.
        target: The same of the least squares target W*; infinity: the target is the layer's own W.
        ratios: Clipping ratios that are tried for the scales.
        sweeps: Sweeps of coordinate descent behind GPTQ; 0: each weight is rounded to its nearest.

    Returns:
        The weight on its grid, and the change of the bias.
    """
    w, h = least_squares(weight, moments, ridge=ridge, target=target)
    goal, hessian = w.float(), h.float()
    start = nearest(goal, allowed, per_channel, hessian, ratios)
    if not sweeps:
        return replace(start, shift=moments.shift(weight, start.weight).float())
    scale = start.scale
    low, high = allowed.bounds(goal / scale)
    integers = _gptq(goal, h, scale, low, high)
    for sweep in range(sweeps):
        if sweep:
            scale = _refit(goal, hessian, integers, scale, per_channel)
        integers = _descend(goal, hessian, integers, scale, low, high)
    before, after = (_error(goal - one, hessian) for one in (start.weight, integers * scale))
    shift = moments.shift(weight, integers * scale)
    return Rounded(integers, scale, shift.float(), float(after) / max(float(before), 1e-30))


def best_scale(
    weight: Tensor, diagonal: Tensor, allowed: SaturationBounds, per_channel: bool, ratios: int = RATIOS
) -> Tensor:
    """Choose the scales with the least weighted squared error of rounding and clipping.

    Args:
        weight: The weight, (G, O, F).
        diagonal: The weight of each column's error, (G, 1, F).
        allowed: The integers allowed.
        per_channel: Whether each output has a scale; else all are equal.
        ratios: Clipping ratios that are tried.

    Returns:
        The scales, (G, O, 1).
    """
    whole = allowed.least_scale(weight)
    if not per_channel:
        whole = whole.amax().expand_as(whole)
    whole = whole.clamp_min(1e-10)
    best = torch.full_like(whole, float("inf"))
    chosen = whole
    for step in range(ratios):
        scale = whole * (LEAST + (1 - LEAST) * step / (ratios - 1))
        off = torch.round(weight / scale).clamp(*allowed.bounds(weight / scale)) * scale - weight
        error = (off.square() * diagonal).sum(2, keepdim=True)
        if not per_channel:
            error = error.sum().expand_as(whole)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return chosen.contiguous()


def _gptq(w: Tensor, h: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round columns with error feedback, those with large diagonal entries first; return the integers."""
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
    """Split (G, O, F) into views of its columns, (G, O, 1); one call costs less than a slice each."""
    return torch.split(values, 1, dim=2)


def _inside(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round and clip, in place."""
    return values.round_().clamp_(low, high)


def _descend(w: Tensor, h: Tensor, integers: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Run one sweep of coordinate descent over the columns."""
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
    """Compute the scale with the least error for these integers: ⟨w, q⟩_H / ⟨q, q⟩_H."""
    product = integers @ h
    top, bottom = (w * product).sum(2, keepdim=True), (integers * product).sum(2, keepdim=True)
    if not per_channel:
        top, bottom = top.sum().expand_as(top), bottom.sum().expand_as(bottom)
    found = top / bottom.clamp_min(1e-30)
    usable = (found > 0.5 * scale) & (found < 2 * scale)
    return torch.where(usable, found, scale)


def _error(off: Tensor, h: Tensor) -> Tensor:
    return ((off @ h) * off).sum()
