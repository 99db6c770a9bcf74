"""Apply scales to weights, biases, constants, bounds and the record, and add Mul nodes. See `equalize`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Change, Refusal
from onnxcompress.graph import layer_params
from onnxcompress.graph.channel_groups.groups import Bounds, ChannelGroups, LabelledLayer, Labels, Offset
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.edit import remove_unread, set_constant, unique_name
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.graph.query import node_label
from onnxcompress.model import Model
from onnxcompress.passes.equalize.scales import Balance
from onnxcompress.statistics.record import read_record, write_record


@dataclass(frozen=True)
class NewValues:
    """The new values of one layer, or of one operator with a constant operand."""

    layer: LabelledLayer | None
    offset: Offset | None
    weight: np.ndarray
    """The new weight, or the new constant."""
    bias: np.ndarray | None
    """The new bias in a shape that broadcasts onto the output; None: it stays."""


def scaled_weight(linear: Linear, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Multiply the rows of a weight and divide its columns.

    Args:
        linear: The layer.
        rows: Factor of each output channel, (output channels,).
        columns: Divisor of each input channel, (input channels,).

    Returns:
        The new weight in the layout of the stored one, float64.
    """
    weight = linear.weight.astype(np.float64)
    view = linear.view(weight)
    view *= rows.reshape(linear.groups, -1, 1, 1)
    view /= columns.reshape(linear.groups, 1, -1, 1)
    return weight


def new_values(
    model: Model, groups: ChannelGroups, balance: Balance, scales: np.ndarray
) -> tuple[list[NewValues], dict[int, Refusal]]:
    """Compute the new values of everything that the scales change.

    Args:
        model: The model; it is not changed.
        groups: Its channel groups.
        balance: The scales of its layers.
        scales: Log of the scale of each channel group, (groups,); 0 where none is shared.

    Returns:
        The new values, and channel group -> refusal where a value does not fit its type.
    """
    values: list[NewValues] = []
    unscalable: dict[int, Refusal] = {}
    for at, layer in enumerate(groups.layers):
        rows, columns = balance.writes(at), balance.reads(at)
        if not rows.any() and not columns.any():
            continue
        linear = layer.linear
        weight = layer_params.stored(scaled_weight(linear, np.exp(rows), np.exp(columns)), linear)
        bias = layer_params.bias(model, linear) if rows.any() else None
        if bias is not None:
            bias = layer_params.stored(bias * linear.spread(np.exp(rows)), linear)
        values.append(NewValues(layer, None, weight, bias))
        if not _holds(linear.weight, weight) or (bias is not None and not np.isfinite(bias).all()):
            refusal = _overflow(linear.node, weight)
            moved = [layer.writes[rows != 0], layer.reads[columns != 0]]
            unscalable |= dict.fromkeys(np.concatenate(moved).tolist(), refusal)
    for offset in groups.offsets:
        if scales[offset.labels].any():
            old = constant_value(model, offset.node.inputs[offset.operand])
            assert old is not None
            new = _scaled_constant(old, scales[offset.labels])
            values.append(NewValues(None, offset, new, None))
            if not np.isfinite(new).all():
                refusal = _overflow(offset.node, new)
                unscalable |= dict.fromkeys(np.unique(offset.labels).tolist(), refusal)
    return values, unscalable


def _holds(old: np.ndarray, new: np.ndarray) -> bool:
    """Return whether no value overflowed, and none but the tiniest lost digits."""
    tiny = np.finfo(new.dtype).tiny
    lost = (np.abs(new) < tiny) & (np.abs(old) > tiny / np.finfo(new.dtype).eps)
    return bool(np.isfinite(new).all() and not lost.any())


def _overflow(node: gs.Node, values: np.ndarray) -> Refusal:
    rule = f"({node.op}) would have values out of the range of {values.dtype.name}"
    return Refusal(node_label(node), rule)


def _scaled_constant(old: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Multiply a constant by the scales (log) of its channels, in the smallest shape that broadcasts."""
    with np.errstate(over="ignore"):
        new = np.asarray(old.astype(np.float64) * np.exp(scales)).astype(old.dtype)
    if new.size == old.size:
        return new.reshape(old.shape)
    return new[0] if new.shape[0] == 1 else new


def write_values(model: Model, values: list[NewValues]) -> None:
    """Write the new weights, biases and constants into the graph.

    Args:
        model: The model to change.
        values: The new values, as from `new_values`.
    """
    for new in values:
        if new.layer is not None:
            linear = new.layer.linear
            if new.bias is not None and linear.takes_bias:
                layer_params.set_bias(model, linear, new.bias)
            set_constant(
                model, linear.node, linear.weight_at, new.weight, f"{linear.weight_name}_equalized"
            )
        elif new.offset is not None:
            node, index = new.offset.node, new.offset.operand
            name = node.inputs[index].name
            set_constant(model, node, index, new.weight, f"{name}_equalized")
    model.touch()


def write_bounds(model: Model, bounds: list[Bounds], scales: np.ndarray) -> list[Change]:
    """Replace each Clip whose channels are scaled by Relu or Max, and Min, with one bound per channel.

    Args:
        model: The model to change.
        bounds: Its Clip nodes whose channels may be scaled.
        scales: Log of the scale of each channel group, (groups,).

    Returns:
        The changes.
    """
    changes = []
    for clip in bounds:
        if not scales[clip.labels].any():
            continue
        node = clip.node
        values = (None if t.is_empty() else constant_value(model, t) for t in node.inputs[1:])
        kinds = [t.dtype for t in node.inputs] + [v.dtype for v in values if v is not None]
        dtype = next((kind for kind in kinds if kind is not None), np.dtype(np.float32))
        factor = np.exp(scales[clip.labels])[0]
        parts = [("Max", clip.low), ("Min", clip.high)]
        steps = [(op, (bound * factor).astype(dtype)) for op, bound in parts if np.isfinite(bound)]
        what = f"Clip replaced by {_become(model, node, steps)} with a bound for each channel"
        changes.append(Change(node_label(node), what))
    return changes


def _become(model: Model, node: gs.Node, steps: list[tuple[str, np.ndarray]]) -> str:
    """Turn a Clip into these operators in a chain, the last of which produces the Clip's output."""
    output, name = node.outputs[0], node.name
    parameters = [node.inputs.pop() for _ in node.inputs[1:]]
    node.attrs.clear()
    ops = []
    place = next(i for i, n in enumerate(model.graph.nodes) if n is node)
    current = node
    for at, (op, bound) in enumerate(steps):
        if at:
            inner = gs.Variable(unique_name(model, f"{output.name}_low"), output.dtype, output.shape)
            current.outputs[0] = inner
            current = gs.Node(op, f"{name}_{op.lower()}" if name else "", inputs=[inner], outputs=[output])
            model.graph.nodes.insert(place + at, current)
        current.op = "Relu" if op == "Max" and not bound.any() else op
        ops.append(current.op)
        if current.op == "Relu":
            continue
        base = f"{output.name}_{'low' if op == 'Max' else 'high'}"
        current.inputs.append(gs.Constant(unique_name(model, base), bound))
    remove_unread(model, [t for t in parameters if not t.is_empty()])
    model.touch()
    return " and ".join(ops)


def write_products(model: Model, groups: ChannelGroups, balance: Balance) -> list[Change]:
    """Add a Mul after or before each layer whose own scales do not cancel with those of its neighbours.

    Args:
        model: The model to change.
        groups: Its channel groups.
        balance: The scales of its layers.

    Returns:
        The changes.
    """
    changes = []
    for at, layer in enumerate(groups.layers):
        node = layer.linear.node
        rows = np.where(balance.per_layer_scale[layer.writes], -balance.writes(at), 0.0)
        columns = np.where(balance.per_layer_scale[layer.reads], balance.reads(at), 0.0)
        if rows.any():
            output = node.outputs[0]
            inner = gs.Variable(unique_name(model, f"{output.name}_scaled"), output.dtype, output.shape)
            node.outputs[0] = inner
            _insert(model, layer.linear, inner, output, rows, behind=True)
            changes.append(Change(node_label(node), f"a Mul behind the {node.op} undoes its scales"))
        if columns.any():
            data_at = layer.linear.data_at
            source = node.inputs[data_at]
            inner = gs.Variable(unique_name(model, f"{source.name}_scaled"), source.dtype, source.shape)
            node.inputs[data_at] = inner
            _insert(model, layer.linear, source, inner, columns, behind=False)
            changes.append(Change(node_label(node), f"a Mul before the {node.op} undoes its scales"))
    return changes


def _insert(
    model: Model, linear: Linear, source: gs.Tensor, target: gs.Tensor, scales: np.ndarray, *, behind: bool
) -> None:
    """Insert a Mul by exp(scales) from source to target, next to the layer's node."""
    node = linear.node
    values = linear.spread(np.exp(scales)).astype(linear.weight.dtype)
    constant = gs.Constant(unique_name(model, f"{target.name}_scale"), values)
    name = f"{node.name}_{'unscale' if behind else 'scale'}" if node.name else ""
    new = gs.Node("Mul", name, inputs=[source, constant], outputs=[target])
    place = next(i for i, n in enumerate(model.graph.nodes) if n is node)
    model.graph.nodes.insert(place + int(behind), new)
    model.touch()


def write_statistics(model: Model, groups: ChannelGroups, scales: np.ndarray) -> int:
    """Multiply the recorded statistics by the scales of their channels.

    Args:
        model: The model to change.
        groups: Its channel groups.
        scales: Log of the scale of each channel group, (groups,).

    Returns:
        The number of tensors whose statistics changed or, where scales vary within a channel, were removed.
    """
    record = read_record(model)
    changed = 0
    for name, known in list(record.items()):
        labels = groups.tensors.get(name)
        if labels is None or not scales[labels].any():
            continue
        factor = _per_channel(np.exp(scales[labels]), len(known.mean))
        changed += 1
        if factor is None:
            del record[name]
            continue
        record[name] = known.scaled(factor)
    if changed:
        write_record(model, record)
    return changed


def _per_channel(factor: Labels, channels: int) -> np.ndarray | None:
    """Reduce factors to one number per channel of axis 1; None where they vary over other axes."""
    first = factor.reshape(*factor.shape[:2], -1)[0, :, :1]
    if (factor.reshape(*factor.shape[:2], -1)[0] != first).any() or len(first) not in (1, channels):
        return None
    return np.broadcast_to(first[:, 0], (channels,))
