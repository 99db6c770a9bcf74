"""Changes of element type: constants, casts, uniform affine quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onnxcompress.optimize.executor.ops.dtypes import tensor_from, type_at
from onnxcompress.optimize.executor.ops.registry import Kernel, Op, Site, axis_of

_PLAIN_VALUES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def _constant(site: Site) -> Kernel:
    """Build the kernel of Constant."""
    value = constant_value(site.attributes)
    if value is None:
        raise site.unsupported("torch cannot compute with the type of its value")
    return lambda: value


def constant_value(attributes: Mapping[str, Any]) -> Tensor | None:
    """Read the value of a Constant node in the model's own type.

    Args:
        attributes: Attributes of the node.

    Returns:
        The value; None where torch does not have the type.
    """
    for name in ("value", "sparse_value"):
        if name in attributes:
            return tensor_from(attributes[name])
    for name, dtype in _PLAIN_VALUES.items():
        if name in attributes:
            return tensor_from(np.array(attributes[name], dtype=dtype))
    return None


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert as numpy does: floats are truncated, and integers out of range wrap through int64."""
    if x.is_floating_point() and dtype in (torch.int8, torch.int16, torch.uint8):
        return x.to(torch.int64).to(dtype)
    return x.to(dtype)


def _cast(site: Site) -> Kernel:
    """Build the kernel of Cast."""
    dtype = type_at(site, site.integer("to"))
    return lambda x: _to(x, dtype)


def _cast_like(x: Tensor, other: Tensor) -> Tensor:
    """Cast to the type of another tensor."""
    return _to(x, other.dtype)


def _along(values: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Broadcast a scale or zero point against `x`: one number, one per slice, or one per block."""
    if values.numel() == 1 and values.ndim <= 1:
        return values.reshape(())
    dim = axis_of(axis, x.ndim)
    if values.ndim == 1:
        return values.reshape(*[1] * dim, -1, *[1] * (x.ndim - dim - 1))
    repeats = block or -(-x.shape[dim] // values.shape[dim])
    return values.repeat_interleave(repeats, dim).narrow(dim, 0, x.shape[dim])


def _quantize(site: Site) -> Kernel:
    """Build the kernel of QuantizeLinear: round_half_even(x / scale) + zero_point, saturated.

    The gradient is that of rounding: zero.
    """
    axis, block = site.integer("axis", 1), site.integer("block_size")
    wanted = site.integer("output_dtype")
    fixed = type_at(site, wanted) if wanted else torch.uint8

    def kernel(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        dtype = fixed if zero is None else zero.dtype
        limits = torch.iinfo(dtype)
        y = torch.round(x / _along(scale, x, axis, block).to(x.dtype))
        if zero is not None:
            y = y + _along(zero, x, axis, block).to(y.dtype)
        return torch.clamp(y, limits.min, limits.max).to(torch.int64).to(dtype)

    return kernel


def _dequantize(site: Site) -> Kernel:
    """Build the kernel of DequantizeLinear: (x − zero_point) · scale, in the type of the scale."""
    axis, block = site.integer("axis", 1), site.integer("block_size")
    wanted = site.integer("output_dtype")
    fixed = type_at(site, wanted) if wanted else None

    def kernel(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        shift = 0 if zero is None else _along(zero, x, axis, block).to(torch.int32)
        wide = x if x.dtype == torch.int64 else x.to(torch.int32)
        y = (wide - shift).to(scale.dtype) * _along(scale, x, axis, block)
        return y if fixed is None else y.to(fixed)

    return kernel


class _Rounded(torch.autograd.Function):
    """Round to multiples of a scale. Rounding passes the gradient on (a straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        """Round, and cut off what lies beyond low · scale and high · scale."""
        y = x / scale
        q = y.round().clamp_(low, high)
        ctx.save_for_backward(y, q)
        ctx.ends, ctx.scale = (low - 0.5, high + 0.5), (scale.shape, scale.dtype)
        return q * scale

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Give the input its gradient within the grid, the scale that of LSQ (Esser et al., eq. 3)."""
        (y, q), (slope,), (shape, dtype) = ctx.saved_tensors, slopes, ctx.scale
        inside = torch.ops.aten.hardtanh_backward(slope, y, *ctx.ends)
        own = torch.addcmul(slope * q, inside, y, value=-1)
        axes = [axis for axis in range(own.ndim) if not shape or shape[axis] == 1]
        return inside, own.sum(axes, keepdim=bool(shape), dtype=dtype), None, None


def _fake_quantize(site: Site) -> Kernel:
    """Build the kernel of FakeQuantize: inputs x in units, factor of the scale, unit (1 if absent).

    It gives round(x / factor) · factor · unit between the integers `low` and `high`; with an `axis` there
    is a factor and a unit for each slice along it, else one.
    """
    low, high, axis = site.integer("low"), site.integer("high"), site.attributes.get("axis")

    def shaped(values: Tensor, rank: int) -> Tensor:
        return values.reshape(() if axis is None else [-1 if at == axis else 1 for at in range(rank)])

    def kernel(x: Tensor, factor: Tensor, unit: Tensor | None = None) -> Tensor:
        y: Tensor = _Rounded.apply(x, shaped(factor, x.ndim), low, high)  # type: ignore[no-untyped-call]
        return y if unit is None else y * shaped(unit, x.ndim)

    return kernel


OWN_OPS: dict[str, Op] = {"FakeQuantize": Op(_fake_quantize)}
"""Operators of the domain `onnxcompress`, which no file has."""
OPS: dict[str, Op] = {
    "Cast": Op(_cast),
    "CastLike": Op(lambda site: _cast_like),
    "Constant": Op(_constant),
    "DequantizeLinear": Op(_dequantize),
    "QuantizeLinear": Op(_quantize),
}
