"""Checks of a dry run: what a pass would refuse, without doing its work."""

from __future__ import annotations

from dataclasses import replace

from onnxcompress.data.image_set import image_count
from onnxcompress.errors import InputError
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import InputRequest, gather_inputs
from onnxcompress.passes.opsets import converted, without_functions
from onnxcompress.statistics.record import known_statistics


def raised(model: Model, lowest: int) -> Model:
    """Copy the model into an operator set that is new enough.

    Args:
        model: The model; it stays as it is.
        lowest: The lowest version of the default operator set.

    Returns:
        The copy, without functions.

    Raises:
        ModelError: The model has an older one, or functions, and cannot be converted.
    """
    own = without_functions(model)
    own = model.copy() if own is model else own
    return own if own.opset >= lowest else converted(own, lowest)


SAMPLE = 10
"""Images that are read instead of all: more than one, as that one may be unreadable."""


def check_inputs(model: Model, request: InputRequest) -> None:
    """Check that inputs can be gathered, with a few images instead of all.

    Args:
        model: The network.
        request: The inputs that are asked for.

    Raises:
        OptionError: The request contradicts itself.
        InputError: The images are unusable, or do not fit the network.
        ModelError: None can be synthesized for this network.
    """
    if request.images is not None:
        total = image_count(request.images)
        if request.count is not None and request.count > total:
            raise InputError(f"{request.images}: {request.count} images were asked for, it has {total}")
        count = min(SAMPLE, request.count or total)
        request = replace(request, count=count, inputs="images")
    elif request.inputs == "auto" or (request.inputs == "distilled" and known_statistics(model)):
        request = replace(request, inputs="procedural", synthetic=1)
    gather_inputs(model, replace(request, synthetic=1))
