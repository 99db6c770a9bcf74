"""Bounds written as Max and Min, as TensorFlow's exporters leave them, become Relu and Clip.

    max(x, 0)  =  Relu(x)        min(max(x, a), b)  =  Clip(x; a, b)   for a ≤ b

Runtimes fuse Relu and Clip into the layer before them, whose output is then quantized behind both.

Does not handle: bounds that differ between channels; other types than float32; single bounds other than 0.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.edit import remove_unread, unique_name
from onnxcompress.graph.query import is_op, only_consumer
from onnxcompress.graph.shape_inference import tensor_shapes, tensor_types
from onnxcompress.model import Model

CLIP_OPSET = 11
"""From which on the bounds of Clip are inputs."""


def fuse_bounds(model: Model) -> int:
    """Put Relu and Clip in place of Max and Min with constants, in place.

    Args:
        model: The model to change.

    Returns:
        How many were found; a pair counts once.
    """
    types = tensor_types(model)
    found = sum(_fuse(model, node, types) for node in list(model.graph.nodes) if is_op(node, "Max", "Min"))
    if found:
        model.touch()
    return found


def _fuse(model: Model, node: gs.Node, types: dict[str, int]) -> bool:
    """Fuse one node, and the opposite bound behind it; return whether that was possible."""
    first = _bound(model, node, types)
    if first is None:
        return False
    x, value = first
    behind = only_consumer(model, node.outputs[0])
    opposite = {"Max": "Min", "Min": "Max"}[node.op]
    second = _bound(model, behind, types) if behind is not None and is_op(behind, opposite) else None
    if behind is not None and second is not None and model.opset >= CLIP_OPSET:
        low, high = (value, second[1]) if node.op == "Max" else (second[1], value)
        if low <= high:
            between = node.outputs[0]
            bounds = [
                gs.Constant(unique_name(model, f"{behind.outputs[0].name}_{end}"), np.array(v, np.float32))
                for end, v in (("low", low), ("high", high))
            ]
            behind.op, behind.attrs, behind.inputs = "Clip", {}, [x, *bounds]
            remove_unread(model, [between])
            return True
    if node.op == "Max" and value == 0:
        node.op, node.inputs = "Relu", [x]
        return True
    return False


def _bound(model: Model, node: gs.Node, types: dict[str, int]) -> tuple[gs.Tensor, float] | None:
    """Return the tensor that a Max or Min with one number bounds, and the number."""
    if len(node.inputs) != 2:
        return None
    values = [constant_value(model, tensor) for tensor in node.inputs]
    if sum(value is not None for value in values) != 1:
        return None
    at = 0 if values[0] is None else 1
    x, value = node.inputs[at], values[1 - at]
    shape = tensor_shapes(model).get(x.name)
    if value is None or value.size > 1 or np.isnan(value).any() or shape is None or len(shape) < value.ndim:
        return None
    if types.get(x.name) != onnx.TensorProto.FLOAT:
        return None
    return x, float(value.reshape(-1)[0])
