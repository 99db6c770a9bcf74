"""Resize and Upsample, one axis at a time, as products with small interpolation matrices.

Output position i along an axis of n cells with scale s reads the input at a coordinate x(i), by mode:

    half_pixel          (i + ½)/s − ½                       pytorch_half_pixel  the same, 0 where out = 1
    asymmetric          i/s                                 align_corners       i·(n − 1)/(out − 1)
    tf_crop_and_resize  start·(n − 1) + i·(end − start)·(n − 1)/(out − 1)
    half_pixel_symmetric  n/2·(1 − out/(s·n)) + (i + ½)/s − ½

and weighs the cells around it by the linear or the cubic kernel (widened by 1/s with antialias); cells
outside take the value of the edge (or are left out: exclude_outside). Where s·n is
no integer, onnx's reference has s·n for out; onnxruntime, which is followed, has the size that comes out, a
float32 product rounded down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxcompress.optimize.executor.ops.registry import ExecutionError, Kernel, Op, Site, axes_of, take

_COORDINATES = (
    "half_pixel",
    "pytorch_half_pixel",
    "asymmetric",
    "align_corners",
    "tf_crop_and_resize",
    "half_pixel_symmetric",
)
_NEAREST: dict[str, Callable[[float], int]] = {
    "round_prefer_floor": lambda x: math.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: math.floor(x + 0.5),
    "floor": math.floor,
    "ceil": math.ceil,
}
_OLD_NEAREST = "simple"
"""Before opset 11, as in onnxruntime: the next cell where the axis shrinks, else the one before."""


@dataclass(frozen=True)
class _Style:
    """The attributes of a Resize node that determine the interpolation."""

    mode: str
    coordinates: str
    nearest: str
    cubic: float
    antialias: bool
    exclude_outside: bool
    outside: float


@dataclass(frozen=True)
class _Axis:
    """One resized axis: input and output size, the scale, and the region of interest."""

    size: int
    out: int
    scale: float
    start: float
    end: float


def _coordinate(style: _Style, axis: _Axis, i: int) -> float:
    """Map output position i to a coordinate in the input, rounded to float32 as onnxruntime does."""
    at, scale, half = np.float32(i), np.float32(axis.scale), np.float32(0.5)
    if style.coordinates == "asymmetric":
        return float(at / scale)
    if style.coordinates == "align_corners":
        return 0.0 if axis.out == 1 else i * (axis.size - 1) / (axis.out - 1)
    if style.coordinates == "tf_crop_and_resize":
        span = (axis.end - axis.start) * (axis.size - 1)
        return axis.start * (axis.size - 1) + (span / 2 if axis.out == 1 else i * span / (axis.out - 1))
    if style.coordinates == "pytorch_half_pixel" and axis.out == 1:
        return 0.0
    x = float((at + half) / scale - half)
    if style.coordinates == "half_pixel_symmetric":
        x += axis.size / 2 * (1 - axis.out / (axis.scale * axis.size))
    return x


def _kernel_value(style: _Style, distance: float) -> float:
    """Evaluate the linear or cubic kernel at a distance."""
    x, a = abs(distance), style.cubic
    if style.mode == "linear":
        return max(1 - x, 0.0)
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0.0


def _matrix(style: _Style, axis: _Axis) -> np.ndarray:
    """Compute the weights (out, size) in float64; a row is zero where the result is `style.outside`."""
    stretch = min(axis.scale, 1.0) if style.antialias else 1.0
    reach = (1 if style.mode == "linear" else 2) / stretch
    weights = np.zeros((axis.out, axis.size))
    for i in range(axis.out):
        x = _coordinate(style, axis, i)
        if _is_outside(style, axis, x):
            continue
        cells = range(math.floor(x - reach), math.ceil(x + reach) + 1)
        row = {cell: _kernel_value(style, (cell - x) * stretch) for cell in cells}
        if style.exclude_outside:
            row = {cell: weight for cell, weight in row.items() if 0 <= cell < axis.size}
        total = sum(row.values())
        for cell, weight in row.items():
            weights[i, min(max(cell, 0), axis.size - 1)] += weight / total
    return weights


def _is_outside(style: _Style, axis: _Axis, x: float) -> bool:
    return style.coordinates == "tf_crop_and_resize" and not 0 <= x <= axis.size - 1


def _resize_axis(x: Tensor, dim: int, style: _Style, axis: _Axis) -> Tensor:
    """Resize one axis."""
    outside = [_is_outside(style, axis, _coordinate(style, axis, i)) for i in range(axis.out)]
    if style.mode == "nearest":
        pick = _NEAREST.get(style.nearest) or (math.ceil if axis.scale < 1 else math.floor)
        cells = (pick(_coordinate(style, axis, i)) for i in range(axis.out))
        y = take(x, dim, [min(max(cell, 0), axis.size - 1) for cell in cells])
    else:
        weights = torch.from_numpy(_matrix(style, axis)).to(x)
        y = torch.movedim(torch.matmul(torch.movedim(x, dim, -1), weights.t()), -1, dim)
    if any(outside):
        mask = torch.tensor(outside, device=x.device).reshape(-1, *[1] * (x.ndim - dim - 1))
        y = torch.where(mask, torch.full_like(y, style.outside), y)
    return y


def _round_half_up(x: float) -> int:
    return math.floor(x + 0.5)


def _targets(
    shape: Sequence[int],
    dims: Sequence[int],
    scales: Sequence[float] | None,
    sizes: Sequence[int] | None,
    policy: str,
) -> tuple[list[int], list[float]]:
    """Compute the output size and the scale of each resized axis."""
    if sizes:
        scales = [sizes[i] / shape[dim] for i, dim in enumerate(dims)]
        if policy == "stretch":
            return [int(s) for s in sizes], list(scales)
        scale = min(scales) if policy == "not_larger" else max(scales)
        return [_round_half_up(scale * shape[dim]) for dim in dims], [scale] * len(dims)
    if not scales or len(scales) != len(dims):
        raise ExecutionError(f"{len(scales or [])} scales for {len(dims)} axes")
    out = [math.floor(np.float32(s) * np.float32(shape[dim])) for s, dim in zip(scales, dims, strict=True)]
    return out, list(scales)


def _style(site: Site, mode: str, coordinates: str, nearest: str) -> _Style:
    """Read the attributes, or raise UnsupportedOp."""
    if mode not in ("nearest", "linear", "cubic"):
        raise site.unsupported(f"mode is {mode!r}; nearest, linear and cubic are covered")
    if coordinates not in _COORDINATES or nearest not in (*_NEAREST, _OLD_NEAREST):
        raise site.unsupported(f"it maps coordinates by {coordinates!r}, nearest {nearest!r}")
    return _Style(
        mode=mode,
        coordinates=coordinates,
        nearest=nearest,
        cubic=site.real("cubic_coeff_a", -0.75),
        antialias=site.flag("antialias"),
        exclude_outside=site.flag("exclude_outside"),
        outside=site.real("extrapolation_value"),
    )


def _resize(site: Site) -> Kernel:
    """Build the kernel of Resize: inputs are (X, scales) in opset 10, later (X, roi, scales, sizes)."""
    mode = site.text("mode", "nearest")
    if site.opset < 11:
        style = _style(site, mode, "asymmetric", _OLD_NEAREST)
        return _apply(site, style, scales=1, sizes=9, roi=9)
    coordinates = site.text("coordinate_transformation_mode", "half_pixel")
    style = _style(site, mode, coordinates, site.text("nearest_mode", "round_prefer_floor"))
    return _apply(site, style, scales=2, sizes=3, roi=1)


def _upsample(site: Site) -> Kernel:
    """Build the kernel of Upsample: scales are an attribute in opset 7, an input in 9."""
    style = _style(site, site.text("mode", "nearest"), "asymmetric", _OLD_NEAREST)
    return _apply(site, style, scales=1, sizes=9, roi=9)


def _apply(site: Site, style: _Style, *, scales: int, sizes: int, roi: int) -> Kernel:
    """Build the kernel, given the positions of the inputs; position 9 stands for no input."""
    axes, policy = site.integers("axes"), site.text("keep_aspect_ratio_policy", "stretch")
    read_scales, read_sizes = site.numbers(scales, "scales"), site.numbers(sizes)
    read_roi = site.numbers(roi)

    def kernel(*arguments: Tensor) -> Tensor:
        x = arguments[0]
        dims = axes_of(axes, x.ndim)
        region = read_roi(arguments) or [0.0] * len(dims) + [1.0] * len(dims)
        wanted = _targets(x.shape, dims, read_scales(arguments), read_sizes(arguments), policy)
        y = x if x.is_floating_point() else x.double()
        cropped = style.coordinates == "tf_crop_and_resize"
        if not cropped and wanted[0] == [x.shape[dim] for dim in dims]:
            return x
        for i, dim in enumerate(dims):
            start, end = (region[i], region[len(dims) + i]) if cropped else (0.0, 1.0)
            axis = _Axis(x.shape[dim], wanted[0][i], wanted[1][i], start, end)
            if axis.out != axis.size or axis.scale != 1 or (start, end) != (0.0, 1.0):
                y = _resize_axis(y, dim, style, axis)
        return y.to(x.dtype)

    return kernel


OPS: dict[str, Op] = {
    "Resize": Op(_resize, static=(1, 2, 3)),
    "Upsample": Op(_upsample, static=(1,)),
}
