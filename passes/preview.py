"""What a pass would refuse, without its work: the checks of applicability that a dry run makes."""

from __future__ import annotations

from dataclasses import replace

from onnxcompress.model import Model
from onnxcompress.optimize.calibration import InputRequest, gather_inputs
from onnxcompress.passes.opsets import converted
from onnxcompress.statistics.record import known_statistics


def raised(model: Model, lowest: int) -> Model:
    """A copy of the model that has at least this operator set.

    Raises:
        ModelError: It has an older one and cannot be converted.
    """
    return model.copy() if model.opset >= lowest else converted(model, lowest)


def check_inputs(model: Model, request: InputRequest) -> None:
    """Raise what gathering the inputs would raise, after one image instead of all.

    Raises:
        OptionError: The request contradicts itself.
        InputError: The images are unusable, or do not fit the network.
        ModelError: None can be made for this network.
    """
    if request.images is not None:
        request = replace(request, count=1, inputs="images")
    elif request.inputs == "auto" or (request.inputs == "distilled" and known_statistics(model)):
        request = replace(request, inputs="procedural", synthetic=1)
    gather_inputs(model, replace(request, synthetic=1))
