"""Recognize models that are quantized already."""

from __future__ import annotations

from onnxcompress.account import Refusal
from onnxcompress.errors import ModelError
from onnxcompress.model import Model

QDQ = ("QuantizeLinear", "DequantizeLinear")


def is_quantized(model: Model) -> bool:
    """Return whether a model is quantized already.

    Args:
        model: The model.

    Returns:
        Whether a node quantizes or dequantizes.
    """
    return any(node.op in QDQ for node in model.graph.nodes)


def refuse_quantized(model: Model, remedy: str) -> Refusal | None:
    """Refuse a model that is quantized already.

    Args:
        model: The model that a pass was given.
        remedy: What to do instead.

    Returns:
        The refusal; None where no node quantizes.
    """
    if not is_quantized(model):
        return None
    rule = "it is quantized already: it has QuantizeLinear or DequantizeLinear nodes"
    return Refusal(model.name, rule, remedy)


def check_not_quantized(model: Model, remedy: str) -> None:
    """Refuse to work on a model that is quantized already.

    Args:
        model: The model that a pass was given.
        remedy: What to do instead.

    Raises:
        ModelError: A node quantizes.
    """
    refusal = refuse_quantized(model, remedy)
    if refusal is not None:
        raise ModelError(str(refusal))
