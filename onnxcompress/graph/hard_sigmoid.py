"""Hard sigmoids and HardSwish written out in Add, Clip, Mul and Div, as exporters leave them.

    clip(x + b, 0, h) / h        =  HardSigmoid(x; alpha 1/h, beta b/h)
    (x · clip(x + b, 0, h)) / h  =  x · HardSigmoid(x; alpha 1/h, beta b/h)

The gate is then seen as one (`graph.self_gated`), has the range 0 to 1, and costs two nodes less. b and h
are 3 and 6 where a network has them. Division may be multiplication by 1/h.

Does not handle: bounds or offsets that differ between channels; other types than float32, for which
runtimes have no HardSigmoid. Min and Max are Clips by then (`graph.bounds`).
"""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcompress.graph.constant_folding import scalar_operand, scalar_value
from onnxcompress.graph.edit import remove_unread
from onnxcompress.graph.query import attribute, input_at, is_op, only_consumer, producer
from onnxcompress.graph.shape_inference import tensor_shapes, tensor_types
from onnxcompress.model import Model

TOLERANCE = 1e-5
"""Relative difference of h and the divisor: 1/6 is written with few digits."""


def fuse_hard_sigmoids(model: Model) -> int:
    """Put HardSigmoid in place of the operators that compute it, in place.

    Args:
        model: The model to change.

    Returns:
        How many were found.
    """
    fused = sum(_fuse(model, node) for node in list(model.graph.nodes) if is_op(node, "Clip"))
    if fused:
        model.touch()
    return fused


def _fuse(model: Model, clip: gs.Node) -> bool:
    """Fuse the operators around one Clip; return whether that was possible."""
    clipped, shifted = clip.outputs[0], clip.inputs[0]
    top, summed = _top(model, clip), producer(shifted)
    if top is None or not is_op(summed, "Add") or only_consumer(model, shifted) is not clip:
        return False
    terms = scalar_operand(model, summed)
    if terms is None:
        return False
    x, offset = terms
    known = tensor_shapes(model).get(x.name), tensor_types(model).get(x.name)
    reader = only_consumer(model, clipped)
    if reader is None or known[0] is None or known[1] != onnx.TensorProto.FLOAT:
        return False
    product = None
    if is_op(reader, "Mul") and any(t is x for t in reader.inputs):
        product, reader = reader, only_consumer(model, reader.outputs[0])
    divided = clipped if product is None else product.outputs[0]
    if reader is None or not math.isclose(_factor(model, reader, divided) * top, 1, rel_tol=TOLERANCE):
        return False
    shapes = tensor_shapes(model)
    if len(shapes.get(reader.outputs[0].name, ())) != len(known[0]):  # a number of more axes than x
        return False
    gate = reader if product is None else product
    _become(gate, "HardSigmoid", [x], alpha=1 / top, beta=offset / top)
    if product is not None:
        _become(reader, "Mul", [x, product.outputs[0]])
    remove_unread(model, [clipped])
    return True


def _become(node: gs.Node, op: str, inputs: list[gs.Tensor], **attrs: float) -> None:
    node.op = op
    node.attrs = dict(attrs)
    node.inputs = inputs


def _top(model: Model, clip: gs.Node) -> float | None:
    """Return the upper bound of a Clip whose lower one is 0."""
    bounds = [
        attribute(clip, key, None) if input_at(clip, at) is None else scalar_value(model, clip.inputs[at])
        for at, key in ((1, "min"), (2, "max"))
    ]
    low, high = bounds
    return float(high) if low == 0 and high is not None and 0 < high < np.inf else None


def _factor(model: Model, node: gs.Node, tensor: gs.Tensor) -> float:
    """Return the number that a node multiplies a tensor by; NaN where it does something else."""
    if is_op(node, "Div") and node.inputs[0] is tensor:
        value = scalar_value(model, node.inputs[1])
        return 1 / value if value else math.nan
    if is_op(node, "Mul"):
        values = [scalar_value(model, t) for t in node.inputs if t is not tensor]
        return values[0] if len(values) == 1 and values[0] is not None else math.nan
    return math.nan
