"""Inputs that a smaller network is tuned on, gathered and divided once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxcompress.data.image_set import ImageSet
from onnxcompress.errors import ModelError
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import InputRequest, Inputs, gather_inputs
from onnxcompress.optimize.device import resident
from onnxcompress.optimize.executor.open_batch import file_batch, images_at_once
from onnxcompress.optimize.reconstruction.held_out import keep_aside
from onnxcompress.progress import Progress


@dataclass(frozen=True)
class TuningInputs:
    """Inputs to learn from, and those that decide what is kept."""

    gathered: Inputs
    images: Tensor
    """The inputs to learn from as normalized values, (N, C, H, W), or (N, H, W, C) with `nhwc`."""
    aside: Tensor
    """Inputs that nothing learned from, in the same form."""
    shares: Tensor | None
    """How often each of `images` is drawn, relative to the others, (N,); None: equally often."""
    seconds: float = 0.0
    """Time that gathering them took."""

    @property
    def nhwc(self) -> bool:
        """Whether channels are the last axis."""
        return _nhwc(self.gathered)


def gather_tuning_inputs(
    model: Model,
    request: InputRequest,
    device: str,
    progress: Progress,
    announce: Callable[[int], None] | None = None,
) -> TuningInputs:
    """Gather inputs, and keep some of them aside.

    Args:
        model: The network that takes them.
        request: What is asked for.
        device: Where torch computes.
        progress: Called with the stage, the steps done and the steps in all.
        announce: Called with the number of inputs, as `gather_inputs` does.

    Returns:
        The inputs, those to learn from on the device where they fit.

    Raises:
        InputError: The images cannot be used.
        ModelError: Inputs cannot go through the graph several at once.
    """
    start = time.perf_counter()
    gathered = gather_inputs(model, request, device=device, progress=progress, announce=announce)
    seconds = time.perf_counter() - start
    values = torch.from_numpy(gathered.images.array())
    fixed = images_at_once(model, values)
    if fixed is not None:
        remedy = "export it with an open batch"
        if file_batch(model) is None:
            remedy = (
                "part of it holds the images of a batch in another order, as recurrent layers read them"
            )
        raise ModelError(
            f"{model.name}: {fixed} images go through its graph at once and no other number, too few to "
            f"learn from; {remedy}"
        )
    if not _nhwc(gathered) and values.ndim == 4:  # depthwise ones are three times as fast on the CPU
        values = values.contiguous(memory_format=torch.channels_last)
    images, aside, shares = keep_aside(model, gathered, values, request.seed)
    return TuningInputs(gathered, resident(images, device), aside, shares, seconds)


def _nhwc(gathered: Inputs) -> bool:
    images = gathered.images
    return isinstance(images, ImageSet) and images.preprocess.layout == "nhwc"
