"""Pooling over windows and over all spatial axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.optimize.executor.ops.registry import Kernel, Op, Site, plain
from onnxcompress.optimize.executor.ops.windows import Window, pad_spatial, window_sum

_MAX: dict[int, Callable[..., Any]] = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
_AVERAGE = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}


def _kernel_shape(site: Site) -> list[int]:
    """Read the kernel's shape; torch has pools of 1 to 3 spatial dimensions."""
    shape = site.integers("kernel_shape")
    if not shape or len(shape) > 3:
        raise site.unsupported(f"kernel_shape is {shape}; 1 to 3 spatial dimensions are supported")
    return shape


def _native_padding(window: Window, kernel: Sequence[int]) -> list[int] | None:
    """Return the padding if torch's pools can apply it (symmetric, at most half the kernel), else None."""
    pads = window.symmetric()
    if pads is None or any(p < 0 or 2 * p > k for p, k in zip(pads, kernel, strict=False)):
        return None
    return pads or [0] * len(kernel)


def _max_pool(site: Site) -> Kernel:
    """Build the kernel of MaxPool."""
    kernel, window = _kernel_shape(site), Window.of(site)
    rank = len(kernel)
    strides, dilations = window.strides or [1] * rank, window.dilations or [1] * rank
    pool = _MAX[rank + 2]
    if site.outputs > 1:
        return _max_pool_indices(site, kernel, window)
    padding = _native_padding(window, kernel)
    if padding is not None:

        def native(x: Tensor) -> Any:
            if not x.is_floating_point():
                return native(x.double()).to(x.dtype)
            return pool(x, kernel, strides, padding, dilations, ceil_mode=window.ceil_mode)

        return native

    def padded(x: Tensor) -> Any:
        if not x.is_floating_point():
            return padded(x.double()).to(x.dtype)
        x = pad_spatial(x, window.edges(x.shape[2:], kernel, pools=True), float("-inf"))
        return pool(x, kernel, strides, 0, dilations)

    return padded


def _max_pool_indices(site: Site, kernel: Sequence[int], window: Window) -> Kernel:
    """Build the kernel of MaxPool with a second output: flat positions in the (N, C, spatial…) input."""
    rank, column_major = len(kernel), site.flag("storage_order")
    strides, dilations = window.strides or [1] * rank, window.dilations or [1] * rank
    pool = _MAX[rank + 2]

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        size = x.shape[2:]
        edges = window.edges(size, kernel, pools=True)
        values = x if x.is_floating_point() else x.double()
        values = pad_spatial(values, edges, float("-inf"))
        maxima, found = pool(values, kernel, strides, 0, dilations, return_indices=True)
        position = torch.zeros_like(found)
        weight = [1] * rank
        for i in range(1, rank) if column_major else range(rank - 2, -1, -1):
            step = i - 1 if column_major else i + 1
            weight[i] = weight[step] * size[step]
        for i in range(rank - 1, -1, -1):
            extent = values.shape[2 + i]
            position += (found % extent - edges[i][0]) * weight[i]
            found = torch.div(found, extent, rounding_mode="floor")
        planes = torch.arange(x.shape[0] * x.shape[1], device=x.device)
        planes = planes.reshape(*x.shape[:2], *[1] * rank) * size.numel()
        return maxima.to(x.dtype), position + planes

    return compute


def _max_unpool(site: Site) -> Kernel:
    """Build the kernel of MaxUnpool: each value goes back to its flat position; the rest is zero."""
    kernel, window, shape = _kernel_shape(site), Window.of(site), site.numbers(2)
    rank = len(kernel)
    strides, pads = window.strides or [1] * rank, window.pads or [0] * (2 * rank)

    def compute(x: Tensor, indices: Tensor, output_shape: Tensor | None = None) -> Tensor:
        inferred = [
            (n - 1) * strides[i] + kernel[i] - pads[i] - pads[rank + i] for i, n in enumerate(x.shape[2:])
        ]
        if indices.shape != x.shape:
            raise ValueError("an index for each value is needed")
        wanted = shape((x, indices, output_shape)) or [*x.shape[:2], *inferred]
        # The positions count cells of the inferred shape; a larger output keeps them in its corner.
        flat = x.new_zeros(x.shape[0] * x.shape[1] * _volume(inferred))
        y = flat.scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(*x.shape[:2], *inferred)
        return pad_spatial(y, [(0, w - n) for w, n in zip(wanted[2:], inferred, strict=True)])

    return compute


def _volume(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _average_pool(site: Site) -> Kernel:
    """Build the kernel of AveragePool.

    Padding counts in the divisor if count_include_pad; cells that only ceil_mode adds never do.
    """
    kernel, window, include = _kernel_shape(site), Window.of(site), site.flag("count_include_pad")
    rank = len(kernel)
    strides, dilations = window.strides or [1] * rank, window.dilations or [1] * rank
    padding = _native_padding(window, kernel)
    if padding is not None and not window.ceil_mode and set(dilations) == {1}:
        pool = _AVERAGE[rank + 2]
        return lambda x: pool(x, kernel, strides, padding, count_include_pad=include)

    def compute(x: Tensor) -> Tensor:
        edges = window.edges(x.shape[2:], kernel, pools=True)
        counted = x.new_ones((1, 1, *x.shape[2:]))
        declared = edges if window.same else _declared(window, rank)
        if include:
            counted = pad_spatial(counted, declared, 1.0)
            missing = [(a - c, b - d) for (a, b), (c, d) in zip(edges, declared, strict=True)]
            counted = pad_spatial(counted, missing)
        else:
            counted = pad_spatial(counted, edges)
        total = window_sum(pad_spatial(x, edges), kernel, strides, dilations)
        return total / window_sum(counted, kernel, strides, dilations)

    return compute


def _declared(window: Window, rank: int) -> list[tuple[int, int]]:
    """Return the padding (begin, end) of each axis as the node declares it."""
    pads = window.pads or [0] * (2 * rank)
    return [(pads[i], pads[rank + i]) for i in range(rank)]


def _lp_pool(site: Site) -> Kernel:
    """Build the kernel of LpPool."""
    kernel, window, p = _kernel_shape(site), Window.of(site), site.integer("p", 2)

    def compute(x: Tensor) -> Tensor:
        powers = pad_spatial(x.abs() ** p, window.edges(x.shape[2:], kernel, pools=True))
        return window_sum(powers, kernel, window.strides, window.dilations) ** (1 / p)

    return compute


def _space(x: Tensor) -> tuple[int, ...]:
    """Return the spatial axes."""
    return tuple(range(2, x.ndim))


def _global_average(x: Tensor) -> Tensor:
    return x.mean(_space(x), keepdim=True)


def _global_max(x: Tensor) -> Tensor:
    return x.amax(_space(x), keepdim=True)


def _global_lp(site: Site) -> Kernel:
    """Build the kernel of GlobalLpPool."""
    p = site.integer("p", 2)
    return lambda x: (x.abs() ** p).sum(_space(x), keepdim=True) ** (1 / p)


OPS: dict[str, Op] = {
    "AveragePool": Op(_average_pool),
    "GlobalAveragePool": plain(_global_average),
    "GlobalLpPool": Op(_global_lp),
    "GlobalMaxPool": plain(_global_max),
    "LpPool": Op(_lp_pool),
    "MaxPool": Op(_max_pool),
    "MaxUnpool": Op(_max_unpool, static=(2,)),
}
