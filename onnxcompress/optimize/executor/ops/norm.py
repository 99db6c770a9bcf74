"""Normalizations, in inference mode, and the softmax family."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.optimize.executor.ops.registry import Kernel, Op, Site, axis_of


def _batch_norm(site: Site) -> Kernel:
    """Build the kernel of BatchNormalization: (x − mean) / √(var + ε) · scale + bias.

    In inference mode torch's own function has no gradient for the statistics, so the formula is written out
    where one of them requires it. In training mode (from opset 14 on) mean and variance are those of the
    batch.
    """
    training = site.flag("training_mode")
    if (training and not site.training) or (site.opset < 14 and site.outputs > 1):
        raise site.unsupported("it is in training mode; export the model in inference mode")
    if site.opset < 9 and not site.flag("spatial", True):
        raise site.unsupported("spatial=0 (statistics per element) is not covered")
    epsilon = site.real("epsilon", 1e-5)
    if training:
        return _training_batch_norm(epsilon, site.real("momentum", 0.9), site.outputs)

    def kernel(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        if mean.requires_grad or var.requires_grad:
            shape = (-1, *[1] * (x.ndim - 2))
            gain = scale * torch.rsqrt(var + epsilon)
            return x * gain.reshape(shape) + (bias - mean * gain).reshape(shape)
        return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)

    return kernel


def _training_batch_norm(epsilon: float, momentum: float, outputs: int) -> Kernel:
    """Make the kernel of training mode; further outputs are the running mean and variance."""

    def kernel(
        x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        y = F.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
        if outputs == 1:
            return y
        spread, centre = torch.var_mean(x.detach().float(), (0, *range(2, x.ndim)), correction=0)
        return y, mean * momentum + centre * (1 - momentum), var * momentum + spread * (1 - momentum)

    return kernel


def _standardized(x: Tensor, dims: tuple[int, ...], epsilon: float) -> Tensor:
    """Bring x to mean 0 and variance 1 over the given axes."""
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + epsilon)


def _instance_norm(site: Site) -> Kernel:
    """Build the kernel of InstanceNormalization."""
    epsilon = site.real("epsilon", 1e-5)

    def kernel(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        y = _standardized(x, tuple(range(2, x.ndim)), epsilon)
        return y * scale.reshape(shape) + bias.reshape(shape)

    return kernel


def _group_norm(site: Site) -> Kernel:
    """Build the kernel of GroupNormalization: scale and bias are per group before opset 21."""
    epsilon, groups = site.real("epsilon", 1e-5), site.integer("num_groups", 1)
    per_group = site.opset < 21

    def kernel(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if per_group:
            repeats = x.shape[1] // groups
            scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
        return F.group_norm(x, groups, scale, bias, epsilon)

    return kernel


def _stash(x: Tensor) -> Tensor:
    """Widen x to float32, in which statistics are computed at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _layer_norm(site: Site) -> Kernel:
    """Build the kernel of LayerNormalization over the axes from `axis` on.

    The optional outputs Mean and InvStdDev keep these axes with size 1.
    """
    axis, epsilon = site.integer("axis", -1), site.real("epsilon", 1e-5)

    def statistics(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        dims = tuple(range(axis_of(axis, x.ndim), x.ndim))
        wide = _stash(x)
        mean = wide.mean(dims, keepdim=True)
        centred = wide - mean
        inverse = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + epsilon)
        y = (centred * inverse).to(x.dtype) * scale
        return (y if bias is None else y + bias, mean, inverse)[: site.outputs]

    def kernel(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = x.shape[axis_of(axis, x.ndim) :]
        if scale.shape != shape or (bias is not None and bias.shape != shape):
            return statistics(x, scale, bias)[0]
        return F.layer_norm(x, shape, scale, bias, epsilon)

    return statistics if site.outputs > 1 else kernel


def _rms_norm(site: Site) -> Kernel:
    """Build the kernel of RMSNormalization."""
    axis, epsilon = site.integer("axis", -1), site.real("epsilon", 1e-5)

    def kernel(x: Tensor, scale: Tensor) -> Tensor:
        dims = tuple(range(axis_of(axis, x.ndim), x.ndim))
        wide = _stash(x)
        inverse = torch.rsqrt((wide * wide).mean(dims, keepdim=True) + epsilon)
        return (wide * inverse).to(x.dtype) * scale

    return kernel


def _mean_variance_norm(site: Site) -> Kernel:
    """Build the kernel of MeanVarianceNormalization."""
    axes = site.integers("axes") or [0, 2, 3]

    def kernel(x: Tensor) -> Tensor:
        dims = tuple(axes)
        centred = x - x.mean(dims, keepdim=True)
        return centred / ((centred * centred).mean(dims, keepdim=True).sqrt() + 1e-9)

    return kernel


def _lp_norm(site: Site) -> Kernel:
    """Build the kernel of LpNormalization."""
    axis, p = site.integer("axis", -1), site.integer("p", 2)

    def kernel(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
        return torch.where(norm == 0, torch.zeros_like(x), x / norm)

    return kernel


def _local_response_norm(site: Site) -> Kernel:
    """Build the kernel of LRN: x / (bias + alpha/size · Σ x²)^beta over `size` neighbouring channels.

    Of an even `size` the longer half lies after the channel.
    """
    size, alpha = site.integer("size"), site.real("alpha", 1e-4)
    beta, bias = site.real("beta", 0.75), site.real("bias", 1.0)
    before = (size - 1) // 2

    def kernel(x: Tensor) -> Tensor:
        squares = (x * x).reshape(x.shape[0], 1, x.shape[1], -1)
        squares = F.pad(squares, (0, 0, before, size - 1 - before))
        mean = F.avg_pool2d(squares, (size, 1), 1).reshape(x.shape)
        return x / (bias + alpha * mean) ** beta

    return kernel


def _over_axis(function: Callable[[Tensor, int], Tensor]) -> Op:
    """Define an operator over one axis; before opset 13 it acts on all axes from `axis` on as one."""

    def build(site: Site) -> Kernel:
        if site.opset >= 13:
            axis = site.integer("axis", -1)
            return lambda x: function(x, axis)
        first = site.integer("axis", 1)

        def flattened(x: Tensor) -> Tensor:
            start = axis_of(first, x.ndim)
            rows = x.shape[:start].numel()
            return function(x.reshape(rows, -1), 1).reshape(x.shape)

        return flattened

    return Op(build)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    """Set the largest element along the axis to 1 and the others to 0."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


OPS: dict[str, Op] = {
    "BatchNormalization": Op(_batch_norm),
    "GroupNormalization": Op(_group_norm),
    "Hardmax": _over_axis(_hardmax),
    "InstanceNormalization": Op(_instance_norm),
    "LRN": Op(_local_response_norm),
    "LayerNormalization": Op(_layer_norm),
    "LogSoftmax": _over_axis(lambda x, axis: F.log_softmax(x, axis)),
    "LpNormalization": Op(_lp_norm),
    "MeanVarianceNormalization": Op(_mean_variance_norm),
    "RMSNormalization": Op(_rms_norm),
    "Softmax": _over_axis(lambda x, axis: F.softmax(x, axis)),
}
