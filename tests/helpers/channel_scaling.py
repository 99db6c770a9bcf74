"""Scale the channel groups of a model by random factors, as `ChannelGroup` says that they can be."""

from __future__ import annotations

import numpy as np

from onnxcompress.graph import layer_params
from onnxcompress.graph.channel_groups.groups import ChannelGroups, LabelledLayer
from onnxcompress.graph.channel_groups.tracer import find_channel_groups
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.edit import set_constant
from onnxcompress.model import Model


def scale_groups(model: Model, seed: int = 0) -> int:
    """Scale each channel that is not unscalable, in place; returns how many groups were scaled."""
    groups = find_channel_groups(model)
    rng = np.random.default_rng(seed)
    factor_of = np.ones(groups.count)
    rows = {id(layer): np.ones(layer.linear.outputs) for layer in groups.layers}
    columns = {id(layer): np.ones(layer.linear.inputs) for layer in groups.layers}
    free = [group for group in groups.groups() if group.unscalable is None]
    for group in free:
        factors = rng.uniform(0.25, 4, len(group.labels))
        factor_of[group.labels] = factors
        for member in group.members:
            side = rows if member.side == "outputs" else columns
            side[id(member.layer)][member.channels] = factors[:, None]
    for layer in groups.layers:
        _scale_layer(model, layer, rows[id(layer)], columns[id(layer)])
    _scale_constants(model, groups, factor_of)
    model.touch()
    return len(free)


def _scale_layer(model: Model, layer: LabelledLayer, rows: np.ndarray, columns: np.ndarray) -> None:
    linear = layer.linear
    if (rows == 1).all() and (columns == 1).all():
        return
    weight = linear.weight.astype(np.float64)
    view = linear.view(weight)
    view *= rows.reshape(linear.groups, -1, 1, 1)
    view /= columns.reshape(linear.groups, 1, -1, 1)
    bias = layer_params.bias(model, linear)
    assert bias is not None
    if linear.takes_bias:
        layer_params.set_bias(model, linear, layer_params.stored(bias * linear.spread(rows), linear))
    layer_params.set_weight(model, linear, layer_params.stored(weight, linear))


def _scale_constants(model: Model, groups: ChannelGroups, factor_of: np.ndarray) -> None:
    for offset in groups.offsets:
        factors = factor_of[offset.labels]
        if (factors != 1).any():
            old = constant_value(model, offset.node.inputs[offset.operand])
            assert old is not None
            set_constant(model, offset.node, offset.operand, (old * factors).astype(old.dtype), "scaled")
