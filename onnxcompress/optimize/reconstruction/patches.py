"""Patches of a layer's input as columns for its matrix, and that matrix.

A convolution is y = W a at each place, a the patch under the kernel: (inputs x taps,) for each group. At
random places of each image, patches a (G, F, R) and outputs (G, O, R) give a layer's second moments without
the whole unfolding, which is `taps` times as large as the input.

Does not handle: convolutions that are not 2-d or pad automatically, ConvTranspose, MatMul.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.graph.conv_layers import conv_geometry
from onnxcompress.graph.query import is_op
from onnxcompress.model import Model
from onnxcompress.quantization.qdq_plan import QuantizedLayer

PLACES = 256
"""Places at which an image gives a patch, at most."""


@dataclass(frozen=True)
class Patches:
    """How a layer's input is cut into columns for its matrix."""

    groups: int
    kernel: tuple[int, int] | None
    """None: a Gemm, no places."""
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    def places(self, y: Tensor, generator: torch.Generator, most: int = PLACES) -> Tensor:
        """Draw random places of a layer's output.

        Args:
            y: The output, (N, outputs, H, W).
            generator: Random generator.
            most: Places that are drawn, at most.

        Returns:
            The places, row by row; a single 0 for a Gemm, which has none.
        """
        if self.kernel is None:
            return torch.zeros(1, dtype=torch.long)
        return torch.randperm(y.shape[2] * y.shape[3], generator=generator)[:most]

    def take(self, x: Tensor, y: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cut the patches and the outputs at given places.

        Args:
            x: The layer's input, (N, inputs, …).
            y: Values of the shape of its output, (N, outputs, …).
            places: The places, as from `places`.

        Returns:
            The patches, (G, F, R), and the outputs, (G, O, R), R over images and places.
        """
        if self.kernel is None:
            return x.T[None], y.T[None]
        top, left, bottom, right = self.pads
        padded = F.pad(x, (left, right, top, bottom)) if any(self.pads) else x
        width = y.shape[3]
        rows, columns = places // width * self.strides[0], places % width * self.strides[1]
        taps = torch.arange(self.kernel[0] * self.kernel[1])
        rows = rows[:, None] + taps // self.kernel[1] * self.dilations[0]
        columns = columns[:, None] + taps % self.kernel[1] * self.dilations[1]
        index = rows * padded.shape[3] + columns
        b = _at(y, places).reshape(len(x) * len(places), self.groups, -1).permute(1, 2, 0)
        if self.groups > 1:  # images last meanwhile: runs of memory are copied, no single numbers
            maps = padded.permute(1, 2, 3, 0).flatten(1, 2)
            found = maps.index_select(1, index.T.flatten().to(maps.device))
            return found.reshape(self.groups, -1, len(places), len(x)).transpose(2, 3).flatten(2), b
        found = _at(padded, index.flatten())
        a = found.reshape(len(x) * len(places), len(taps), x.shape[1]).permute(2, 1, 0)
        return a.flatten(0, 1)[None], b


def _at(maps: Tensor, index: Tensor) -> Tensor:
    """(N, places, C): neighbours in memory where channels are last there, too."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2).index_select(1, index.to(maps.device))


def patches_of(model: Model, layer: QuantizedLayer) -> Patches | None:
    """Describe how a layer's input is cut into patches.

    Args:
        model: The network.
        layer: The layer.

    Returns:
        The description; None where the layer is of another kind (see above).
    """
    if is_op(layer.linear.node, "Gemm"):
        return Patches(1, None)
    conv = conv_geometry(layer.linear.node)
    if conv is None:
        return None
    return Patches(layer.linear.groups, conv.kernel, conv.strides, conv.dilations, conv.pads)


def matrix(layer: QuantizedLayer, weight: Tensor) -> tuple[Tensor, torch.Size]:
    """View a layer's weight as a matrix for each group.

    Args:
        layer: The layer.
        weight: The weight as stored.

    Returns:
        The matrix, (groups, outputs, inputs x taps), and its shape with four axes, for `stored`.
    """
    view = torch.from_numpy(layer.linear.view(weight.cpu().numpy()).copy())
    return view.flatten(2), view.shape


def stored(layer: QuantizedLayer, rows: Tensor, shape: torch.Size) -> Tensor:
    """Convert a matrix back to the initializer's own layout: the reverse of `matrix`.

    Args:
        layer: The layer.
        rows: The matrix, (groups, outputs, inputs x taps).
        shape: Its shape with four axes.

    Returns:
        The weight as stored.
    """
    new = torch.empty(layer.linear.weight.shape, dtype=rows.dtype)
    layer.linear.view(new.numpy())[...] = rows.reshape(shape).numpy()
    return new
