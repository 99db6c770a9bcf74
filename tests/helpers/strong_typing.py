"""The rules of strongly typed networks: TensorRT 11 takes every type from the file and converts nothing.

 1. inputs that an operator's schema binds to one type have that type, and declared types are the inferred
    ones (ONNX's checker with strict inference);
 2. quantized tensors are int8 with zero point 0, activations by tensor, weights by channel of axis 0 (of
    ConvTranspose 1) or by tensor: TensorRT's scheme is symmetric;
 3. QuantizeLinear reads the type of its scale, DequantizeLinear gives it; scales are positive constants;
 4. of a layer both operands are dequantized or neither is, and its bias is a constant of its type;
 5. no Cast stands behind a DequantizeLinear, nor before a QuantizeLinear other than at the network's
    inputs: it would keep both from being fused;
 6. of a sum behind a layer only the residual input is quantized.

Sources: TensorRT documentation, Strongly Typed Networks; Explicit Quantization; Quantized Types.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class Types:
    """A graph with its producers, readers, constants and types."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        onnx.checker.check_model(proto, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        self.nodes = list(inferred.graph.node)
        self.made = {name: node for node in self.nodes for name in node.output}
        self.values = {t.name: numpy_helper.to_array(t) for t in inferred.graph.initializer}
        kinds = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
        self.kinds = {v.name: v.type.tensor_type.elem_type for v in kinds}
        self.kinds |= {t.name: t.data_type for t in inferred.graph.initializer}
        self.inputs = {v.name for v in inferred.graph.input}

    def op(self, name: str) -> str:
        """Operator that gives a tensor; empty for constants and inputs."""
        return self.made[name].op_type if name in self.made else ""

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if name in node.input]


def violations(proto: onnx.ModelProto) -> list[str]:
    """List what breaks the rules, with the node's name; rule 1 raises onnx's own errors."""
    types = Types(proto)
    return [f"{node.name}: {text}" for node in types.nodes for text in _broken(types, node)]


def _broken(types: Types, node: onnx.NodeProto) -> Iterator[str]:
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        yield from _quantizer(types, node)
    elif node.op_type in LAYERS:
        operands = {types.op(name) == "DequantizeLinear" for name in node.input[:2]}
        if len(operands) > 1:
            yield "one operand alone is dequantized"
        if len(node.input) > 2 and types.kinds.get(node.input[2]) != types.kinds.get(node.output[0]):
            yield "its bias has another type"
        if len(node.input) > 2 and node.input[2] not in types.values:
            yield "its bias is computed"
    elif node.op_type == "Add":
        behind = [n for n in node.input if types.op(n) in LAYERS and len(types.readers(n)) == 1]
        both = all(types.op(name) == "DequantizeLinear" for name in node.input)
        hidden = [n for n in node.input if types.op(n) == "DequantizeLinear" and _layer_behind(types, n)]
        if both and hidden and not behind:
            yield "both inputs of a sum behind a layer are quantized"
    elif node.op_type == "Cast":
        if types.op(node.input[0]) == "DequantizeLinear":
            yield "a Cast behind a DequantizeLinear"
        if node.input[0] not in types.inputs and any(
            r.op_type == "QuantizeLinear" for r in types.readers(node.output[0])
        ):
            yield "a Cast before a QuantizeLinear"


def _quantizer(types: Types, node: onnx.NodeProto) -> Iterator[str]:
    quantizes = node.op_type == "QuantizeLinear"
    whole = node.input[0] if quantizes else node.output[0]
    if types.kinds.get(whole) != types.kinds.get(node.input[1]):
        yield "its scale has another type than the floats"
    if types.kinds.get(node.output[0] if quantizes else node.input[0]) != TensorProto.INT8:
        yield "it is not int8"
    if len(node.input) > 2 and types.values[node.input[2]].any():
        yield "its zero point is not 0"
    scale = types.values.get(node.input[1])
    if scale is None or not (np.isfinite(scale).all() and (scale > 0).all()):
        yield "its scale is no positive constant"
    elif scale.ndim and (quantizes or node.input[0] not in types.values):
        yield "an activation has several scales"
    elif scale.ndim:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        reader = types.readers(node.output[0])[0]
        if reader.op_type != "Gemm" and axis != (1 if reader.op_type in ("ConvTranspose", "MatMul") else 0):
            yield f"its scales lie along axis {axis}"


def _layer_behind(types: Types, dequantized: str) -> bool:
    """Whether a tensor is a layer's own output, quantized for one reader alone."""
    quantizer = types.made[types.made[dequantized].input[0]]
    source = quantizer.input[0]
    return types.op(source) in LAYERS and len(types.readers(source)) == 1
