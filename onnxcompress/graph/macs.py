"""Multiply-accumulates and parameters of convolutions and matrix products.

A symbolic or unknown first dimension counts as a batch of 1. Activations, pools and additions are not
counted, as is usual in the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.errors import ModelError
from onnxcompress.graph.query import DEFAULT_DOMAINS
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model, Shape

_CONV = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}
_MATMUL = {"MatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3)}
_WEIGHTS = {
    "DequantizeLinear": (0,),
    "QLinearConv": (3, 8),
    "ConvInteger": (1,),
    "QLinearMatMul": (0, 3),
    "MatMulInteger": (0, 1),
}
"""Operators whose integer constants are parameters, and their positions; scales do not count."""
_NO_PARAMETERS = ("Constant", "Resize", "Upsample", "Pad", "Clip", "QuantizeLinear")


def node_macs(node: gs.Node, shapes: Mapping[str, Shape]) -> int:
    """Count the multiply-accumulates of a node.

    Args:
        node: The node.
        shapes: Shapes by tensor name (`tensor_shapes`); a numeric batch size counts.

    Returns:
        The count; 0 where the node is neither a convolution nor a matrix product.

    Raises:
        ModelError: A size that is needed is unknown.
    """
    if node.domain not in DEFAULT_DOMAINS:
        return 0
    if node.op in _CONV:
        weight = _sizes(node, node.inputs[_CONV[node.op]], shapes)
        return math.prod(_sizes(node, node.outputs[0], shapes)) * math.prod(weight[1:])
    if node.op == "ConvTranspose":
        weight = _sizes(node, node.inputs[1], shapes)
        return math.prod(_sizes(node, node.inputs[0], shapes)) * math.prod(weight[1:])
    if node.op == "Gemm":
        left, right = int(not node.attrs.get("transA", 0)), int(bool(node.attrs.get("transB", 0)))
        inner = _inner(node, shapes, (node.inputs[0], left), (node.inputs[1], right))
        return math.prod(_sizes(node, node.outputs[0], shapes)) * inner
    if node.op in _MATMUL:
        a, b = (node.inputs[i] for i in _MATMUL[node.op])
        inner = _inner(node, shapes, (b, -2), (a, -1))
        return math.prod(_sizes(node, node.outputs[0], shapes)) * inner
    return 0


def count_macs(model: Model) -> int:
    """Count the multiply-accumulates of the model for one image.

    Args:
        model: The model.

    Returns:
        The count.

    Raises:
        ModelError: A size that is needed is unknown, or the graph's shapes contradict each other.
    """
    shapes = tensor_shapes(model)
    total = sum(node_macs(node, shapes) for node in model.graph.nodes)
    first = next((shapes.get(t.name) for t in model.graph.inputs), None)
    batch = first[0] if first and isinstance(first[0], int) and first[0] > 0 else 1
    return total // batch


def count_parameters(model: Model) -> int:
    """Count the parameters of the model.

    Args:
        model: The model.

    Returns:
        The number of elements of all weights; a shared weight counts once.
    """
    return parameters_of(model.graph.nodes)


def parameters_of(nodes: Iterable[gs.Node]) -> int:
    """Count the parameters that some nodes read.

    Args:
        nodes: The nodes.

    Returns:
        The number of elements of their weights; a shared weight counts once.
    """
    weights = {t.name: t for node in nodes for t in _weights(node)}
    return sum(math.prod(t.shape) for t in weights.values())


def _weights(node: gs.Node) -> list[gs.Constant | _Shaped]:
    if node.op in _NO_PARAMETERS:
        return []
    if node.op in _WEIGHTS:
        tensors = [node.inputs[i] for i in _WEIGHTS[node.op] if i < len(node.inputs)]
        return [c for t in tensors if (c := _constant(t)) is not None]
    constants = [c for t in node.inputs if (c := _constant(t)) is not None]
    return [c for c in constants if _is_float(c.dtype) and len(c.shape) > 0]


class _Shaped:
    """The value of a Constant node, with the name of the node's output."""

    def __init__(self, name: str, value: gs.Constant) -> None:
        self.name, self.shape, self.dtype = name, tuple(value.shape), value.dtype


def _constant(tensor: gs.Tensor) -> gs.Constant | _Shaped | None:
    if isinstance(tensor, gs.Constant):
        return tensor
    if tensor.inputs and tensor.inputs[0].op == "Constant":
        value = tensor.inputs[0].attrs.get("value")
        if isinstance(value, gs.Constant):
            return _Shaped(tensor.name, value)
    return None


def _is_float(dtype: object) -> bool:
    """Return whether a tensor's type is a float; numpy has no kind for onnx's small floats."""
    try:
        kind = np.dtype(dtype)  # type: ignore[call-overload]
    except TypeError:
        return False
    return bool(kind.kind == "f" or "float" in kind.name)


def _inner(node: gs.Node, shapes: Mapping[str, Shape], *places: tuple[gs.Tensor, int]) -> int:
    """Return the summed dimension of a product, from the first operand whose shape is known there."""
    for tensor, axis in places:
        shape = _shape(tensor, shapes)
        if shape is not None and len(shape) >= max(axis + 1, -axis):
            size = shape[axis]
            if isinstance(size, int):
                return size
    raise ModelError(f"node {node.name!r} ({node.op}): the inner dimension of its product is unknown")


def _shape(tensor: gs.Tensor, shapes: Mapping[str, Shape]) -> Sequence[int | str | None] | None:
    if tensor.name in shapes:
        return shapes[tensor.name]
    constant = _constant(tensor)
    return None if constant is None else tuple(constant.shape)


def _sizes(node: gs.Node, tensor: gs.Tensor, shapes: Mapping[str, Shape]) -> list[int]:
    shape = _shape(tensor, shapes)
    if shape is None:
        raise ModelError(f"node {node.name!r} ({node.op}): the shape of {tensor.name!r} is unknown")
    sizes = []
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            sizes.append(size)
        elif axis == 0:
            sizes.append(1)
        else:
            text = "x".join("?" if d is None else str(d) for d in shape)
            raise ModelError(
                f"node {node.name!r} ({node.op}): dimension {axis} of {tensor.name!r} ({text}) is "
                "open; MACs need fixed image sizes"
            )
    return sizes
