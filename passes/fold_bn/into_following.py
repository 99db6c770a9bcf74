"""Fold BatchNorm forward: `W n(x) + b = (W s) x + (b + W t)`. See `fold_bn`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph import layer_params
from onnxcompress.graph.batch_norm import BatchNorm
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.edit import remove_nodes, set_constant, unique_name
from onnxcompress.graph.linear_layer import LINEAR_OPS, Linear, Rank, as_linear
from onnxcompress.graph.query import (
    attribute,
    auto_pad,
    is_op,
    is_output,
    node_label,
    only_consumer,
    reader_names,
)
from onnxcompress.model import Model

FARTHEST_MEAN = 64
"""Deviations from zero: folding forward then loses at most 6 of the 24 binary digits (rule 14)."""


@dataclass(frozen=True)
class _Match:
    """A BatchNorm, possibly a Flatten, and the linear layer after them."""

    layer: Linear
    reader: gs.Node
    """The node that reads the BatchNorm: the layer's or the Flatten."""
    scale: np.ndarray
    shift: np.ndarray
    """(input channels of the layer,), float64."""


def fold(model: Model, norm: BatchNorm, copy_shared: bool, rank: Rank) -> str | Refusal | None:
    """Fold a BatchNorm into the linear layer after it.

    Args:
        model: The model to change.
        norm: The BatchNorm.
        copy_shared: Whether a weight that several layers share may be copied.
        rank: Returns the number of axes of a tensor, or None where it is unknown.

    Returns:
        What was done, the reason against it, or None where no linear layer follows.
    """
    match = _match(model, norm, rank)
    if not isinstance(match, _Match):
        return match
    layer, label = match.layer, node_label(norm.node)
    refusal = layer_params.check_shared(model, layer, label, copy_shared)
    if refusal:
        return refusal
    weight = layer.scaled(inputs=match.scale)
    response = layer.response(match.shift) if match.shift.any() else np.zeros(layer.outputs)
    bias = layer_params.bias(model, layer) if response.any() else np.zeros(())
    if bias is None:  # rule 11
        return layer_params.computed_bias(layer, label)
    offset = layer_params.stored(bias + layer.spread(response), layer)
    refusal = layer_params.check_finite(layer, label, weight, offset)
    if refusal:
        return refusal
    what = f"folded into the {layer.node.op} behind it"
    at = next(i for i, t in enumerate(match.reader.inputs) if t is norm.node.outputs[0])
    match.reader.inputs[at] = norm.node.inputs[0]
    remove_nodes(model, [norm.node])
    if response.any() and layer.takes_bias:
        layer_params.set_bias(model, layer, offset)
    elif response.any():
        what += add_behind(model, layer, response)
    layer_params.set_weight(model, layer, weight)
    return what


def _match(model: Model, norm: BatchNorm, rank: Rank) -> _Match | Refusal | None:
    output = norm.node.outputs[0]
    reader = node = _reader(model, output)
    label = node_label(norm.node)
    if node is None:
        return _not_alone(model, label, output)
    if is_op(node, "Flatten") and attribute(node, "axis", 1) == 1:
        output = node.outputs[0]
        node = _reader(model, output)
    if not is_op(node, *LINEAR_OPS):
        return None
    layer = as_linear(model, node, rank)
    if isinstance(layer, Refusal):
        return Refusal(label, layer.rule, layer.remedy)
    name = f"{node.op} {node_label(node)!r}"
    if node.inputs[layer.data_at] is not output:
        return None
    if node.op == "Gemm" and attribute(node, "transA", 0):  # rule 13
        rule = f"{name} behind it transposes its input: channels are not what it multiplies"
        return Refusal(label, rule)
    repeat = layer.inputs // norm.channels
    if repeat * norm.channels != layer.inputs or (repeat > 1 and reader is node):  # rule 9
        return Refusal(label, f"it has {norm.channels} channels, {name} behind it takes {layer.inputs}")
    far = (np.abs(norm.mean) > FARTHEST_MEAN * norm.deviation) & (norm.scale != 0)
    if far.any():  # rule 14
        channel = int(np.flatnonzero(far)[0])
        rule = f"the mean of channel {channel} is over {FARTHEST_MEAN} deviations from zero"
        return Refusal(label, f"{rule}: {name} behind it would lose digits")
    if norm.shift.any() and is_uneven(node, layer.weight):  # rule 13
        rule = f"{name} behind it pads with zeros, which the BatchNorm does not shift"
        if node.op == "ConvTranspose":
            rule = f"not all taps of {name} behind it reach every output, so its shift varies by position"
        return Refusal(label, rule)
    return _Match(layer, reader, np.repeat(norm.scale, repeat), np.repeat(norm.shift, repeat))


def _reader(model: Model, tensor: gs.Tensor) -> gs.Node | None:
    """Return the only reader of the tensor, if it is a node of the main graph."""
    reader = only_consumer(model, tensor)
    return None if reader is None or model.in_body(reader) else reader


def _not_alone(model: Model, label: str, output: gs.Tensor) -> Refusal | None:
    """Refuse by rule 8: a linear layer reads the output, but it is not the only reader."""
    if not any(is_op(node, *LINEAR_OPS) for node in output.outputs):
        return None
    if is_output(model, output):
        rule = f"its output {output.name!r} is a graph output, too"
        return Refusal(label, rule, "remove it from the graph's outputs")
    if len(output.outputs) == 1:
        return Refusal(label, f"its output {output.name!r} is read inside the body of an If, Loop or Scan")
    readers = reader_names(output)
    return Refusal(label, f"its output {output.name!r} has several consumers: {readers}")


def is_uneven(node: gs.Node, weight: np.ndarray) -> bool:
    """Return whether a constant input may give an output that varies along the spatial axes (rule 13).

    Args:
        node: A linear layer.
        weight: Its weight, (outputs, inputs, taps…) or with both swapped.

    Returns:
        Whether it does: zeros pad the input, or not all taps reach every output.
    """
    if node.op not in ("Conv", "ConvTranspose"):
        return False
    pointwise = math.prod(weight.shape[2:]) == 1
    padding = auto_pad(node)
    if node.op == "Conv":
        explicit = padding == "NOTSET" and any(attribute(node, "pads", []))
        return bool(explicit or (padding.startswith("SAME") and not pointwise))
    strided = any(s != 1 for s in attribute(node, "strides", []))
    resized = any(attribute(node, "output_padding", [])) or attribute(node, "output_shape")
    return bool(not pointwise or strided or resized or padding.startswith("SAME"))


def add_behind(model: Model, layer: Linear, response: np.ndarray) -> str:
    """Add an offset to the output of a MatMul, in the Add of a constant that follows it or in a new Add.

    Args:
        model: The model to change.
        layer: The MatMul.
        response: The offset of each output channel, (output channels,), float64.

    Returns:
        What was done, to be appended to the text of a change.
    """
    node, offset = layer.node, layer.spread(response)
    output = node.outputs[0]
    add = _reader(model, output)
    if is_op(add, "Add"):
        at = next(i for i, t in enumerate(add.inputs) if t is not output)
        constant = constant_value(model, add.inputs[at])
        if constant is not None and layer.is_per_channel(constant):
            total = layer_params.stored(constant.astype(np.float64) + offset, layer)
            if np.isfinite(total).all():
                set_constant(model, add, at, total, layer_params.bias_name(layer))
                return " and its Add"
    inner = gs.Variable(unique_name(model, f"{output.name}_product"), output.dtype, output.shape)
    node.outputs[0] = inner
    values = gs.Constant(
        unique_name(model, layer_params.bias_name(layer)), layer_params.stored(offset, layer)
    )
    new = gs.Node("Add", f"{node.name}_bias" if node.name else "", inputs=[inner, values], outputs=[output])
    place = next(i for i, n in enumerate(model.graph.nodes) if n is node)
    model.graph.nodes.insert(place + 1, new)
    model.touch()
    return " and a new Add"
