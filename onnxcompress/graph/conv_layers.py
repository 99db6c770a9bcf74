"""The 2-d convolutions whose parameters nothing else reads, and the residual stream between them.

`writers` and `readers` walk the graph themselves: channel groups (`graph.channel_groups`) have no
direction, while an adapter goes in front of a dropped block or behind it; and groups go on through pools
and gates, where the residual stream ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxcompress.graph.linear_layer import BIAS_AT, Linear, as_linear
from onnxcompress.graph.query import attribute, auto_pad, consumers, input_at, is_op, producer
from onnxcompress.model import Model


@dataclass(frozen=True)
class ConvGeometry:
    """Which elements of its input a 2-d convolution reads. Rows come first, then columns."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]
    """Top, left, bottom, right."""


def conv_geometry(node: gs.Node | None) -> ConvGeometry | None:
    """Read the geometry of a 2-d convolution whose parameters are initializers that nothing else reads.

    Args:
        node: A node, or None.

    Returns:
        The geometry; None where the node is not such a convolution or uses auto_pad.
    """
    if node is None or not is_op(node, "Conv") or auto_pad(node) != "NOTSET":
        return None
    weight = node.inputs[1]
    for tensor in (weight, input_at(node, BIAS_AT)):
        if tensor is not None and (not isinstance(tensor, gs.Constant) or len(tensor.outputs) != 1):
            return None
    if len(weight.shape) != 4:
        return None
    return ConvGeometry(
        kernel=(weight.shape[2], weight.shape[3]),
        strides=tuple(attribute(node, "strides", (1, 1))),
        dilations=tuple(attribute(node, "dilations", (1, 1))),
        pads=tuple(attribute(node, "pads", (0, 0, 0, 0))),
    )


def conv_layers(model: Model, nodes: Iterable[gs.Node] | None = None) -> dict[str, Linear]:
    """List the 2-d convolutions whose parameters are initializers that nothing else reads.

    Args:
        model: The model.
        nodes: Where to look; all nodes of the main graph by default.

    Returns:
        Layers by name of their output tensor.
    """
    layers = (conv_layer(model, node) for node in (model.graph.nodes if nodes is None else nodes))
    return {layer.output_name: layer for layer in layers if layer is not None}


def conv_layer(model: Model, node: gs.Node | None) -> Linear | None:
    """Read a node as a 2-d convolution with parameters of its own.

    Args:
        model: The model.
        node: A node, or None.

    Returns:
        The layer; None where `conv_geometry` is None.
    """
    if node is None or conv_geometry(node) is None:
        return None
    layer = as_linear(model, node, lambda tensor: None)
    return layer if isinstance(layer, Linear) else None


STREAM = ("Add", "Sum", "Relu", "Clip", "LeakyRelu", "BatchNormalization", "Identity", "Dropout")
"""Operators of a residual stream that keep channels in place."""


def writers(model: Model, tensor: gs.Tensor) -> list[Linear]:
    """Find the dense convolutions that write to the residual stream of a tensor.

    Walks back through additions and activations. The adapters before a dropped block are placed
    after these layers (PRACTISE, arXiv 2202.07861, §3.1).

    Args:
        model: The model.
        tensor: A tensor of the residual stream.

    Returns:
        The layers.
    """
    found: dict[str, Linear] = {}
    seen: set[int] = set()
    pending = [tensor]
    while pending:
        node = producer(pending.pop())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if is_op(node, *STREAM):
            pending.extend(t for t in node.inputs if not isinstance(t, gs.Constant))
        elif (layer := conv_layer(model, node)) is not None and layer.groups == 1:
            found[layer.output_name] = layer
    return list(found.values())


def readers(model: Model, tensor: gs.Tensor) -> list[Linear]:
    """Find the dense convolutions that read the residual stream from a tensor on.

    Args:
        model: The model.
        tensor: A tensor of the residual stream.

    Returns:
        The layers, nearest first.
    """
    found: dict[str, Linear] = {}
    seen: set[int] = set()
    pending = [tensor]
    while pending:
        current = pending.pop(0)
        for node in consumers(current):
            if id(node) in seen:
                continue
            seen.add(id(node))
            if is_op(node, *STREAM):
                pending.extend(t for t in node.outputs if not t.is_empty())
            elif (layer := conv_layer(model, node)) is not None and layer.groups == 1:
                found[layer.output_name] = layer
    return list(found.values())
