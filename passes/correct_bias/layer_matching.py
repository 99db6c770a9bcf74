"""Match the layers of a reference with those of a model made from it (their twins). See `correct_bias`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph import layer_params
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.edit import set_constant
from onnxcompress.graph.linear_layer import BIAS_AT, LINEAR_OPS, Linear, as_linear, chain, stored_value
from onnxcompress.graph.query import (
    attribute,
    input_at,
    is_op,
    node_label,
    only_consumer,
    per_channel,
    producer,
    value_readers,
)
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model
from onnxcompress.passes.correct_bias.reference import scaled_apart, statistics_differ
from onnxcompress.statistics.record import known_statistics

LARGEST_CHANGE = 1.0
"""Largest change of a layer's weights, relative to their norm (rule 2)."""
APART = "give as --reference the model after it was equalized; quantize with --no-stretch scales nothing"


@dataclass(frozen=True)
class Pair:
    """A layer of the reference, and its twin in the model."""

    layer: Linear
    twin: gs.Node
    weight: np.ndarray
    """The twin's weight, in the layout of the reference's, float64."""
    quantized: bool
    """Whether the twin's weight is dequantized."""


def pairs_of(reference: Model, model: Model) -> tuple[list[Pair], list[Refusal]]:
    """Match the layers whose weights changed (rules 1 and 2).

    Args:
        reference: The model before its weights were changed.
        model: The model that was made from it.

    Returns:
        The pairs, and the layers that have no twin, with the reasons.
    """
    shapes = tensor_shapes(reference)
    known, own = known_statistics(reference), known_statistics(model)
    twins = {t.name: node for node in model.graph.nodes for t in node.outputs}
    names = {node.name: node for node in model.graph.nodes if node.name}
    pairs, refusals = [], []
    for node in reference.graph.nodes:
        if not is_op(node, *LINEAR_OPS):
            continue
        layer = as_linear(reference, node, lambda t: len(shapes[t.name]) if t.name in shapes else None)
        if isinstance(layer, Refusal):
            continue
        twin = twins.get(node.outputs[0].name)
        if twin is None or twin.op != node.op:  # onnxruntime removes a Relu, and its output's name moves
            twin = names.get(node.name)
        pair = _pair(layer, twin, model)
        name = layer.output_name
        if isinstance(pair, Pair) and (
            statistics_differ(known.get(name), own.get(name)) or scaled_apart(layer, pair.weight)
        ):
            pair = Refusal(
                node_label(node), "its channels are scaled or shifted against the reference's", APART
            )
        if isinstance(pair, Refusal):
            refusals.append(pair)
        elif pair is not None:
            pairs.append(pair)
    return pairs, refusals


def _pair(layer: Linear, twin: gs.Node | None, model: Model) -> Pair | Refusal | None:
    label = layer.label
    remedy = "is --reference the model that this one was made from?"
    if twin is None or twin.op != layer.node.op:
        return Refusal(label, f"no {layer.node.op} of the model makes {layer.output_name!r}", remedy)
    weight, quantized = _twin_weight(model, twin.inputs[layer.weight_at])
    if weight is None:
        return Refusal(label, "the model's weight for it is no constant of one scale per tensor or channel")
    if weight.shape != layer.weight.shape:
        found, wanted = list(weight.shape), list(layer.weight.shape)
        return Refusal(label, f"the model's weight has shape {found}, the reference's {wanted}", remedy)
    if np.array_equal(weight, layer.weight.astype(np.float64)):
        return None
    change = float(np.linalg.norm(weight - layer.weight.astype(np.float64)))  # 0 below 1e-162
    if change > LARGEST_CHANGE * float(np.linalg.norm(layer.weight.astype(np.float64))):
        return Refusal(label, "its weights differ by more than their size", remedy)
    return Pair(layer, twin, weight, quantized)


def _twin_weight(model: Model, tensor: gs.Tensor) -> tuple[np.ndarray | None, bool]:
    """Return the value of a weight, float64, and whether it is dequantized; None: it is not known."""
    value = stored_value(tensor)
    if value is not None:
        return value.astype(np.float64), False
    *copies, root = chain(tensor)
    node = producer(root)
    if not is_op(node, "DequantizeLinear"):
        return None, False
    value = dequantized(model, node)
    for copy in reversed(copies):
        maker = producer(copy)
        if value is not None and is_op(maker, "Transpose"):
            value = value.transpose(attribute(maker, "perm"))
    return value, True


def dequantized(model: Model, node: gs.Node) -> np.ndarray | None:
    """Compute what a DequantizeLinear of constants gives.

    Args:
        model: The model.
        node: The node.

    Returns:
        The values, float64; None where they are not constant, or scaled block by block.
    """
    numbers, scale = (constant_value(model, tensor) for tensor in node.inputs[:2])
    zero = input_at(node, 2)
    offset = np.zeros(()) if zero is None else constant_value(model, zero)
    if numbers is None or scale is None or offset is None or scale.ndim > 1:
        return None
    axis = attribute(node, "axis", 1) % max(numbers.ndim, 1)
    spread = (-1,) + (1,) * (numbers.ndim - axis - 1)
    scale, offset = (v.astype(np.float64).reshape(spread if v.size > 1 else ()) for v in (scale, offset))
    return np.asarray((numbers.astype(np.float64) - offset) * scale)


def write_bias(reference: Model, model: Model, pair: Pair, shift: np.ndarray) -> bool | Refusal:
    """Set the twin's bias to the reference's less a shift (rules 3 and 5).

    Args:
        reference: The model before its weights were changed.
        model: The model, changed in place.
        pair: The layer and its twin.
        shift: What to subtract, (outputs,), float64.

    Returns:
        Whether that changed the bias, or why it stays.
    """
    label = node_label(pair.twin)
    if not pair.layer.takes_bias:
        return _write_add(reference, model, pair, shift)
    old = layer_params.bias(reference, pair.layer)
    if old is None:
        return Refusal(label, "the reference's bias is not a constant", "make it an initializer")
    wanted = old - pair.layer.spread(shift)
    bias = input_at(pair.twin, BIAS_AT)
    maker = None if bias is None else producer(bias)
    if is_op(maker, "DequantizeLinear"):
        return _write_integers(model, pair, maker, wanted)
    if bias is None and pair.quantized and is_op(producer(pair.twin.inputs[0]), "DequantizeLinear"):
        return Refusal(label, "it has no bias to correct", "quantize it with a bias")
    twin = Linear(pair.twin, pair.weight.astype(pair.layer.weight.dtype), 1, pair.layer.rank)
    found = layer_params.bias(model, twin)
    if found is None:
        return layer_params.computed_bias(twin, label)
    new = layer_params.stored(wanted, twin)
    if not np.isfinite(new).all():
        return _too_large(label, new)
    if np.array_equal(np.broadcast_to(layer_params.stored(found, twin), new.shape), new):
        return False
    layer_params.set_bias(model, twin, new)
    return True


def _write_integers(model: Model, pair: Pair, maker: gs.Node, wanted: np.ndarray) -> bool | Refusal:
    """Set an int32 bias behind a DequantizeLinear."""
    label = node_label(pair.twin)
    old, scale = (constant_value(model, tensor) for tensor in maker.inputs[:2])
    if (
        scale is None
        or old is None
        or dequantized(model, maker) is None
        or attribute(pair.twin, "beta", 1.0) != 1
    ):
        return Refusal(label, "its bias is no constant of one scale per tensor or channel")
    if len(value_readers(maker.outputs[0])) > 1:
        return Refusal(label, "another node reads its bias", "give each node its own copy")
    zero = input_at(maker, 2)
    offset = 0 if zero is None else constant_value(model, zero)
    values = np.rint(np.broadcast_to(wanted.reshape(-1), old.shape) / scale.astype(np.float64))
    info = np.iinfo(old.dtype)
    values += np.asarray(offset, np.float64)
    if (values < info.min).any() or (values > info.max).any():
        return _too_large(label, old)
    new = values.astype(old.dtype)
    if np.array_equal(old, new):
        return False
    set_constant(model, maker, 0, new, f"{maker.inputs[0].name}_corrected")
    return True


def _write_add(reference: Model, model: Model, pair: Pair, shift: np.ndarray) -> bool | Refusal:
    """Set a MatMul's bias: the constant that an Add behind it adds."""
    label = node_label(pair.twin)
    there, here = (
        _add_behind(one, node) for one, node in ((reference, pair.layer.node), (model, pair.twin))
    )
    if there is None or here is None:
        return Refusal(label, "no Add of a constant follows the MatMul", "give it a bias")
    (_, _, old), (add, at, found) = there, here
    number = per_channel(old, pair.layer.rank, pair.layer.outputs)
    if number is None:
        return Refusal(label, f"the constant of shape {list(old.shape)} is not one number for each channel")
    with np.errstate(over="ignore"):
        new = pair.layer.spread(number - shift).astype(found.dtype)
    if not np.isfinite(new).all():
        return _too_large(label, new)
    if found.size == new.size and np.array_equal(found.reshape(-1), new.reshape(-1)):
        return False
    new = new.reshape(found.shape) if found.size == new.size else new
    set_constant(model, add, at, new, f"{add.inputs[at].name}_corrected")
    return True


def _add_behind(model: Model, node: gs.Node) -> tuple[gs.Node, int, np.ndarray] | None:
    """Return the Add that alone reads a node's output, which operand is its constant, and that constant."""
    add = only_consumer(model, node.outputs[0])
    if not is_op(add, "Add"):
        return None
    at = int(add.inputs[0] is node.outputs[0])
    value = stored_value(add.inputs[at])
    return None if value is None else (add, at, value)


def _too_large(label: str, values: np.ndarray) -> Refusal:
    return Refusal(label, f"the corrected bias does not fit {values.dtype.name}")
