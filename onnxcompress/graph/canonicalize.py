"""Bring the graph into the form that layer-wise passes need, by rewrites that preserve the outputs.

1. Weights in Constant nodes become initializers.
2. A zero Pad that only convolutions read becomes their `pads`:
       Conv(Pad(x, p), pads q) = Conv(x, pads p + q)
   An integer kernel pads with the zero point, which stands for 0 exactly. Pads of some axes become those
   of all first: onnxruntime's optimizer (1.31) cannot move a Pad with axes across a Transpose.
3. A Reshape to (batch, everything else) whose shape is computed from its own input gets the constant
   shape [0, n]: otherwise that computation reads the float tensor, which prevents fusing its producer.
4. Every layer that can have a bias gets one, so that it can be corrected.
5. Bounds written as Max and Min become a Clip (`graph.bounds`).
6. Hard sigmoids and HardSwish written out become what they are (`graph.hard_sigmoid`).
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Change
from onnxcompress.formatting import counted
from onnxcompress.graph import layer_params
from onnxcompress.graph.bounds import fuse_bounds
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.edit import lift_weights, remove_unread, set_input, unique_name
from onnxcompress.graph.hard_sigmoid import fuse_hard_sigmoids
from onnxcompress.graph.linear_layer import BIAS_AT, LINEAR_OPS, Linear, as_linear
from onnxcompress.graph.query import attribute, auto_pad, input_at, is_op, is_output, value_readers
from onnxcompress.graph.shape_inference import infer, tensor_shapes
from onnxcompress.model import Model


def canonicalize(model: Model) -> list[Change]:
    """Rewrite the graph in place; the outputs stay the same.

    Args:
        model: The model, its BatchNorms folded as far as possible: they hide Pads and biases.

    Returns:
        What changed, for the account of a pass.
    """
    changes = []
    lift_weights(model, *LINEAR_OPS)
    for node in list(model.graph.nodes):
        if is_op(node, "Pad"):
            _pad_all_axes(model, node)
    padded = sum(_fold_pad(model, node) for node in list(model.graph.nodes) if is_op(node, "Pad"))
    if padded:
        changes.append(Change(model.name, f"{counted(padded, 'Pad')} folded into convolutions"))
    if bounds := fuse_bounds(model):
        changes.append(
            Change(model.name, f"{counted(bounds, 'bound')} written as Max and Min became Relu and Clip")
        )
    if gates := fuse_hard_sigmoids(model):
        changes.append(
            Change(model.name, f"{counted(gates, 'hard sigmoid')} written out became HardSigmoid")
        )
    shapes = infer(model, {}).shapes  # the written graph must not depend on sizes that are only assumed
    for node in list(model.graph.nodes):
        if is_op(node, "Reshape"):
            _fix_reshape(model, node, shapes)
    ranks = {name: len(shape) for name, shape in shapes.items()}
    for node in list(model.graph.nodes):
        if is_op(node, *LINEAR_OPS):
            linear = as_linear(model, node, lambda t: ranks.get(t.name))
            if isinstance(linear, Linear):
                _own_parameters(model, linear)
    model.touch()
    return changes


def _pad_all_axes(model: Model, node: gs.Node) -> None:
    """Give a Pad of some axes the pads of all axes (rule 2), where its constants are known."""
    shape, given = tensor_shapes(model).get(node.inputs[0].name), input_at(node, 3)
    if given is None or shape is None:
        return
    axes, pads = constant_value(model, given), constant_value(model, node.inputs[1])
    if axes is None or pads is None:
        return
    whole = np.zeros((2, len(shape)), np.int64)
    whole[:, axes.reshape(-1)] = pads.reshape(2, -1)
    name = unique_name(model, f"{node.outputs[0].name}_pads")
    before, node.inputs[1] = node.inputs[1], gs.Constant(name, whole.reshape(-1))
    del node.inputs[3]
    remove_unread(model, [before, given])


def _fold_pad(model: Model, node: gs.Node) -> bool:
    """Fold a zero Pad into the convolutions that read it (rule 2); return whether it was possible."""
    tensor = node.outputs[0]
    readers = value_readers(tensor)
    pads = None if input_at(node, 1) is None else constant_value(model, node.inputs[1])
    value = input_at(node, 2)
    filled = 0 if value is None else constant_value(model, value)
    plain = all(is_op(r, "Conv") and auto_pad(r) == "NOTSET" for r in readers)
    if (
        pads is None
        or filled is None
        or np.any(filled)
        or attribute(node, "mode", "constant") != "constant"
        or input_at(node, 3) is not None
        or not readers
        or not plain
        or len(readers) != len(tensor.outputs)
        or is_output(model, tensor)
        or any(r.inputs[0] is not tensor or model.in_body(r) for r in readers)
    ):
        return False
    rank = pads.size // 2
    ends = [int(p) for p in pads.reshape(-1)]
    if any(ends[:2]) or any(ends[rank : rank + 2]) or min(ends) < 0:
        return False
    own = ends[2:rank] + ends[rank + 2 :]
    for reader in readers:
        before = attribute(reader, "pads", [0] * len(own))
        reader.attrs["pads"] = [int(a) + b for a, b in zip(before, own, strict=True)]
        reader.inputs[0] = node.inputs[0]
    remove_unread(model, [tensor])
    return True


def _fix_reshape(model: Model, node: gs.Node, shapes: dict[str, tuple[int | str | None, ...]]) -> None:
    """Give a Reshape to two axes a constant shape (rule 3)."""
    before, after = shapes.get(node.inputs[0].name), shapes.get(node.outputs[0].name)
    if before is None or after is None or constant_value(model, node.inputs[1]) is not None:
        return
    inner = [d for d in before[1:] if isinstance(d, int)]
    kept = len(after) == 2 and before[0] is not None and after[0] == before[0]
    if len(inner) != len(before) - 1 or not (kept or list(after[1:]) == [math.prod(inner)]):
        return
    old = node.inputs[1]
    name = unique_name(model, f"{node.outputs[0].name}_shape")
    node.inputs[1] = gs.Constant(name, np.array([0, math.prod(inner)], np.int64))
    node.attrs.pop("allowzero", None)
    remove_unread(model, [old])


def _own_parameters(model: Model, linear: Linear) -> None:
    """Give a layer a bias (rule 4), and an initializer as weight behind Identity, Cast or Transpose."""
    node = linear.node
    if not isinstance(node.inputs[linear.weight_at], gs.Constant):
        layer_params.set_weight(model, linear, linear.weight)
    if not linear.takes_bias:
        return
    bias, offset = input_at(node, BIAS_AT), layer_params.bias(model, linear)
    if offset is None or not linear.is_per_channel(offset):
        return
    plain = isinstance(bias, gs.Constant) and tuple(bias.shape) == (linear.outputs,)
    if bias is None or not plain or len(bias.outputs) > 1 or attribute(node, "beta", 1.0) != 1.0:
        value = layer_params.stored(np.broadcast_to(offset.reshape(-1), linear.outputs), linear)
        name = unique_name(model, layer_params.bias_name(linear))
        set_input(node, BIAS_AT, gs.Constant(name, value))
        node.attrs.pop("beta", None)
        if bias is not None:
            remove_unread(model, [bias])
