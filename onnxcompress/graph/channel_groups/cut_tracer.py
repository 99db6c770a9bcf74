"""Find which channels of a network must be cut together: the basis of `drop-channels`.

Labels are traced as for scales (`tracer`), with other rules (`cut_rules`). Channels that have one label go
together: the producer's output channel, the parameters of each operator on the way, the input channel of
each reader, through residual sums, gates, concatenations and reshapes. Fang et al., DepGraph (CVPR 2023),
find such groups from gradients of a torch model; here the graph says them. What ties channels besides:

 - a grouped convolution ties the inputs and outputs of each of its groups, which goes as a whole (a
   depthwise one: each input and its outputs); where all its groups would then go together, because
   channels are shuffled between groups, it ties the same channel of all groups instead;
 - a weight that several layers read ties their channels;
 - a size that is taken from another tensor's shape ties the channels of both (`channel_counts`).

A channel stays, with the reason, where it is a channel of an input or output of the model, where an
operator without a rule reads or writes it, or where no other channel of its tensor would be left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph import layer_params
from onnxcompress.graph.channel_groups.channel_counts import ChannelCounts
from onnxcompress.graph.channel_groups.cut_rules import COMBINES, CUT_RULES, varying
from onnxcompress.graph.channel_groups.groups import (
    ChannelGroup,
    ChannelGroups,
    LabelledLayer,
    Unknown,
)
from onnxcompress.graph.channel_groups.rules import Rule
from onnxcompress.graph.channel_groups.tracer import Tracer
from onnxcompress.graph.linear_layer import Linear, as_linear, chain
from onnxcompress.graph.macs import node_macs
from onnxcompress.graph.query import attribute, is_op, node_label
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model


@dataclass(frozen=True)
class CutGroup:
    """Channels of the same layers, each of which can be cut by itself."""

    name: str
    """Label of the first layer that writes them; unique in the model."""
    group: ChannelGroup
    parameters: int
    """Weights of the layers that belong to these channels; one that layers share counts once."""
    macs: int
    """Multiply-accumulates for one image that belong to these channels; 0 where sizes are open."""

    @property
    def width(self) -> int:
        """Number of channels; several that must go together count as one."""
        return len(self.group.labels)

    @property
    def refusal(self) -> Refusal | None:
        """Why none of them can be cut."""
        return self.group.unscalable


@dataclass(frozen=True)
class CutGroups:
    """The channels of a model that can be cut, and those that cannot, with the reasons."""

    channels: ChannelGroups
    """Labels of all tensors; its `unscalable` are the channels that cannot be cut."""
    all: tuple[CutGroup, ...]
    """In topological order."""

    @cached_property
    def free(self) -> tuple[CutGroup, ...]:
        """The groups whose channels can be cut."""
        return tuple(group for group in self.all if group.refusal is None)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Why other groups stay, one refusal a group."""
        return tuple(replace(g.refusal, node=g.name) for g in self.all if g.refusal is not None)


def find_cut_groups(model: Model) -> CutGroups:
    """Find the groups of channels that can be cut.

    Args:
        model: The model.

    Returns:
        The groups, and why others stay.

    Raises:
        ModelError: The graph has a cycle, or its shapes contradict each other.
    """
    shuffled: set[str] = set()
    while True:
        tracer = CutTracer(model, frozenset(shuffled))
        tracer.run()
        channels = tracer.result()
        first = next((name for name in _all_tied(channels) if name not in shuffled), None)
        if first is None:
            return CutGroups(channels, tuple(_named(model, channels)))
        shuffled.add(first)


def _all_tied(channels: ChannelGroups) -> Iterable[str]:
    """List the grouped convolutions all channels of which are tied to each other."""
    for layer in channels.layers:
        if layer.linear.groups > 1 and len(np.unique(layer.reads)) == 1:
            yield layer.linear.output_name


class CutTracer(Tracer):
    """Walk over the graph that ties the channels that must be cut together."""

    rules: ClassVar[Mapping[str, Rule]] = CUT_RULES
    combines: ClassVar[tuple[str, ...]] = (*COMBINES, "CastLike", "Concat")

    def __init__(self, model: Model, shuffled: frozenset[str] = frozenset()) -> None:
        super().__init__(model, scale_clips=False)
        self._shuffled = shuffled
        """Outputs of grouped convolutions all groups of which stay."""
        self._weights: dict[int, LabelledLayer] = {}

    def _is_followed(self, node: gs.Node) -> bool:
        """Return whether a node computes data: a CastLike may read only the type of some."""
        return super()._is_followed(node) and any(self.carries(t) for t in node.outputs)

    def _linear(self, node: gs.Node) -> None:
        """Record a linear layer, and tie its channels to each other as its groups do."""
        linear, axis = self._read_linear(node)
        if node.op == "Gemm" and attribute(node, "transA", 0):
            raise Unknown("transposes its input")
        if layer_params.bias(self.model, linear) is None:
            raise Unknown("has a bias that is not a constant")
        source = self.expanded(node.inputs[linear.data_at], axis)
        if source.shape[axis] != linear.inputs or varying(source) not in ((), (axis,)):
            raise Unknown(f"reads {linear.inputs} channels along axis {axis}, they lie along others")
        reads, writes = source.reshape(-1), self.new_labels((linear.outputs,))
        if linear.groups > 1:
            parts = [part.reshape(linear.groups, -1) for part in (reads, writes)]
            if linear.output_name in self._shuffled:
                for part in parts:
                    self.union_along(part, (0,))
            else:
                self.union_along(np.concatenate(parts, 1), (1,))
        layer = LabelledLayer(linear, reads, writes, True)
        first = self._weights.setdefault(id(chain(node.inputs[linear.weight_at])[-1]), layer)
        if first is not layer:
            if first.reads.shape != reads.shape or first.writes.shape != writes.shape:
                raise Unknown("shares its weight with a layer of another kind")
            self.union(first.reads, reads)
            self.union(first.writes, writes)
        self._layers.append(layer)
        shape = [1] * linear.rank
        shape[axis] = linear.outputs
        self._set(node.outputs[0], writes.reshape(shape))
        self._mark_parameters(node, linear.data_at)

    def _read_linear(self, node: gs.Node) -> tuple[Linear, int]:
        """Read a linear layer, and the axis of its channels: the last one of a MatMul by a matrix."""
        linear = as_linear(self.model, node, self._rank)
        if isinstance(linear, Linear):
            return linear, 1
        value, rank = self.constant(node.inputs[1]), self._rank(node.inputs[0])
        if is_op(node, "MatMul") and value is not None and value.ndim == 2 and rank is not None:
            return Linear(node, np.ascontiguousarray(value), 1, rank), rank - 1
        raise Unknown(linear.rule, linear.remedy)

    def result(self) -> ChannelGroups:
        """Collect the result, with the channels marked that would leave a tensor without any, or ragged.

        Returns:
            The channel groups, whose `unscalable` are the channels that cannot be cut.
        """
        ChannelCounts(self).run()
        joined = self.roots()
        for name, labels in self._tensors.items():
            roots = joined[labels]
            axes = [a for a in varying(roots) if (roots != roots.take([0], a)).any()]
            if not axes:
                self.mark_unscalable(labels, Refusal(name, "has channels that could only go all together"))
            elif len(axes) > 1:
                self.mark_unscalable(labels, Refusal(name, "has channels along several axes"))
        return super().result()


def _named(model: Model, channels: ChannelGroups) -> Iterable[CutGroup]:
    """Give each group a name of its own, and count what belongs to it."""
    shapes = tensor_shapes(model)
    work = {id(layer): _macs(layer, shapes) for layer in channels.layers}
    names: dict[str, int] = {}
    for group in _parted(channels):
        writers = [m for m in group.members if m.side == "outputs"]
        if not writers:  # channels of the input
            continue
        base = node_label(writers[0].layer.linear.node)
        names[base] = names.get(base, 0) + 1
        name = base if names[base] == 1 else f"{base}#{names[base]}"
        shares: dict[int, tuple[LabelledLayer, float]] = {}
        for member in group.members:
            side = member.layer.reads if member.side == "inputs" else member.layer.writes
            _, left = shares.get(id(member.layer), (member.layer, 1.0))
            shares[id(member.layer)] = member.layer, left * (1 - member.channels.size / len(side))
        weights: dict[str, float] = {}  # layers may share one: it counts once
        for layer, left in shares.values():
            cut = layer.linear.weight.size * (1 - left)
            weights[layer.linear.weight_name] = max(cut, weights.get(layer.linear.weight_name, 0.0))
        macs = sum(work[id(layer)] * (1 - left) for layer, left in shares.values())
        yield CutGroup(name, group, round(sum(weights.values())), round(macs))


def _parted(channels: ChannelGroups) -> Iterable[ChannelGroup]:
    """Part groups by the tensors that hold their channels, so that each tensor keeps some with its group.

    A Split, say, gives a part of a group to each of two pools, whose outputs are joined again.
    """
    if not (groups := channels.groups()):
        return
    group_of = np.full(channels.count, -1)
    for at, group in enumerate(groups):
        group_of[group.labels] = at
    sizes = np.array([len(group.labels) for group in groups])
    holders: dict[int, list[str]] = {}
    for name, labels in channels.tensors.items():
        own = np.unique(labels)
        places, counts = np.unique(group_of[own], return_counts=True)
        partly = places[(places >= 0) & (counts < sizes[places])]
        for label in own[np.isin(group_of[own], partly)].tolist():
            holders.setdefault(label, []).append(name)
    for group in groups:
        rows: dict[tuple[str, ...], list[int]] = {}
        for row, label in enumerate(group.labels.tolist()):
            rows.setdefault(tuple(holders.get(label, ())), []).append(row)
        for own_rows in rows.values():
            members = tuple(replace(m, channels=m.channels[own_rows]) for m in group.members)
            yield replace(group, labels=group.labels[own_rows], members=members)


def _macs(layer: LabelledLayer, shapes: Mapping[str, tuple[int | str | None, ...]]) -> int:
    from onnxcompress.errors import ModelError

    try:
        return node_macs(layer.linear.node, shapes)
    except ModelError:  # of sizes that are open
        return 0
