"""Fold BatchNorm backward: `n(W x + b + a) = (s W) x + (s (b + a) + t)`. See `fold_bn`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph import layer_params
from onnxcompress.graph.batch_norm import BatchNorm
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.edit import remove_nodes, remove_unread, set_constant
from onnxcompress.graph.linear_layer import LINEAR_OPS, Linear, Rank, as_linear
from onnxcompress.graph.query import is_op, is_output, node_label, producer, reader_names
from onnxcompress.model import Model


@dataclass(frozen=True)
class _Match:
    """A linear layer, possibly an Add of a constant, and the BatchNorm after them."""

    layer: Linear
    add: gs.Node | None
    constant_at: int
    constant: np.ndarray | None
    """The constant of the Add, float64, in a shape that broadcasts."""


def fold(model: Model, norm: BatchNorm, copy_shared: bool, rank: Rank) -> str | Refusal | None:
    """Fold a BatchNorm into the linear layer before it.

    Args:
        model: The model to change.
        norm: The BatchNorm.
        copy_shared: Whether a weight that several layers share may be copied.
        rank: Returns the number of axes of a tensor, or None where it is unknown.

    Returns:
        What was done, the reason against it, or None where no linear layer comes before.
    """
    match = _match(model, norm, rank)
    if not isinstance(match, _Match):
        return match
    layer, add = match.layer, match.add
    label = node_label(norm.node)
    refusal = layer_params.check_shared(model, layer, label, copy_shared)
    if refusal:
        return refusal
    bias = layer_params.bias(model, layer)
    if bias is None:  # rule 11
        return layer_params.computed_bias(layer, label)
    scale, shift = layer.spread(norm.scale), layer.spread(norm.shift)
    weight = layer.scaled(outputs=norm.scale)
    into_layer = layer.takes_bias and (match.constant is None or layer.is_per_channel(match.constant))
    if into_layer:
        sums = {"bias": scale * (bias + (0.0 if match.constant is None else match.constant)) + shift}
    else:
        added = 0.0 if match.constant is None else match.constant
        sums = {"bias": scale * bias, "added": scale * added + shift}
    offsets = {key: layer_params.stored(value, layer) for key, value in sums.items()}
    refusal = layer_params.check_finite(layer, label, weight, *offsets.values())
    if refusal:
        return refusal
    what = f"folded into the {layer.node.op} before it"
    if layer.takes_bias:
        layer_params.set_bias(model, layer, offsets["bias"])
    if into_layer:
        _take_over(model, layer.node, norm.node, [add] if add else [])
    elif add is not None:
        set_constant(model, add, match.constant_at, offsets["added"], layer_params.bias_name(layer))
        _take_over(model, add, norm.node, [])
    elif offsets["added"].any():
        _become_add(model, norm.node, offsets["added"], layer_params.bias_name(layer))
        what += ", its node became an Add"
    else:
        _take_over(model, layer.node, norm.node, [])
    layer_params.set_weight(model, layer, weight)
    return what


def _match(model: Model, norm: BatchNorm, rank: Rank) -> _Match | Refusal | None:
    between = [norm.node.inputs[0]]
    node, add, constant, constant_at = producer(between[0]), None, None, 0
    if is_op(node, "Add"):
        values = [constant_value(model, t) for t in node.inputs]
        if (values[0] is None) == (values[1] is None):
            return None
        add, constant_at = node, int(values[1] is not None)
        constant = np.asarray(values[constant_at], np.float64)
        between.append(add.inputs[1 - constant_at])
        node = producer(between[1])
    if not is_op(node, *LINEAR_OPS):
        return None
    label = node_label(norm.node)
    for tensor in between:  # rule 8
        if is_output(model, tensor):
            rule = f"its input {tensor.name!r} is a graph output, too"
            return Refusal(label, rule, "remove it from the graph's outputs")
        if len(tensor.outputs) > 1:
            readers = reader_names(tensor, norm.node, add)
            return Refusal(label, f"its input {tensor.name!r} has other consumers: {readers}")
    layer = as_linear(model, node, rank)
    if isinstance(layer, Refusal):
        return Refusal(label, layer.rule, layer.remedy)
    if constant is not None and not layer.fits(constant):
        shape = list(constant.shape)
        rule = f"Add {node_label(add)!r} before it broadcasts over the channels, shape {shape}"
        return Refusal(label, rule)
    if layer.outputs != norm.channels:  # rule 9
        rule = f"it has {norm.channels} channels, {node.op} {node_label(node)!r} has {layer.outputs}"
        return Refusal(label, rule, "correct the parameters' lengths")
    return _Match(layer, add, constant_at, constant)


def _take_over(model: Model, last: gs.Node, norm: gs.Node, unneeded: list[gs.Node]) -> None:
    """Make `last` produce the BatchNorm's output, and remove the BatchNorm."""
    output = norm.outputs[0]
    norm.outputs.clear()
    last.outputs[0] = output
    remove_nodes(model, [norm, *unneeded])


def _become_add(model: Model, norm: gs.Node, offset: np.ndarray, base: str) -> None:
    """Turn the BatchNorm node into an Add of a constant, in its place."""
    data, *parameters = list(norm.inputs)
    while len(norm.outputs) > 1:
        norm.outputs.pop()
    norm.op = "Add"
    norm.attrs.clear()
    norm.inputs.clear()
    norm.inputs.append(data)
    set_constant(model, norm, 1, offset, base)
    remove_unread(model, parameters)
    model.touch()
