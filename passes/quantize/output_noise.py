"""The signal to noise ratio of a changed model's outputs, as onnxruntime computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from onnxcompress.errors import ModelError
from onnxcompress.graph.query import data_input
from onnxcompress.model import Model
from onnxcompress.optimize.reconstruction.context import fixed_batch
from onnxcompress.runtime.inference import run_each, unread_feeds

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 32
"""Images on which the outputs of both networks are compared."""


def output_snr(original: Model, model: Model, images: Tensor) -> dict[str, float]:
    """Measure the signal to noise ratio of each output in onnxruntime, on the first images.

    Args:
        original: The model before.
        model: The model after; its outputs have the same names.
        images: Inputs of both, (images, ...).

    Returns:
        Output -> signal to noise ratio, in decibels; not of outputs whose length depends on the values.

    Raises:
        ModelError: An output was finite and is no longer, or onnxruntime cannot run a model.
    """
    name, batch, others = data_input(model).name, fixed_batch(original), unread_feeds(original)
    x = images[: max(batch, SHOWN // batch * batch)].numpy()
    feeds = [{name: x[i : i + batch], **others} for i in range(0, len(x), batch)]
    outputs = [run_each(each, feeds) for each in (original, model)]
    found = {}
    for tensor in model.graph.outputs:
        runs = [each[tensor.name] for each in outputs]
        if len({value.shape for each in runs for value in each}) > 1:
            continue
        a, b = (np.stack(each).astype(np.float64) for each in runs)
        if np.isfinite(a).all() and not np.isfinite(b).all():
            raise ModelError(
                f"{original.name}: output {tensor.name!r} would not be finite any more; ask for less"
            )
        found[tensor.name] = float(
            10 * np.log10(max(float(a.var()), 1e-30) / max(float(np.square(a - b).mean()), 1e-30))
        )
    return found
