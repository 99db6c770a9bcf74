"""Operators linear in their weights: convolutions and matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.optimize.executor.ops.registry import ExecutionError, Kernel, Op, Site, plain
from onnxcompress.optimize.executor.ops.windows import CONVOLUTIONS, Window, pad_spatial

_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def _spatial_rank(weight: Tensor) -> int:
    if weight.ndim not in CONVOLUTIONS:
        raise ExecutionError(f"a weight of {weight.ndim} dimensions; 3, 4 or 5 can be convolved")
    return weight.ndim - 2


def _conv(site: Site) -> Kernel:
    """Build the kernel of Conv with weight (M, C/groups, kernel…).

    Asymmetric and SAME padding is done before the convolution.
    """
    window, groups = Window.of(site), site.integer("group", 1)
    strides, dilations = window.strides or 1, window.dilations or 1
    symmetric = window.symmetric()
    if symmetric is not None:
        padding = symmetric or 0

        def fused(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
            convolve = CONVOLUTIONS[_spatial_rank(w) + 2]
            return convolve(x, w, b, strides, padding, dilations, groups)

        return fused

    def padded(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        convolve = CONVOLUTIONS[_spatial_rank(w) + 2]
        x = pad_spatial(x, window.edges(x.shape[2:], w.shape[2:]))
        return convolve(x, w, b, strides, 0, dilations, groups)

    return padded


def _conv_transpose(site: Site) -> Kernel:
    """Build the kernel of ConvTranspose with weight (C, M/groups, kernel…).

    The full result is cropped by the pads and grown by output_padding:

        full = (n − 1)·s + d·(k − 1) + 1,   out = full − begin − end + output_padding
    """
    window, groups = Window.of(site), site.integer("group", 1)
    extra, shape = site.integers("output_padding"), site.integers("output_shape")

    def kernel(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        rank = _spatial_rank(w)
        strides, dilations = window.strides or [1] * rank, window.dilations or [1] * rank
        grow, pads = extra or [0] * rank, window.pads or [0] * (2 * rank)
        full = _TRANSPOSED[w.ndim](x, w, None, strides, 0, 0, groups, dilations)
        edges = []
        for i, size in enumerate(full.shape[2:]):
            begin, end = pads[i], pads[rank + i]
            if shape is not None or window.same:
                most = size + grow[i]
                out = shape[i - rank] if shape is not None else min(x.shape[2 + i] * strides[i], most)
                total = max(0, most - out)
                # The reference and onnxruntime put the odd cell at the end for SAME_UPPER only.
                begin = total // 2 if window.auto_pad == "SAME_UPPER" else total - total // 2
                end = most - out - begin
            edges.append((-begin, grow[i] - end))
        y = pad_spatial(full, edges)
        return y if b is None else y + b.reshape(-1, *[1] * rank)

    return kernel


def _gemm(site: Site) -> Kernel:
    """Build the kernel of Gemm: alpha · A' B' + beta · C, where transA, transB mean A' = Aᵀ, B' = Bᵀ."""
    alpha, beta = site.real("alpha", 1.0), site.real("beta", 1.0)
    transpose_a, transpose_b = site.flag("transA"), site.flag("transB")

    def kernel(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a = a.t() if transpose_a else a
        if alpha == 1.0 and beta == 1.0 and c is not None and c.ndim == 1:
            return F.linear(a, b if transpose_b else b.t(), c.expand(b.shape[0 if transpose_b else 1]))
        y = torch.matmul(a, b.t() if transpose_b else b)
        y = y if alpha == 1.0 else alpha * y
        if c is None:
            return y
        return y + (c if beta == 1.0 else beta * c)

    return kernel


def _einsum(site: Site) -> Kernel:
    """Build the kernel of Einsum."""
    equation = site.text("equation").replace(" ", "")
    return lambda *tensors: torch.einsum(equation, *tensors)


OPS: dict[str, Op] = {
    "Conv": Op(_conv),
    "ConvTranspose": Op(_conv_transpose),
    "Det": plain(torch.linalg.det),
    "Einsum": Op(_einsum),
    "Gemm": Op(_gemm),
    "MatMul": plain(torch.matmul),
}
