"""Read and replace the weight and the bias of a linear layer, with the checks that go with it."""

from __future__ import annotations

import numpy as np

from onnxcompress.account import Refusal
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.edit import set_constant
from onnxcompress.graph.linear_layer import BIAS_AT, Linear, chain, is_float
from onnxcompress.graph.query import attribute, input_at, is_output, value_readers
from onnxcompress.model import Model


def bias(model: Model, layer: Linear) -> np.ndarray | None:
    """Read a layer's bias (of a Gemm: beta times C).

    Args:
        model: The model.
        layer: The layer.

    Returns:
        An array that broadcasts onto the layer's output, float64, zero where there is no bias; None where
        the bias is not constant.
    """
    tensor = input_at(layer.node, BIAS_AT) if layer.takes_bias else None
    factor = attribute(layer.node, "beta", 1.0) if layer.node.op == "Gemm" else 1.0
    if tensor is None or factor == 0:
        return np.zeros(())
    value = constant_value(model, tensor)  # torch's newer exporter computes a zero bias with Expand
    if value is None or not is_float(value):
        return None
    value = value.astype(np.float64) * factor
    return value if layer.node.op == "Gemm" else layer.spread(value)


def computed_bias(layer: Linear, label: str) -> Refusal:
    """Refuse a layer whose bias is not constant.

    Args:
        layer: The layer.
        label: Node that the refusal names.

    Returns:
        The refusal.
    """
    rule = f"the bias of {layer.node.op} {layer.label!r} is not a constant"
    return Refusal(label, rule, "make it an initializer")


def check_shared(model: Model, layer: Linear, label: str, copy_shared: bool) -> Refusal | None:
    """Check that only this layer reads its weight (rule 10 of `passes.fold_bn`).

    Args:
        model: The model.
        layer: The layer.
        label: Node that a refusal names.
        copy_shared: Allow a shared weight, since the layer gets a copy.

    Returns:
        The refusal; None where the weight may be replaced.
    """
    tensors = chain(layer.node.inputs[layer.weight_at])
    shared = [t for t in tensors if len(value_readers(t)) > 1 or is_output(model, t)]
    if copy_shared or not shared:
        return None
    rule = f"the weight {shared[-1].name!r} of {layer.node.op} {layer.label!r} is shared"
    return Refusal(label, rule, "--copy-shared gives it a copy")


def check_finite(layer: Linear, label: str, *values: np.ndarray) -> Refusal | None:
    """Check that folding did not overflow the layer's type (rule 12 of `passes.fold_bn`).

    Args:
        layer: The layer.
        label: Node that a refusal names.
        *values: The folded values, in the layer's type.

    Returns:
        The refusal; None where all values are finite.
    """
    if all(np.isfinite(v).all() for v in values):
        return None
    if not np.isfinite(layer.weight).all():
        rule = f"the weights of {layer.node.op} {layer.label!r} are not finite"
        return Refusal(label, rule, "repair the file")
    rule = f"values folded into {layer.node.op} {layer.label!r} exceed {values[0].dtype}"
    return Refusal(label, rule, "convert the model to a wider type")


def stored(values: np.ndarray, layer: Linear) -> np.ndarray:
    """Convert values to the type of the layer's weight; they may overflow to infinity.

    Args:
        values: Any array.
        layer: The layer.

    Returns:
        The values in the weight's type.
    """
    assert is_float(layer.weight)
    with np.errstate(all="ignore"):
        return np.asarray(values).astype(layer.weight.dtype)


def set_weight(model: Model, layer: Linear, weight: np.ndarray) -> None:
    """Replace a layer's weight.

    Args:
        model: The model.
        layer: The layer; its own copy of the weight stays as it was.
        weight: The new weight, in the layout of the initializer.
    """
    old = layer.weight_name
    set_constant(model, layer.node, layer.weight_at, weight, f"{old}_folded")


def set_bias(model: Model, layer: Linear, offset: np.ndarray) -> None:
    """Replace the bias of a Conv, ConvTranspose or Gemm; a zero bias is not added where there was none.

    Args:
        model: The model.
        layer: The layer.
        offset: The new bias, as it broadcasts onto the layer's output.
    """
    node = layer.node
    if not offset.any() and input_at(node, BIAS_AT) is None:
        return
    if node.op != "Gemm" or layer.is_per_channel(offset):
        offset = np.ascontiguousarray(np.broadcast_to(offset.reshape(-1), layer.outputs))
    set_constant(model, node, BIAS_AT, offset, bias_name(layer))
    node.attrs.pop("beta", None)


def bias_name(layer: Linear) -> str:
    """Name a layer's bias after its weight, `conv.bias` after `conv.weight`.

    Args:
        layer: The layer.

    Returns:
        The name; the weight's name with `_bias` appended where that does not end in `weight`.
    """
    weight = layer.weight_name
    return weight.removesuffix("weight") + "bias" if weight.endswith("weight") else f"{weight}_bias"
