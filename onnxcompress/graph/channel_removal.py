"""Cut channels out of a network: weights, biases, parameters of each channel, sizes and positions.

Which channels go together is found beforehand (`channel_groups.cut_tracer`). What is left computes what the
whole network would with zeros in place of all weights that read the channels.

Does not handle: operator sets before 13, in which sizes are attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcompress.errors import ModelError
from onnxcompress.graph.channel_groups.cut_rules import COMBINES
from onnxcompress.graph.channel_groups.cut_tracer import CutGroups
from onnxcompress.graph.channel_groups.groups import LabelledLayer, Labels
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.edit import remove_unread, set_values, unique_name
from onnxcompress.graph.query import attribute, input_at, node_label, value_readers
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model

OLDEST_OPSET = 13


@dataclass(frozen=True)
class Kept:
    """The channels of a tensor that stay, where some of them go."""

    axis: int
    mask: np.ndarray
    """Bool, (channels before,)."""

    @property
    def index(self) -> np.ndarray:
        """Positions of the channels that stay, int64."""
        return np.flatnonzero(self.mask)


def kept_channels(tensors: Mapping[str, Labels], gone: Collection[int]) -> dict[str, Kept]:
    """Find the tensors that lose channels.

    Args:
        tensors: Labels of the tensors (`ChannelGroups.tensors`).
        gone: Labels of the channels that go.

    Returns:
        What stays of each tensor that loses some.
    """
    labels = np.fromiter(gone, np.int64, len(gone))
    kept = {}
    for name, own in tensors.items():
        mask = ~np.isin(own, labels)
        if not mask.all():
            axis = next(a for a in range(own.ndim) if (own != own.take([0], a)).any())
            others = tuple(a for a in range(own.ndim) if a != axis)
            kept[name] = Kept(axis, np.asarray(mask.all(axis=others)))
    return kept


def cut_channels(model: Model, groups: CutGroups, gone: Collection[int]) -> dict[str, Kept]:
    """Cut channels out of a model, in place.

    Args:
        model: The model, of operator set 13 or later.
        groups: Its channels, or those of a model that it is an unchanged copy of.
        gone: Labels of the channels that go, none of which is refused.

    Returns:
        What stays of each tensor that loses channels, by name.

    Raises:
        ModelError: A tensor would have another shape than what is left of it: the graph computes sizes in
            a way that is not handled.
    """
    if model.opset < OLDEST_OPSET:
        raise ModelError(f"{model.name}: channels are cut from operator set {OLDEST_OPSET} on")
    before = dict(tensor_shapes(model))
    kept = kept_channels(groups.channels.tensors, gone)
    _Cut(model, groups, kept, set(gone)).run()
    model.become(model.copy(lambda proto: _forget_shapes(proto, kept)))
    after = tensor_shapes(model)
    for name in before.keys() & after.keys() & groups.channels.tensors.keys():
        expected = list(before[name])
        if name in kept and expected:
            expected[kept[name].axis] = int(kept[name].mask.sum())
        for wanted, found in zip(expected, after[name], strict=True):
            if isinstance(wanted, int) and isinstance(found, int) and wanted != found:
                raise ModelError(
                    f"{model.name}: without the channels tensor {name!r} has shape {list(after[name])}, "
                    f"{expected} is left of it: the graph computes a size that is not handled"
                )
    return kept


def _forget_shapes(proto: onnx.ModelProto, kept: Mapping[str, Kept]) -> None:
    """Remove the shapes of cut tensors, and correct those that the file states of initializers."""
    sizes = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
    infos = [i for i in proto.graph.value_info if i.name not in kept and i.name not in sizes]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(infos)
    for info in proto.graph.input:
        for dim, size in zip(info.type.tensor_type.shape.dim, sizes.get(info.name, ()), strict=False):
            dim.dim_value = size


class _Cut:
    """The edits of one cut."""

    def __init__(self, model: Model, groups: CutGroups, kept: Mapping[str, Kept], gone: set[int]) -> None:
        self.model, self.kept, self.gone = model, kept, gone
        self.layers = {layer.linear.output_name: layer for layer in groups.channels.layers}
        self.tensors = groups.channels.tensors
        self._shared: dict[tuple[int, tuple[int, ...], bytes], tuple[gs.Tensor, gs.Constant]] = {}

    def run(self) -> None:
        """Edit all nodes."""
        nodes = [n for n in self.model.graph.nodes if any(t.name in self.kept for t in _tensors(n))]
        planned = [(node, self._plan(node)) for node in nodes]  # all values are read before one is changed
        for node, values in planned:
            for index, value in values.items():
                self._set(node, index, value)
        self.model.touch()

    def _plan(self, node: gs.Node) -> dict[int, np.ndarray]:
        """Compute new values for the inputs of a node, by position."""
        layer = self.layers.get(node.outputs[0].name)
        if layer is not None:
            return self._linear(node, layer)
        if node.op in COMBINES:
            return self._operands(node, self.kept[node.outputs[0].name])
        if node.op in ("BatchNormalization", "InstanceNormalization"):
            mask = self.kept[node.outputs[0].name].mask
            return {at: self._value(node, at)[mask] for at in range(1, len(node.inputs))}
        rule = _RULES.get(node.op)
        return {} if rule is None else rule(self, node)

    def _linear(self, node: gs.Node, layer: LabelledLayer) -> dict[int, np.ndarray]:
        linear = layer.linear
        gone = np.fromiter(self.gone, np.int64, len(self.gone))
        inputs, outputs = (~np.isin(labels, gone) for labels in (layer.reads, layer.writes))
        weight, count = linear.cut(inputs, outputs)
        values = {linear.weight_at: weight}
        if linear.groups > 1:
            node.attrs["group"] = count
        if linear.bias_name is not None and not outputs.all():
            if node.op == "Gemm":
                values |= self._operands(node, Kept(1, outputs), only=(2,))
            else:
                values[2] = self._value(node, 2)[outputs]
        return values

    def _operands(self, node: gs.Node, kept: Kept, only: tuple[int, ...] = ()) -> dict[int, np.ndarray]:
        """Cut the constants that vary over the channels of the output that they are combined to."""
        values = {}
        rank = max(self.tensors[node.outputs[0].name].ndim, 1)
        for at in only or range(len(node.inputs)):
            tensor = input_at(node, at)
            if tensor is None or tensor.name in self.tensors:
                continue
            if self._is_single(tensor, kept.axis - rank):
                continue  # it may be computed from shapes
            value = self._value(node, at)
            axis = kept.axis - (rank - value.ndim)
            if axis >= 0 and value.shape[axis] > 1:
                values[at] = value.compress(kept.mask, axis)
        return values

    def _concat(self, node: gs.Node) -> dict[int, np.ndarray]:
        values, start = {}, 0
        kept = self.kept[node.outputs[0].name]
        joined = attribute(node, "axis") % self.tensors[node.outputs[0].name].ndim
        for at, tensor in enumerate(node.inputs):
            if tensor.name in self.tensors:
                sizes = self._size(tensor, joined)
            else:
                value = self._value(node, at)
                sizes = value.shape[joined]
                part = kept.mask[start : start + sizes] if joined == kept.axis else kept.mask
                values[at] = value.compress(part, kept.axis)
            start += sizes
        return values

    def _split(self, node: gs.Node) -> dict[int, np.ndarray]:
        axis = attribute(node, "axis", 0) % self.tensors[node.inputs[0].name].ndim
        if self.kept[node.inputs[0].name].axis != axis:
            return {}
        node.attrs.pop("num_outputs", None)
        return {1: np.array([self._size(t, axis, after=True) for t in node.outputs], np.int64)}

    def _slice(self, node: gs.Node) -> dict[int, np.ndarray]:
        kept = self.kept[node.inputs[0].name]
        rank = self.tensors[node.inputs[0].name].ndim
        axes_input = input_at(node, 3)
        axes = None if axes_input is None else constant_value(self.model, axes_input)
        along = range(len(self._value(node, 1))) if axes is None else [int(a) % rank for a in axes.flat]
        if kept.axis not in along:
            return {}
        starts, ends = self._value(node, 1).copy(), self._value(node, 2).copy()
        at = along.index(kept.axis)
        first, last, _ = slice(int(starts[at]), int(ends[at])).indices(len(kept.mask))
        starts[at], ends[at] = kept.mask[:first].sum(), kept.mask[:last].sum()
        return {1: starts, 2: ends}

    def _gather(self, node: gs.Node) -> dict[int, np.ndarray]:
        kept = self.kept[node.inputs[0].name]
        axis = attribute(node, "axis", 0) % self.tensors[node.inputs[0].name].ndim
        if kept.axis != axis:
            return {}
        index = np.asarray(self._value(node, 1) % len(kept.mask))
        stays = index[kept.mask[index]] if index.ndim == 1 else index
        return {1: np.asarray((np.cumsum(kept.mask) - 1)[stays], index.dtype)}

    def _pad(self, node: gs.Node) -> dict[int, np.ndarray]:
        source, target = node.inputs[0].name, node.outputs[0].name
        rank, pads = self.tensors[source].ndim, self._value(node, 1).copy()
        axes_input = input_at(node, 3)
        axes = list(range(rank)) if axes_input is None else [int(a) % rank for a in self._value(node, 3)]
        axis = (self.kept.get(target) or self.kept[source]).axis  # of a crop, all that goes may be cropped
        if axis not in axes:
            return {}
        own, made = self._mask(source, axis), self._mask(target, axis)
        first, last = axes.index(axis), axes.index(axis) + len(axes)
        before, after = int(pads[first]), int(pads[last])
        pads[first] = made[:before].sum() if before >= 0 else -own[:-before].sum()
        pads[last] = made[len(made) - after :].sum() if after >= 0 else -own[after:].sum()
        return {1: pads}

    def _reshape(self, node: gs.Node) -> dict[int, np.ndarray]:
        kept = self.kept[node.outputs[0].name]
        target = constant_value(self.model, node.inputs[1])
        if target is None:
            shape = tensor_shapes(self.model).get(node.outputs[0].name, (None, None))
            if self.model.assumed or not all(isinstance(size, int) for size in shape[1:]):
                return {}  # it is computed: `cut_channels` looks whether it comes out right
            target = np.array([0, *shape[1:]], np.int64)
            node.attrs.pop("allowzero", None)
        target = target.copy()
        if target[kept.axis] > 0:
            target[kept.axis] = kept.mask.sum()
        return {1: target}

    def _resize(self, node: gs.Node) -> dict[int, np.ndarray]:
        sizes = input_at(node, 3)
        value = None if sizes is None else constant_value(self.model, sizes)
        kept = self.kept[node.outputs[0].name]
        rank = self.tensors[node.outputs[0].name].ndim
        axes = [axis % rank for axis in attribute(node, "axes", range(rank))]
        if value is None or kept.axis not in axes:
            return {}
        value = value.copy()
        value[axes.index(kept.axis)] = kept.mask.sum()
        return {3: value}

    def _is_single(self, tensor: gs.Tensor, axis: int) -> bool:
        """Return whether a tensor is known to have one element along an axis, counted from the last."""
        sizes = tensor_shapes(self.model).get(tensor.name)
        return sizes is not None and (len(sizes) < -axis or sizes[axis] == 1)

    def _mask(self, name: str, axis: int) -> np.ndarray:
        """Return which channels of a tensor stay along an axis: all, where it loses none."""
        if name in self.kept:
            return self.kept[name].mask
        return np.ones(self.tensors[name].shape[axis], bool)

    def _size(self, tensor: gs.Tensor, axis: int, *, after: bool = False) -> int:
        """Return the size of a tensor along an axis, before the cut or after it."""
        size = self.tensors[tensor.name].shape[axis]
        if size == 1:
            known = tensor_shapes(self.model)[tensor.name][axis]
            size = known if isinstance(known, int) else 1
        kept = self.kept.get(tensor.name)
        return int(kept.mask.sum()) if after and kept is not None and kept.axis == axis else size

    def _value(self, node: gs.Node, index: int) -> np.ndarray:
        value = constant_value(self.model, node.inputs[index])
        if value is None:
            raise ModelError(
                f"{node_label(node)!r} ({node.op}) reads {node.inputs[index].name!r}: no constant"
            )
        return value

    def _set(self, node: gs.Node, index: int, values: np.ndarray) -> None:
        """Replace an input of a node; nodes that share a constant and cut it alike go on to share it."""
        while len(node.inputs) <= index:
            node.inputs.append(gs.Variable.empty())
        old = node.inputs[index]
        own = isinstance(old, gs.Constant) and len(value_readers(old)) == 1
        if own and not any(old is output for output in self.model.graph_outputs):
            set_values(old, values)
            return
        key = id(old), values.shape, values.tobytes()
        if key not in self._shared or old.is_empty():
            base = old.name or f"{node_label(node)}_sizes"
            self._shared[key] = old, gs.Constant(unique_name(self.model, f"{base}_cut"), values)
        node.inputs[index] = self._shared[key][1]
        if not old.is_empty():
            remove_unread(self.model, [old])


def _tensors(node: gs.Node) -> list[gs.Tensor]:
    return [*node.inputs, *node.outputs]


_RULES: dict[str, Callable[[_Cut, gs.Node], dict[int, np.ndarray]]] = {
    "Concat": _Cut._concat,
    "Gather": _Cut._gather,
    "Pad": _Cut._pad,
    "Reshape": _Cut._reshape,
    "Resize": _Cut._resize,
    "Slice": _Cut._slice,
    "Split": _Cut._split,
}
