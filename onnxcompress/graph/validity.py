"""Check a model with ONNX's checker, without reading large weights."""

from __future__ import annotations

import onnx

from onnxcompress.model import Model


def fault(model: Model) -> str | None:
    """Check a model with ONNX's checker and strict shape inference.

    A graph of 600 nodes takes some 10 ms. The values of large weights are not read, their shapes are.

    Args:
        model: The model.

    Returns:
        What is wrong, in one line; None for a valid model.
    """
    try:
        onnx.checker.check_model(model.skeleton(), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        return " ".join(str(error).split())
    return None
