"""Sliding windows: padding, output sizes and sums, shared by convolutions and pools.

For each spatial axis, with input size n, kernel k, stride s, dilation d and window w = d·(k − 1) + 1:

    NOTSET, VALID  out = ⌊(n + begin + end − w) / s⌋ + 1
    ceil_mode      the same rounded up, without a last window that would start in the end padding
    SAME_*         out = ⌈n / s⌉, begin + end = max((out − 1)·s + w − n, 0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.optimize.executor.ops.registry import Site

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
"""Convolutions by the rank of their weight."""


@dataclass(frozen=True)
class Window:
    """The geometry of a window; a list is empty where the node leaves its default."""

    strides: list[int]
    dilations: list[int]
    pads: list[int]
    auto_pad: str
    ceil_mode: bool

    @staticmethod
    def of(site: Site) -> Window:
        """Read the geometry from the attributes of a node.

        Args:
            site: The node.

        Returns:
            The geometry.

        Raises:
            UnsupportedOp: `auto_pad` has an unknown value.
        """
        auto_pad = site.text("auto_pad", "NOTSET") or "NOTSET"
        if auto_pad not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
            raise site.unsupported(f"auto_pad is {auto_pad!r}")
        return Window(
            strides=site.integers("strides") or [],
            dilations=site.integers("dilations") or [],
            pads=(site.integers("pads") or []) if auto_pad == "NOTSET" else [],
            auto_pad=auto_pad,
            ceil_mode=site.flag("ceil_mode"),
        )

    @property
    def same(self) -> bool:
        """Whether padding keeps the size (SAME_UPPER, SAME_LOWER)."""
        return self.auto_pad.startswith("SAME")

    def symmetric(self) -> list[int] | None:
        """Return the padding if it is the same at both ends and does not depend on the size.

        Returns:
            The padding of each spatial axis, or None.
        """
        half = len(self.pads) // 2
        fixed = not self.same and self.pads[:half] == self.pads[half:]
        return self.pads[:half] if fixed else None

    def edges(
        self, size: Sequence[int], kernel: Sequence[int], *, pools: bool = False
    ) -> list[tuple[int, int]]:
        """Compute the padding of each spatial axis.

        Args:
            size: Size of the input along each spatial axis.
            kernel: Size of the kernel along each spatial axis.
            pools: Whether the node is a pool: to keep the size, onnxruntime pads it as if it had no
                dilations, and by less than nothing where its stride leaves cells out.

        Returns:
            (begin, end) of each axis. With ceil_mode, `end` includes the cells that the last window needs
            beyond the padding; it is negative where the last cells are not read.
        """
        rank = len(size)
        strides, dilations = self.strides or [1] * rank, self.dilations or [1] * rank
        edges = []
        for i in range(rank):
            width = dilations[i] * (kernel[i] - 1) + 1
            if self.same:
                out = -(-size[i] // strides[i])
                reach = kernel[i] if pools else width
                total = (out - 1) * strides[i] + reach - size[i]
                total = total if pools else max(total, 0)
                begin = int((total + (self.auto_pad == "SAME_LOWER")) / 2)  # towards zero
                edges.append((begin, total - begin))
                continue
            begin, end = (self.pads[i], self.pads[rank + i]) if self.pads else (0, 0)
            if self.ceil_mode:
                out = -(-(size[i] + begin + end - width) // strides[i]) + 1
                if (out - 1) * strides[i] >= size[i] + begin:
                    out -= 1
                end = (out - 1) * strides[i] + width - size[i] - begin
            edges.append((begin, end))
        return edges


def pad_spatial(x: Tensor, edges: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Pad the last axes.

    Args:
        x: The tensor.
        edges: (begin, end) of each of the last axes; negative numbers crop.
        value: The value of the padding.

    Returns:
        The padded tensor.
    """
    flat = [amount for edge in reversed(edges) for amount in edge]
    return F.pad(x, flat, value=value) if any(flat) else x


def window_sum(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Tensor:
    """Sum over each window of a padded tensor.

    Args:
        x: The tensor, (N, C, spatial…).
        kernel: Size of the window along each spatial axis.
        strides: Stride along each spatial axis; empty: 1.
        dilations: Dilation along each spatial axis; empty: 1.

    Returns:
        The sums, (N, C, windows…).
    """
    ones = torch.ones((1, 1, *kernel), dtype=x.dtype, device=x.device)
    flat = x.reshape(-1, 1, *x.shape[2:])
    convolve = CONVOLUTIONS[x.ndim]
    rank = len(kernel)
    sums = convolve(flat, ones, None, strides or [1] * rank, 0, dilations or [1] * rank)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])
