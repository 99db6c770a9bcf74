"""The mean input of each tap of a layer's kernel: its channel's mean where the tap lies inside the image.

The mean of a convolution's output over all its places is linear in the inputs of its taps:

    E[y_o] = Σ over inputs i and taps t of  W[o, i, t] · m[i, t]  + b_o
    m[i, t] = (sum of x_i over the places in the image that tap t meets) / (number of output places)

so zero padding costs a tap exactly the places at which it hangs over. For a Conv, tap t meets input place
p·stride + t·dilation − pad at output place p; for a ConvTranspose input place p meets output place
p·stride + t·dilation − pad, if that exists. Gemm and MatMul have one tap, and no places.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from onnxcompress.graph.linear_layer import Linear
from onnxcompress.graph.query import attribute, auto_pad

SAME = ("SAME_UPPER", "SAME_LOWER")


@dataclass(frozen=True)
class Window:
    """Where the taps of a layer lie, for one image size."""

    places: tuple[tuple[np.ndarray, ...], ...]
    """For each spatial axis and each tap along it: the input places that it meets."""
    outputs: tuple[int, ...]
    """Output places along each axis."""

    def coverage(self) -> np.ndarray:
        """Compute the share of output places at which each tap meets the image.

        Returns:
            The shares, (taps,).
        """
        shares = np.ones(1)
        for places, count in zip(self.places, self.outputs, strict=True):
            along = np.array([len(at) / count for at in places])
            shares = (shares[:, None] * along).reshape(-1)
        return shares

    def means(self, x: np.ndarray) -> np.ndarray:
        """Compute the mean input of each tap.

        Args:
            x: Samples of the layer's input, (N, inputs, …).

        Returns:
            The means m, (inputs, taps), float64.
        """
        if not self.places:
            return np.asarray(x.mean(0, dtype=np.float64))[:, None]
        found = []
        for at in product(*self.places):
            part = x
            for axis, met in enumerate(at, start=2):
                part = part.take(met, axis)
            found.append(part.sum(axis=(0, *range(2, x.ndim)), dtype=np.float64))
        return np.asarray(np.stack(found, 1) / (len(x) * np.prod(self.outputs)))


def window(layer: Linear, sizes: tuple[int, ...], extra: tuple[int, ...] | None = None) -> Window:
    """Determine where the taps of a layer lie over an image.

    Args:
        layer: The layer.
        sizes: Spatial sizes of the image, without `extra`.
        extra: Pads of a Pad in front of the layer, all at the begins, then all at the ends; None: no Pad.

    Returns:
        The places of the taps.
    """
    node = layer.node
    if node.op not in ("Conv", "ConvTranspose"):
        return Window((), ())
    rank, kernel = len(sizes), layer.weight.shape[2:]
    strides = attribute(node, "strides", [1] * rank)
    dilations = attribute(node, "dilations", [1] * rank)
    extra = extra or (0,) * (2 * rank)
    places, outputs = [], []
    for axis, size in enumerate(sizes):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        padded = size + extra[axis] + extra[rank + axis]
        if node.op == "Conv":
            begin, count = _conv(layer, axis, rank, padded, reach, strides[axis])
            first = np.arange(count) * strides[axis] - begin - extra[axis]
            met = [first + tap * dilations[axis] for tap in range(kernel[axis])]
            places.append(tuple(at[(at >= 0) & (at < size)] for at in met))
        else:
            begin, count = _transposed(layer, axis, rank, size, reach, strides[axis])
            all_places = np.arange(size)
            goes = [
                all_places * strides[axis] - begin + tap * dilations[axis] for tap in range(kernel[axis])
            ]
            places.append(tuple(all_places[(to >= 0) & (to < count)] for to in goes))
        outputs.append(count)
    return Window(tuple(places), tuple(outputs))


def _conv(layer: Linear, axis: int, rank: int, size: int, reach: int, stride: int) -> tuple[int, int]:
    """Return the padding before, and the number of output places."""
    pads = attribute(layer.node, "pads", [0] * 2 * rank)
    auto = auto_pad(layer.node)
    if auto in SAME:
        count = -(-size // stride)
        total = max(0, (count - 1) * stride + reach - size)
        return (total + (auto == "SAME_LOWER")) // 2, count
    begin, end = (0, 0) if auto == "VALID" else (pads[axis], pads[rank + axis])
    return begin, (size + begin + end - reach) // stride + 1


def _transposed(layer: Linear, axis: int, rank: int, size: int, reach: int, stride: int) -> tuple[int, int]:
    """Return what is cut off before, and the number of output places."""
    pads = attribute(layer.node, "pads", [0] * 2 * rank)
    more = attribute(layer.node, "output_padding", [0] * rank)[axis]
    auto = auto_pad(layer.node)
    shape = attribute(layer.node, "output_shape")
    full = stride * (size - 1) + more + reach
    if shape is None and auto not in SAME:
        begin, end = (0, 0) if auto == "VALID" else (pads[axis], pads[rank + axis])
        return begin, full - begin - end
    count = shape[-rank:][axis] if shape is not None else min(size * stride, full)
    total = max(0, full - count)
    return total // 2 if auto == "SAME_UPPER" else total - total // 2, count
