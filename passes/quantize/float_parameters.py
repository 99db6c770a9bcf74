"""Parameters of layers before they are quantized, and how to let such layers compute in floats again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.edit import remove_unread, set_input
from onnxcompress.graph.linear_layer import BIAS_AT
from onnxcompress.graph.query import is_op, producer
from onnxcompress.model import Model
from onnxcompress.quantization.qdq_plan import Plan
from onnxcompress.quantization.qdq_writer import Emitter


@dataclass(frozen=True, eq=False)
class Parameters:
    """What a layer computed with before it was quantized."""

    label: str
    """Name of the node in messages."""
    output: str
    """Name of its output, which is unique."""
    weight_at: int
    weight: np.ndarray
    """As stored."""
    bias: np.ndarray | None
    data_at: int


def parameters_of(model: Model, plan: Plan) -> tuple[Parameters, ...]:
    """Collect the parameters of the layers that are going to be quantized.

    Args:
        model: The model, still in floats.
        plan: What is quantized.

    Returns:
        The parameters, in the order of the network.
    """
    tensors = model.graph.tensors()
    found = []
    for layer in plan.layers.values():
        linear = layer.linear
        bias = None if linear.bias_name is None else constant_value(model, tensors[linear.bias_name])
        names = (linear.label, linear.output_name)
        found.append(Parameters(*names, linear.weight_at, linear.weight, bias, linear.data_at))
    return tuple(found)


def put_back(model: Model, layers: Sequence[Parameters]) -> None:
    """Let layers of a quantized network compute in floats again, in place.

    Args:
        model: The network, with QuantizeLinear and DequantizeLinear.
        layers: The parameters of these layers.
    """
    emitter = Emitter(model)
    makers = {tensor.name: node for node in model.graph.nodes for tensor in node.outputs}
    for layer in layers:
        node = makers[layer.output]
        before = list(node.inputs)
        weight = emitter.constant(f"{before[layer.weight_at].name}_float", layer.weight)
        set_input(node, layer.weight_at, weight)
        if layer.bias is not None:
            set_input(node, BIAS_AT, emitter.constant(f"{before[BIAS_AT].name}_float", layer.bias))
        dequantize = producer(before[layer.data_at])
        if dequantize is not None and is_op(dequantize, "DequantizeLinear"):
            quantize = producer(dequantize.inputs[0])
            if quantize is not None and is_op(quantize, "QuantizeLinear"):
                set_input(node, layer.data_at, quantize.inputs[0])
        remove_unread(model, before)
    model.touch()
