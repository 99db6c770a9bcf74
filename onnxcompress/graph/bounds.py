"""Bounds written as Max and Min, as TensorFlow's exporters leave them, become Relu and Clip.

    max(x, 0)  =  Relu(x)        min(max(x, a), b)  =  Clip(x; a, b)   for a ≤ b

Runtimes fuse Relu and Clip into the layer before them, whose output is then quantized behind both.

Does not handle: bounds that differ between channels; other types than float32; single bounds other than 0.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcompress.graph.constant_folding import scalar_operand
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
    found = scalar_operand(model, node)
    if found is None or np.isnan(found[1]) or types.get(found[0].name) != onnx.TensorProto.FLOAT:
        return None
    shapes = tensor_shapes(model)
    before, after = shapes.get(found[0].name), shapes.get(node.outputs[0].name)
    return found if before is not None and after is not None and len(before) == len(after) else None
