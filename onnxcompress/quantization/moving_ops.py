"""Operators that move numbers and compute none: their outputs lie on the grid of their input."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.query import attribute, input_at, is_op
from onnxcompress.model import Model

MOVING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather",
          "Identity", "DepthToSpace", "SpaceToDepth", "Split", "Pad", "Dropout")  # fmt: skip
"""Operators whose outputs contain only values of their first input, and zeros (see `moves`)."""


def moves(model: Model, node: gs.Node) -> bool:
    """Return whether an operator's outputs contain only values of its first input, and zeros.

    Args:
        model: The model.
        node: The operator.

    Returns:
        Whether they do; not where a Pad puts a number around them, which their grid need not hold.
    """
    if not is_op(node, "Pad"):
        return is_op(node, *MOVING)
    if attribute(node, "mode", "constant") != "constant":
        return True
    given = input_at(node, 2)
    number = attribute(node, "value", 0.0) if given is None else constant_value(model, given)
    return number is not None and bool(np.all((np.asarray(number) == 0) | np.isneginf(number)))
