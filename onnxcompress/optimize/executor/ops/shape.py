"""Operators that move elements without changing them: shapes, slices, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.optimize.executor.ops.registry import (
    ExecutionError,
    Kernel,
    Op,
    Site,
    axes_of,
    plain,
    take,
)


def _shape(site: Site) -> Kernel:
    """Build the kernel of Shape."""
    start, end = site.integer("start"), site.attributes.get("end")
    return lambda x: torch.tensor(tuple(x.shape[start:end]), dtype=torch.int64)


def _size(x: Tensor) -> Tensor:
    """Count the elements."""
    return torch.tensor(x.numel(), dtype=torch.int64)


def _reshape(site: Site) -> Kernel:
    """Build the kernel of Reshape: 0 copies the input's dimension (unless allowzero), −1 is inferred."""
    copy_zero, read = not site.flag("allowzero"), site.numbers(1, "shape")

    def kernel(*arguments: Tensor) -> Tensor:
        x, shape = arguments[0], read(arguments)
        if copy_zero and 0 in shape:
            shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
        return x.reshape(shape)

    return kernel


def _flatten(site: Site) -> Kernel:
    """Build the kernel of Flatten."""
    axis = site.integer("axis", 1)

    def kernel(x: Tensor) -> Tensor:
        # numel() rather than -1: a dimension of size 0 leaves -1 undetermined.
        at = axis + x.ndim if axis < 0 else axis
        return x.reshape(x.shape[:at].numel(), x.shape[at:].numel())

    return kernel


def _transpose(site: Site) -> Kernel:
    """Build the kernel of Transpose."""
    order = site.integers("perm")
    if order is None:
        return lambda x: x.permute(*range(x.ndim - 1, -1, -1))
    return lambda x: x.permute(order)


def _squeeze(site: Site) -> Kernel:
    """Build the kernel of Squeeze."""
    read = site.numbers(1, "axes")

    def kernel(*arguments: Tensor) -> Tensor:
        x, axes = arguments[0], read(arguments)
        if axes is None:
            return x.squeeze()
        dims = axes_of(axes, x.ndim)
        if any(x.shape[d] != 1 for d in dims):
            raise ExecutionError(f"axes {list(axes)} of shape {tuple(x.shape)} are not all of size 1")
        return x.squeeze(dims)

    return kernel


def _unsqueeze(site: Site) -> Kernel:
    """Build the kernel of Unsqueeze."""
    read = site.numbers(1, "axes")

    def kernel(*arguments: Tensor) -> Tensor:
        x, axes = arguments[0], read(arguments)
        for axis in sorted(axes_of(axes, x.ndim + len(axes))):
            x = x.unsqueeze(axis)
        return x

    return kernel


def _concat(site: Site) -> Kernel:
    """Build the kernel of Concat."""
    axis = site.integer("axis", 1)
    return lambda *tensors: torch.cat(tensors, axis)


def _split(site: Site) -> Kernel:
    """Build the kernel of Split: sizes from the attribute, the input, or equal with a smaller last part."""
    axis, read = site.integer("axis"), site.numbers(1, "split")
    parts = site.integer("num_outputs", site.outputs)

    def kernel(*arguments: Tensor) -> tuple[Tensor, ...] | Tensor:
        x, sizes = arguments[0], read(arguments)
        if sizes is None:
            total = x.shape[axis]
            each = -(-total // parts)
            sizes = [max(min(each, total - i * each), 0) for i in range(parts)]
        pieces: tuple[Tensor, ...] = torch.split(x, sizes, axis)
        return pieces if site.outputs > 1 else pieces[0]

    return kernel


def _slice(site: Site) -> Kernel:
    """Build the kernel of Slice: bounds are attributes before opset 10, later inputs; they are clamped."""
    starts, ends = site.numbers(1, "starts"), site.numbers(2, "ends")
    axes, steps = site.numbers(3, "axes"), site.numbers(4)

    def kernel(*arguments: Tensor) -> Tensor:
        x, begin, end = arguments[0], starts(arguments), ends(arguments)
        dims = axes_of(axes(arguments) or range(len(begin)), x.ndim)
        index = [slice(None)] * x.ndim
        for dim, first, last, step in zip(
            dims, begin, end, steps(arguments) or [1] * len(begin), strict=True
        ):
            if step > 0:
                index[dim] = slice(first, last, step)
            else:
                x = take(x, dim, range(*slice(first, last, step).indices(x.shape[dim])))
        return x[tuple(index)]

    return kernel


def _expand(site: Site) -> Kernel:
    """Build the kernel of Expand."""
    read = site.numbers(1)

    def kernel(*arguments: Tensor) -> Tensor:
        x = arguments[0]
        shape = [int(size) for size in read(arguments)]
        shape[:0] = x.shape[: max(x.ndim - len(shape), 0)]
        for i in range(1, x.ndim + 1):
            shape[-i] = x.shape[-i] if shape[-i] == 1 else shape[-i]
        return x.broadcast_to(shape)

    return kernel


def _tile(site: Site) -> Kernel:
    """Build the kernel of Tile."""
    read = site.numbers(1)
    return lambda *arguments: torch.tile(arguments[0], tuple(read(arguments)))


def _depth_to_space(site: Site) -> Kernel:
    """Build the kernel of DepthToSpace."""
    block, column_first = site.integer("blocksize"), site.text("mode", "DCR") == "CRD"

    def kernel(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        depth = c // (block * block)
        if column_first:
            y = x.reshape(n, depth, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
        else:
            y = x.reshape(n, block, block, depth, h, w).permute(0, 3, 4, 1, 5, 2)
        return y.reshape(n, depth, h * block, w * block)

    return kernel


def _space_to_depth(site: Site) -> Kernel:
    """Build the kernel of SpaceToDepth."""
    block, column_first = site.integer("blocksize"), site.text("mode", "DCR") == "CRD"

    def kernel(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n, c, h // block, block, w // block, block)
        y = y.permute(0, 1, 3, 5, 2, 4) if column_first else y.permute(0, 3, 5, 1, 2, 4)
        return y.reshape(n, c * block * block, h // block, w // block)

    return kernel


def _pad(site: Site) -> Kernel:
    """Build the kernel of Pad: pads are an attribute before opset 11, later inputs; negative pads crop."""
    mode = site.text("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise site.unsupported(f"mode is {mode!r}")
    pads, axes = site.numbers(1, "pads"), site.numbers(3)
    fill = site.number(2, site.real("value"))

    def kernel(*arguments: Tensor) -> Tensor:
        x = arguments[0]
        begin, end = _pad_amounts(x.ndim, pads(arguments), axes(arguments))
        if mode == "constant":
            flat = [amount for pair in zip(end, begin, strict=True) for amount in pair]
            return F.pad(x, flat[::-1], value=fill(arguments)) if any(flat) else x
        for dim in range(x.ndim):
            if begin[dim] or end[dim]:
                x = take(x, dim, _source(mode, x.shape[dim], begin[dim], end[dim]))
        return x

    return kernel


def _pad_amounts(rank: int, pads: Sequence[int], axes: Sequence[int] | None) -> tuple[list[int], list[int]]:
    """Spread the pads over all axes, as lists of begin and end."""
    dims = axes_of(axes, rank)
    if len(pads) != 2 * len(dims):
        raise ExecutionError(f"{len(pads)} pads for {len(dims)} axes; expected {2 * len(dims)}")
    begin, end = [0] * rank, [0] * rank
    for i, dim in enumerate(dims):
        begin[dim], end[dim] = int(pads[i]), int(pads[len(dims) + i])
    return begin, end


def _source(mode: str, size: int, begin: int, end: int) -> list[int]:
    """For each padded position along an axis, compute the position that it copies."""
    positions = range(-begin, size + end)
    if mode == "edge":
        return [min(max(p, 0), size - 1) for p in positions]
    if mode == "wrap":
        return [p % size for p in positions]
    period = max(2 * (size - 1), 1)
    return [min(p % period, period - p % period) for p in positions]


def _center_crop_pad(site: Site) -> Kernel:
    """Build the kernel of CenterCropPad."""
    axes, read = site.integers("axes"), site.numbers(1)

    def kernel(*arguments: Tensor) -> Tensor:
        x: Tensor = arguments[0]
        for dim, wanted in zip(axes_of(axes, x.ndim), read(arguments), strict=True):
            size = x.shape[dim]
            if wanted < size:
                x = x.narrow(dim, (size - wanted) // 2, wanted)
            elif wanted > size:
                before = (wanted - size) // 2
                edges = [0, 0] * (x.ndim - 1 - dim) + [before, wanted - size - before]
                x = F.pad(x, edges)
        return x

    return kernel


def _trilu(site: Site) -> Kernel:
    """Build the kernel of Trilu."""
    upper, read = site.flag("upper", True), site.number(1, 0)

    def kernel(*arguments: Any) -> Tensor:
        x, diagonal = arguments[0], int(read(arguments))
        return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)

    return kernel


def _identity(x: Tensor) -> Tensor:
    """Return the input."""
    return x


def _dropout(site: Site) -> Kernel:
    """Build the kernel of Dropout, which drops nothing in inference mode; the optional mask is all true."""
    training, ratio = site.number(2, False), site.number(1, 0.5)

    def kernel(*arguments: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if training(arguments) and ratio(arguments):
            raise site.unsupported("it is in training mode; export the model in inference mode")
        x = arguments[0]
        return x if site.outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))

    return kernel


OPS: dict[str, Op] = {
    "CenterCropPad": Op(_center_crop_pad, static=(1,)),
    "Concat": Op(_concat),
    "DepthToSpace": Op(_depth_to_space),
    "Dropout": Op(_dropout, static=(1, 2)),
    "Expand": Op(_expand, static=(1,)),
    "Flatten": Op(_flatten),
    "Identity": plain(_identity),
    "Pad": Op(_pad, static=(1, 2, 3)),
    "Reshape": Op(_reshape, static=(1,)),
    "Shape": Op(_shape, host=True),
    "Size": Op(lambda site: _size, host=True),
    "Slice": Op(_slice, static=(1, 2, 3, 4)),
    "SpaceToDepth": Op(_space_to_depth),
    "Split": Op(_split, static=(1,)),
    "Squeeze": Op(_squeeze, static=(1,)),
    "Tile": Op(_tile, static=(1,)),
    "Transpose": Op(_transpose),
    "Trilu": Op(_trilu, static=(1,)),
    "Unsqueeze": Op(_unsqueeze, static=(1,)),
}
