"""Models in the forms that the calls take."""

from __future__ import annotations

import os
from typing import Any

from onnxcompress.model import Model
from onnxcompress.model.ir_model import is_ir_model, proto_of
from onnxcompress.model.model_like import ModelLike, as_model


def model_of(model: Any) -> Model:
    """Convert a model of any form.

    Args:
        model: A path, a ModelProto or its bytes, a `Model`, or an `onnx_ir.Model`.

    Returns:
        The model; no pass changes it.

    Raises:
        ModelError: The file is missing, or the model is broken.
    """
    return as_model(proto_of(model) if is_ir_model(model) else model)


def like(model: Any) -> ModelLike:
    """Convert a model of onnx_ir, and leave other forms as they are.

    Args:
        model: As for `model_of`.

    Returns:
        What the functions of the other rooms take.
    """
    found: ModelLike = proto_of(model) if is_ir_model(model) else model
    return os.fspath(found) if isinstance(found, os.PathLike) else found
