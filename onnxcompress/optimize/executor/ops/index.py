"""Operators that address elements by tensors of indices, or make tensors from numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxcompress.optimize.executor.ops.dtypes import tensor_from, type_at
from onnxcompress.optimize.executor.ops.registry import Kernel, Op, Site, axis_of, plain

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """Count negative indices from the end, as int64."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def _gather(site: Site) -> Kernel:
    """Build the kernel of Gather; a constant scalar index selects a slice."""
    axis, index = site.integer("axis"), site.scalar(1)
    if index is not None and site.constants[1].ndim == 0:  # type: ignore[union-attr]
        return lambda x, _: x.select(axis, index)

    def kernel(x: Tensor, indices: Tensor) -> Tensor:
        dim = axis_of(axis, x.ndim)
        rows = x.index_select(dim, _wrapped(indices, x.shape[dim]).reshape(-1))
        return rows.reshape(*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :])

    return kernel


def _gather_elements(site: Site) -> Kernel:
    """Build the kernel of GatherElements."""
    axis = site.integer("axis")
    return lambda x, indices: torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


def _reduction(site: Site) -> str | None:
    """Read the reduction of a scatter; None: values are replaced."""
    name = site.text("reduction", "none")
    if name != "none" and name not in _REDUCTIONS:
        raise site.unsupported(f"reduction is {name!r}")
    return _REDUCTIONS.get(name)


def _scatter_elements(site: Site) -> Kernel:
    """Build the kernel of Scatter and ScatterElements."""
    axis, reduction = site.integer("axis"), _reduction(site)

    def kernel(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        indices, updates = _wrapped(indices, x.shape[axis]), updates.to(x.dtype)
        if reduction is None:
            return x.scatter(axis, indices, updates)
        return x.scatter_reduce(axis, indices, updates, reduction)

    return kernel


def _rows(shape: torch.Size, indices: Tensor) -> Tensor:
    """Convert index tuples (…, k) into the first k axes of `shape` to flat row numbers."""
    rows = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=indices.device)
    for i in range(indices.shape[-1]):
        rows = rows * shape[i] + _wrapped(indices[..., i], shape[i])
    return rows


def _gather_nd(site: Site) -> Kernel:
    """Build the kernel of GatherND."""
    batch = site.integer("batch_dims")

    def kernel(x: Tensor, indices: Tensor) -> Tensor:
        depth, groups = indices.shape[-1], x.shape[:batch].numel()
        inner = x.shape[batch:]
        rows = _rows(inner, indices.reshape(groups, -1, depth))
        offsets = torch.arange(groups, device=x.device) * inner[:depth].numel()
        tail = inner[depth:]
        flat = x.reshape(-1, tail.numel())
        picked = flat.index_select(0, (rows + offsets[:, None]).reshape(-1))
        return picked.reshape(*indices.shape[:-1], *tail)

    return kernel


def _scatter_nd(site: Site) -> Kernel:
    """Build the kernel of ScatterND."""
    reduction = _reduction(site)

    def kernel(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        depth = indices.shape[-1]
        tail = x.shape[depth:].numel()
        rows = _rows(x.shape, indices).reshape(-1, 1).expand(-1, tail)
        flat = x.reshape(-1, tail)
        new = updates.to(x.dtype).reshape(-1, tail)
        if reduction is None:
            return flat.scatter(0, rows, new).reshape(x.shape)
        return flat.scatter_reduce(0, rows, new, reduction).reshape(x.shape)

    return kernel


def _one_hot(site: Site) -> Kernel:
    """Build the kernel of OneHot."""
    axis, depth_of = site.integer("axis", -1), site.number(1)

    def kernel(*arguments: Tensor) -> Tensor:
        indices, values = arguments[0], arguments[2]
        depth = int(depth_of(arguments))
        dim = axis_of(axis, indices.ndim + 1)
        shape = [1] * (indices.ndim + 1)
        shape[dim] = depth
        classes = torch.arange(depth, device=indices.device).reshape(shape)
        hot = _wrapped(indices, depth).unsqueeze(dim) == classes
        return torch.where(hot, values[1], values[0])

    return kernel


def _compress(site: Site) -> Kernel:
    """Build the kernel of Compress."""
    axis = site.attributes.get("axis")

    def kernel(x: Tensor, condition: Tensor) -> Tensor:
        dim = 0 if axis is None else int(axis)
        x = x.reshape(-1) if axis is None else x
        return x.index_select(dim, torch.nonzero(condition.reshape(-1)).reshape(-1))

    return kernel


def _non_zero(x: Tensor) -> Tensor:
    """List the indices of elements that are not zero, (rank, count)."""
    return torch.nonzero(x).t()


def _range(site: Site) -> Kernel:
    """Build the kernel of Range."""

    def kernel(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        first, last, step = start.item(), limit.item(), delta.item()
        count = max(int(-((first - last) // step)), 0)
        steps = torch.arange(count, device=start.device)
        return (first + steps * step).to(start.dtype)

    return kernel


def _constant_of_shape(site: Site) -> Kernel:
    """Build the kernel of ConstantOfShape."""
    read = site.numbers(0)
    given = site.attributes.get("value")
    value = torch.zeros(1) if given is None else tensor_from(given)
    if value is None:
        raise site.unsupported("torch cannot compute with the type of its value")
    dtype = site.dtype if value.is_floating_point() and site.dtype is not None else value.dtype
    fill, device = value.reshape(-1)[0].item(), site.device
    return lambda *arguments: torch.full(
        [int(n) for n in read(arguments)], fill, dtype=dtype, device=device
    )


def _eye_like(site: Site) -> Kernel:
    """Build the kernel of EyeLike."""
    offset, wanted = site.integer("k"), site.attributes.get("dtype")
    dtype = None if wanted is None else type_at(site, wanted)

    def kernel(x: Tensor) -> Tensor:
        return torch.diagonal_scatter(
            torch.zeros_like(x, dtype=dtype),
            torch.ones_like(torch.diagonal(x, offset), dtype=dtype),
            offset,
        )

    return kernel


def _split_to_sequence(site: Site) -> Kernel:
    """Build the kernel of SplitToSequence: a list that only SequenceAt reads, as torch's dynamo splits."""
    axis, keep, read = site.integer("axis"), site.flag("keepdims", True), site.numbers(1)
    split = site.constant(1)

    def kernel(*arguments: Tensor) -> list[Tensor]:
        x, sizes = arguments[0], read(arguments)
        if sizes is None:
            return list(torch.split(x, 1, axis)) if keep else list(torch.unbind(x, axis))
        each = arguments[1] if split is None else split
        return list(torch.split(x, sizes if each.ndim else sizes[0], axis))

    return kernel


def _sequence_at(site: Site) -> Kernel:
    """Build the kernel of SequenceAt."""
    read = site.number(1)
    return lambda *arguments: arguments[0][int(read(arguments))]


OPS: dict[str, Op] = {
    "Compress": Op(_compress),
    "ConstantOfShape": Op(_constant_of_shape, static=(0,)),
    "EyeLike": Op(_eye_like),
    "Gather": Op(_gather),
    "GatherElements": Op(_gather_elements),
    "GatherND": Op(_gather_nd),
    "NonZero": plain(_non_zero),
    "OneHot": Op(_one_hot, static=(1,)),
    "Range": Op(_range),
    "Scatter": Op(_scatter_elements),
    "ScatterElements": Op(_scatter_elements),
    "ScatterND": Op(_scatter_nd),
    "SequenceAt": Op(_sequence_at, static=(1,)),
    "SplitToSequence": Op(_split_to_sequence, static=(1,)),
}
