"""Whether a model gives on its provider what onnxruntime's CPU provider gives.

A provider that fuses nodes in its own way may compute wrongly what others compute rightly. OpenVINO
(through onnxruntime-openvino 1.24.1) gives the boxes of a YOLOv8n in int8 the wrong width and height, by as
much as they vary, while its scores are right: the output of one convolution that is quantized in front of a
Concat is off in some of its channels. The file is right, and so is the float network there.
"""

from __future__ import annotations

import warnings

from onnxcompress.errors import CompressWarning
from onnxcompress.model import Model
from onnxcompress.runtime.providers import Provider

ROWS = 4
"""Random inputs that both compute."""
FLOOR_DB = 10.0
"""Variation to noise below which the outputs are others. Rounding differs between providers, too: the int8
files of ResNet-20, ResNet-56 and EfficientNet-Lite0 have 36, 32 and 35 dB on OpenVINO."""


def check_outputs(model: Model, provider: Provider) -> None:
    """Warn where a provider gives other outputs than the CPU provider.

    Args:
        model: The model, with the sizes of its inputs.
        provider: The provider that it is to run on, another than the CPU's.

    Raises:
        CompressError: One of them cannot run the model, or its inputs cannot be drawn.
    """
    from onnxcompress.evaluation.fidelity import fidelity
    from onnxcompress.graph.query import sigmoid_outputs
    from onnxcompress.runtime.inference import run_each
    from onnxcompress.runtime.random_inputs import random_inputs

    feeds = random_inputs(model, ROWS).feeds
    here, there = run_each(model, feeds), run_each(model, feeds, provider=provider)
    found = fidelity(here, there, sigmoid_outputs(model))
    if not found.outputs or found.worst.judged_db >= FLOOR_DB:
        return
    worst = found.worst
    part = f", {worst.worst_part.text}" if worst.worst_part is not None else ""
    warnings.warn(
        f"{provider.name} does not give what the CPU provider gives for the same file and inputs: output "
        f"{worst.name!r}{part} has a variation to noise of {worst.judged_db:.1f} dB; do not run the file "
        "there before you have compared its results",
        CompressWarning,
        stacklevel=2,
    )
