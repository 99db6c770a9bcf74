"""Moments of what a layer reads in a layer-wise reconstruction, and of what its output lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onnxcompress.optimize.deterministic_threads import in_turn
from onnxcompress.optimize.reconstruction.patches import Patches
from onnxcompress.optimize.reconstruction.ridge import LayerMoments
from onnxcompress.quantization.qdq_plan import QuantizedLayer

if TYPE_CHECKING:
    from onnxcompress.optimize.reconstruction.layerwise import LayerwiseReconstruction

ROWS, ROWS_EACH = 40_000, 100
"""Patches that are used: ROWS, or ROWS_EACH for each column of the matrix where that is more."""


def moments_of(
    walk: LayerwiseReconstruction, layer: QuantizedLayer, cut: Patches, weight: Tensor
) -> LayerMoments:
    """Sum up the moments of input patches, and their cross moments with the residual of a layer.

    Args:
        walk: The reconstruction, in front of the layer.
        layer: The layer.
        cut: How its input is cut into patches.
        weight: Its weight, (G, O, F).

    Returns:
        The moments.

    Raises:
        InputError: They overflow.
    """
    return fold_moments_of(walk, layer, cut, weight, 1)[0]


def fold_moments_of(
    walk: LayerwiseReconstruction, layer: QuantizedLayer, cut: Patches, weight: Tensor, folds: int
) -> list[LayerMoments]:
    """Sum up the same moments, those of one image in so many apart from those of the others.

    Args:
        walk: The reconstruction, in front of the layer.
        layer: The layer.
        cut: How its input is cut into patches.
        weight: Its weight, (G, O, F).
        folds: Number of parts; image i belongs to part i modulo it.

    Returns:
        The moments of each part; those of a part without an image are empty.

    Raises:
        InputError: They overflow.
    """
    bias = walk.own_executor.parameters.get(layer.linear.bias_name or "")
    shape = walk.batches[0].teacher[layer.linear.output_name]
    places = [cut.places(shape, walk.generator, walk.settings.places) for _ in walk.batches]
    enough = -(-max(ROWS, ROWS_EACH * weight.shape[2]) // (walk.batch * len(places[0])))
    weight = weight.to(walk.device, torch.promote_types(weight.dtype, torch.float32))
    alone = walk.networks == 1  # the student is the teacher, and lacks nothing

    def parts_of(index: int) -> list[LayerMoments]:
        batch = walk.batches[index]
        with torch.no_grad():  # a setting of each thread
            y = batch.teacher[layer.linear.output_name] if alone else walk.target_of(layer, batch)
            a, y = cut.take(walk.input_of(layer, batch), y, places[index])
            a, y = a.to(weight.dtype), y.to(weight.dtype)  # sums overflow in half precision
            if bias is not None:
                y = y - bias.reshape(weight.shape[0], -1, 1)
            a, y = (x.reshape(*x.shape[:2], -1, len(places[index])) for x in (a, y))  # images, patches
            first = [(fold - index * walk.batch) % folds for fold in range(folds)]
            parts = [[x[:, :, at::folds].flatten(2) for x in (a, y)] for at in first]
            return [_moments(weight, a, None if alone else y) for a, y in parts]

    whole = [LayerMoments.empty(weight) for _ in range(folds)]
    for parts in in_turn(parts_of, min(len(walk.batches), enough), walk.device):  # none is kept: F x F each
        for mine, part in zip(whole, parts, strict=True):
            if part.rows:
                mine.merge(part)
    for mine in whole:
        mine.check_finite(layer.linear.label)
    return whole


def _moments(weight: Tensor, a: Tensor, y: Tensor | None) -> LayerMoments:
    """Sum up patches a, (G, F, R), and targets y, (G, O, R), None: W a; there may be no patches."""
    own = LayerMoments.empty(weight)
    if a.shape[2]:
        own.add(a, None if y is None else torch.baddbmm(y, weight, a, alpha=-1))
    return own
