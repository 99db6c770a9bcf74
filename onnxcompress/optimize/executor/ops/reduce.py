"""Reductions, scans along an axis, and orderings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onnxcompress.optimize.executor.ops.registry import Kernel, Op, Site, axes_of, axis_of

Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduction(function: Reduction) -> Op:
    """Define a reduction: axes are an attribute before opset 18 (ReduceSum: 13), then an optional input."""

    def build(site: Site) -> Kernel:
        keep = site.flag("keepdims", True)
        nothing = site.flag("noop_with_empty_axes")
        axes = site.numbers(1, "axes")

        def kernel(*arguments: Tensor) -> Tensor:
            x, wanted = arguments[0], axes(arguments)
            if not wanted:
                wanted = () if nothing else range(x.ndim)
            if not len(wanted):  # over no axis, the function acts on each element
                return function(x.unsqueeze(0), (0,), False)
            return function(x, axes_of(wanted, x.ndim), keep)

        return kernel

    return Op(build, static=(1,))


def _sum(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(x, dims, keep, dtype=x.dtype)


def _mean(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, dims, keep)
    count = torch.Size(x.shape[d] for d in dims).numel()
    return torch.div(_sum(x, dims, keep), count, rounding_mode="trunc")


def _product(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    for dim in sorted(dims, reverse=True):
        x = torch.prod(x, dim, keep, dtype=x.dtype)
    return x


def _extreme(largest: bool) -> Reduction:
    """Build the reduction to the largest or least element; of no elements, the type's least or largest."""

    def function(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
        if x.dtype == torch.bool:
            return function(x.to(torch.uint8), dims, keep).to(torch.bool)
        if all(x.shape[d] for d in dims):
            return torch.amax(x, dims, keep) if largest else torch.amin(x, dims, keep)
        if x.is_floating_point():
            empty = float("-inf") if largest else float("inf")
        else:
            limits = torch.iinfo(x.dtype)
            empty = limits.min if largest else limits.max
        shape = _sum(x, dims, keep).shape
        return torch.full(shape, empty, dtype=x.dtype, device=x.device)

    return function


def _l1(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x.abs(), dims, keep)


def _sum_square(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x * x, dims, keep)


def _l2(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return _sum_square(x, dims, keep).sqrt()


def _log_sum(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x, dims, keep).log()


def _log_sum_exp(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x, dims, keep)


def _argument(largest: bool) -> Op:
    """Define ArgMax or ArgMin."""

    def build(site: Site) -> Kernel:
        axis, keep = site.integer("axis"), site.flag("keepdims", True)
        last = site.flag("select_last_index")
        function = torch.argmax if largest else torch.argmin

        def kernel(x: Tensor) -> Tensor:
            if not last:
                return function(x, axis, keepdim=keep)
            dim = axis_of(axis, x.ndim)
            return x.shape[dim] - 1 - function(x.flip(dim), dim, keepdim=keep)

        return kernel

    return Op(build)


def _top_k(site: Site) -> Kernel:
    """Build the kernel of TopK; equal elements keep the order of their indices."""
    axis, largest = site.integer("axis", -1), site.flag("largest", True)
    fixed = site.attributes.get("k")
    read = site.number(1)

    def kernel(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        x = arguments[0]
        k = int(fixed if fixed is not None else read(arguments))
        values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
        dim = axis_of(axis, x.ndim)
        return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)

    return kernel


def _scan(function: Callable[[Tensor, int], Tensor], start: int) -> Op:
    """Define a running sum or product along the axis given as an input; it begins at `start`."""

    def build(site: Site) -> Kernel:
        exclusive, reverse = site.flag("exclusive"), site.flag("reverse")
        read = site.number(1)

        def kernel(*arguments: Tensor) -> Tensor:
            x = arguments[0]
            dim = axis_of(int(read(arguments)), x.ndim)
            y = x.flip(dim) if reverse else x
            y = function(y, dim).to(x.dtype)
            if exclusive:
                first = torch.full_like(y.narrow(dim, 0, 1), start)
                y = torch.cat([first, y.narrow(dim, 0, y.shape[dim] - 1)], dim)
            return y.flip(dim) if reverse else y

        return kernel

    return Op(build, static=(1,))


OPS: dict[str, Op] = {
    "ArgMax": _argument(True),
    "ArgMin": _argument(False),
    "CumProd": _scan(lambda x, dim: torch.cumprod(x, dim), 1),
    "CumSum": _scan(lambda x, dim: torch.cumsum(x, dim), 0),
    "ReduceL1": _reduction(_l1),
    "ReduceL2": _reduction(_l2),
    "ReduceLogSum": _reduction(_log_sum),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
    "ReduceMax": _reduction(_extreme(True)),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(_extreme(False)),
    "ReduceProd": _reduction(_product),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(_sum_square),
    "TopK": Op(_top_k, static=(1,)),
}
