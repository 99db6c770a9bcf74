"""What `fp16` does to a quantized network, for runtimes that take every type from the file (TensorRT 11).

    int32 --DequantizeLinear--> bias        becomes        bias, a float constant

Its int8 weights, QuantizeLinear and DequantizeLinear stay, with float16 scales: each quantized layer then
reads float16 from both sides. An int32 bias cannot stay: its scale, a product of two, is below float16's
normal numbers, and TensorRT takes no int32 there (`quantization.runtimes`).

float16 moves some values over the edge between two integers. That is noise of the quantization's own kind:
one node makes about as much of it as all together, so more error is allowed (QUANTIZED_ERROR).
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.graph.edit import remove_nodes, replace_uses, unique_name
from onnxcompress.graph.query import is_captured, is_op, is_output, read
from onnxcompress.model import Model

MAX_ERROR, QUANTIZED_ERROR = 0.01, 0.1
"""Error of an output that is allowed where no option says so, of a float and of a quantized network."""

MISCOMPUTED = (
    "with its optimizations onnxruntime computes something else than the file says (error {:.3g} %): its "
    "WeightBiasQuantization makes integers of float16 biases of quantized layers, which overflow. Other "
    "runtimes are not concerned; in onnxruntime give InferenceSession "
    "disabled_optimizers=['WeightBiasQuantization']"
)
"""Seen with onnxruntime 1.31 on EfficientNet-Lite0, which it computes rightly without that optimizer."""


def fold_biases(model: Model) -> int:
    """Replace constants that are dequantized from int32 by float constants, in place.

    Args:
        model: The model.

    Returns:
        Number of constants that were replaced.
    """
    found = [node for node in model.graph.nodes if _is_bias(model, node)]
    for node in found:
        integers, scale, *_ = (read(t) for t in node.inputs)
        shape: list[int] = [1] * integers.ndim
        if scale.ndim:
            shape[int(node.attrs.get("axis", 1)) % integers.ndim] = -1
        values = (integers.astype(np.float64) * scale.astype(np.float64).reshape(shape)).astype(np.float32)
        constant = gs.Constant(unique_name(model, f"{node.outputs[0].name}_float"), values)
        replace_uses(model, node.outputs[0], constant)
    remove_nodes(model, found)
    model.touch()
    return len(found)


def _is_bias(model: Model, node: gs.Node) -> bool:
    """Return whether a node dequantizes an int32 constant with zero point 0."""
    if not is_op(node, "DequantizeLinear") or is_output(model, node.outputs[0]):
        return False
    if is_captured(model, node.outputs[0]):
        return False
    if not all(isinstance(t, gs.Constant) for t in node.inputs) or node.inputs[0].dtype != np.int32:
        return False
    return len(node.inputs) < 3 or not read(node.inputs[2]).any()
