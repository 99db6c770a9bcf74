"""The convolutions of a graph as the optimizer sees them: names of tensors and parameters, and geometry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxcompress.graph.query import consumers, input_at, is_op, is_output, producer
from onnxcompress.model import Model


@dataclass(frozen=True)
class ConvLayer:
    """A 2-d convolution with a constant weight of its own. Names are those of ONNX tensors."""

    node: str
    """Name of its output tensor: unique, unlike node names."""
    input: str
    weight: str
    """Shape (outputs, inputs / groups, height, width)."""
    bias: str | None
    """Shape (outputs,); None: it has none."""
    groups: int
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]
    """Top, left, bottom, right."""
    outputs: int
    inputs: int
    kernel: tuple[int, int]


def conv_layers(model: Model, nodes: Iterable[gs.Node] | None = None) -> dict[str, ConvLayer]:
    """List the 2-d convolutions whose weight is an initializer that nothing else reads.

    Args:
        model: The model.
        nodes: Where to look; all nodes of the main graph by default.

    Returns:
        Layers by name of their output tensor.
    """
    found = (conv_layer(model, node) for node in (model.graph.nodes if nodes is None else nodes))
    return {layer.node: layer for layer in found if layer is not None}


def conv_layer(model: Model, node: gs.Node | None) -> ConvLayer | None:
    """Describe a node as a 2-d convolution.

    Args:
        model: The model.
        node: A node, or None.

    Returns:
        The layer; None where the node is not a 2-d convolution, shares a parameter or uses auto_pad.
    """
    if node is None or not is_op(node, "Conv") or node.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        return None
    weight, bias = node.inputs[1], input_at(node, 2)
    for tensor in (weight, bias):
        if tensor is not None and (not isinstance(tensor, gs.Constant) or len(tensor.outputs) != 1):
            return None
    if len(weight.shape) != 4:
        return None
    groups = int(node.attrs.get("group", 1))
    return ConvLayer(
        node=node.outputs[0].name,
        input=node.inputs[0].name,
        weight=weight.name,
        bias=None if bias is None else bias.name,
        groups=groups,
        strides=tuple(node.attrs.get("strides", (1, 1))),
        dilations=tuple(node.attrs.get("dilations", (1, 1))),
        pads=tuple(node.attrs.get("pads", (0, 0, 0, 0))),
        outputs=weight.shape[0],
        inputs=weight.shape[1] * groups,
        kernel=(weight.shape[2], weight.shape[3]),
    )


STREAM = ("Add", "Sum", "Relu", "Clip", "LeakyRelu", "BatchNormalization", "Identity", "Dropout")
"""Operators of a residual stream that keep channels in place."""


def writers(model: Model, tensor: gs.Tensor) -> list[ConvLayer]:
    """Find the dense convolutions that write to the residual stream of a tensor.

    Walks back through additions and activations. The adapters before a dropped block are placed
    after these layers (PRACTISE, arXiv 2202.07861, §3.1).

    Args:
        model: The model.
        tensor: A tensor of the residual stream.

    Returns:
        The layers.
    """
    found: dict[str, ConvLayer] = {}
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
            found[layer.node] = layer
    return list(found.values())


def readers(model: Model, tensor: gs.Tensor) -> list[ConvLayer]:
    """Find the dense convolutions that read the residual stream from a tensor on.

    Args:
        model: The model.
        tensor: A tensor of the residual stream.

    Returns:
        The layers, nearest first.
    """
    found: dict[str, ConvLayer] = {}
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
                found[layer.node] = layer
    return list(found.values())


def only_add_after(model: Model, layer: ConvLayer) -> tuple[str, str] | None:
    """Find the residual addition that alone reads a layer's output.

    Args:
        model: The model.
        layer: The layer.

    Returns:
        Names of the Add's output and of its other input; None where anything else reads the layer's output.
    """
    tensor = model.graph.tensors()[layer.node]
    after = consumers(tensor)
    if len(after) != 1 or is_output(model, tensor) or not is_op(after[0], "Add"):
        return None
    others = [t.name for t in after[0].inputs if t is not tensor]
    return (after[0].outputs[0].name, others[0]) if len(others) == 1 else None
