"""A small detector in the form of a YOLOv8: SiLU, a block, two scales, boxes and scores in one output."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ANCHORS = "anchors"


def detector(seed: int = 0) -> onnx.ModelProto:
    """Make it: open height and width, BatchNorm folded, nodes of the head below /model.22/.

    Args:
        seed: Of its weights.

    Returns:
        Inputs images (batch, 3, height, width), output0 (batch, 4 + 2, anchors).
    """
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, np.ndarray] = {"flat": np.array([0, 6, -1])}

    def node(op: str, name: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [f"{name}_output_0"], name, **attributes))
        return f"{name}_output_0"

    def conv(name: str, source: str, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> str:
        shape = (outputs, inputs, size, size)
        weights[f"{name}.w"] = rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        weights[f"{name}.b"] = rng.normal(0, 0.1, outputs).astype(np.float32)
        pads = [size // 2] * 4
        layer = (source, f"{name}.w", f"{name}.b")
        return node(
            "Conv", f"{name}/Conv", *layer, kernel_shape=[size] * 2, pads=pads, strides=[stride] * 2
        )

    def silu(name: str, source: str) -> str:
        return node("Mul", f"{name}/act/Mul", source, node("Sigmoid", f"{name}/act/Sigmoid", source))

    def block(name: str, *arguments: int | str) -> str:
        return silu(name, conv(f"{name}/conv", *arguments))  # type: ignore[arg-type]

    x = block("/model.0", "images", 3, 8, 3, 2)
    x = block("/model.1", x, 8, 16, 3, 2)
    inner = block("/model.2/m.0/cv2", block("/model.2/m.0/cv1", x, 16, 16), 16, 16)
    x = node("Add", "/model.2/m.0/Add", x, inner)
    near = block("/model.3", x, 16, 16, 3, 2)
    far = block("/model.5", near, 16, 16, 3, 2)
    heads = []
    for scale, features in enumerate((near, far)):
        parts = []
        for kind, channels in (("cv2", 4), ("cv3", 2)):
            name = f"/model.22/{kind}.{scale}"
            inner = block(f"{name}.0", features, 16, 16)
            parts.append(conv(f"{name}.1", inner, 16, channels, 1))
        joined = node("Concat", f"/model.22/Concat_{scale}", *parts, axis=1)
        heads.append(node("Reshape", f"/model.22/Reshape_{scale}", joined, "flat"))
    joined = node("Concat", "/model.22/Concat", *heads, axis=2)
    weights["split"] = np.array([4, 2])
    nodes.append(
        helper.make_node("Split", [joined, "split"], ["boxes", "logits"], "/model.22/Split", axis=1)
    )
    scores = node("Sigmoid", "/model.22/Sigmoid", "logits")
    nodes.append(helper.make_node("Concat", ["boxes", scores], ["output0"], "/model.22/Concat_5", axis=1))
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, "height", "width"])
    output = helper.make_tensor_value_info("output0", TensorProto.FLOAT, ["batch", 6, ANCHORS])
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "detector", [images], [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
