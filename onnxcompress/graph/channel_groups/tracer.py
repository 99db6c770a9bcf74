"""Find which channels of a network must be scaled together: the basis of `equalize`.

Every channel of every tensor gets a label. Where an operator passes a positive scale of a channel through
unchanged (`rules`), its output takes the input's labels; where two channels must have the same scale (the
operands of an Add), their groups are joined. Linear layers end labels and begin them:

    layer --writes--> labels --Relu, pools, Add, Concat, Pad, Slice, …--> labels <--reads-- layer

Joined labels are one channel group. Its scale is free where every writer and every reader is a linear layer
with a weight of its own and nothing forbids it: an operator that is not homogeneous or has no rule, an
input or output of the model, the body of an If, Loop or Scan. Labels go on through operators that are not
homogeneous but keep channels in place (Clip, Sigmoid): the assumption-free scales of Horton et al. (arXiv
2011.09058, §3.2) need to know which layers meet there. `ChannelGroups.groups` lists
the groups with the layers that share their channels, and where in them these lie.

A label array has the rank of its tensor, and size 1 along each axis over which labels do not vary, as a
rule (1, C, 1, 1). Channel shuffles, Flatten before a Gemm, Concat and Slice are plain array operations.

Does not handle: what Loop, Scan and If compute, and sequences; their tensors cannot be scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph import layer_params
from onnxcompress.graph.channel_groups.groups import (
    MAX_LABELS,
    ChannelGroups,
    LabelledLayer,
    Labels,
    Unknown,
)
from onnxcompress.graph.channel_groups.labels import TensorLabels
from onnxcompress.graph.channel_groups.rules import RULES, Rule
from onnxcompress.graph.linear_layer import LINEAR_OPS, as_linear
from onnxcompress.graph.query import DEFAULT_DOMAINS, attribute, is_op, node_label
from onnxcompress.model import Model

COMBINES = ("Add", "Concat", "Div", "Max", "Min", "Mul", "Sub", "Sum")
"""Operators whose inputs are all data; of other operators only the first input is."""


def find_channel_groups(model: Model, *, scale_clips: bool = False) -> ChannelGroups:
    """Find the channel groups of a model.

    Args:
        model: The model.
        scale_clips: Let scales pass a Clip, whose bounds must then be scaled too (`ChannelGroups.bounds`).

    Returns:
        The layers, the labels of their channels, and why some groups cannot be scaled.

    Raises:
        ModelError: The graph has a cycle, or its shapes contradict each other.
    """
    tracer = Tracer(model, scale_clips)
    tracer.run()
    return tracer.result()


class Tracer(TensorLabels):
    """Walk over the graph in topological order that applies the rule of each operator to its labels."""

    rules: ClassVar[Mapping[str, Rule]] = RULES
    """Rules by operator of the default domain."""
    combines: ClassVar[tuple[str, ...]] = COMBINES

    def __init__(self, model: Model, scale_clips: bool) -> None:
        super().__init__(model, scale_clips)
        self._layers: list[LabelledLayer] = []
        self._untraced: list[Labels] = []

    def run(self) -> None:
        """Label all tensors of the graph."""
        for tensor in self.model.graph.inputs:
            self._set_unscalable(tensor, Refusal(tensor.name, "is an input of the model"))
        for node in self.topology.order:
            if not self._is_followed(node):
                continue
            rule = self.rules.get(node.op) if node.domain in DEFAULT_DOMAINS else None
            try:
                if is_op(node, *LINEAR_OPS):
                    self._linear(node)
                    continue
                if rule is None:
                    raise Unknown(*_no_rule(node))
                for tensor, labels in zip(node.outputs, rule(self, node), strict=False):
                    self._set(tensor, labels)
                if node.op not in self.combines:
                    self._mark_parameters(node, 0)
            except Unknown as problem:
                self._stop_at(
                    node, Refusal(node_label(node), f"({node.op}) {problem.rule}", problem.remedy)
                )
        self._mark_outside()

    def _is_followed(self, node: gs.Node) -> bool:
        """Return whether a node reads data, and not only its shape."""
        return not is_op(node, "Shape", "Size") and any(self.carries(t) for t in node.inputs)

    def _set(self, tensor: gs.Tensor, labels: Labels) -> None:
        self._labels[id(tensor)] = self._tensors[tensor.name] = labels

    def _set_unscalable(self, tensor: gs.Tensor, refusal: Refusal) -> None:
        """Give a tensor new labels that cannot be scaled, where its number of channels is known."""
        shape = self.topology.shape(tensor)
        channels = shape[1] if shape is not None and len(shape) > 1 else None
        if shape is not None and isinstance(channels, int) and 0 < channels <= MAX_LABELS:
            labels = self.new_labels((1, channels, *[1] * (len(shape) - 2)))
            self._set(tensor, self.mark_unscalable(labels, refusal))

    def _stop_at(self, node: gs.Node, refusal: Refusal) -> None:
        """Mark the inputs and outputs of a node about which nothing is known."""
        for tensor in node.inputs:
            if id(tensor) in self._labels:
                self._untraced.append(self.mark_unscalable(self._labels[id(tensor)], refusal))
        for tensor in node.outputs:
            if self.carries(tensor) and not tensor.is_empty():
                self._set_unscalable(tensor, refusal)

    def _mark_parameters(self, node: gs.Node, data_at: int) -> None:
        """Mark the channels of inputs that an operator reads as parameters."""
        for at, tensor in enumerate(node.inputs):
            if at != data_at and id(tensor) in self._labels:
                refusal = Refusal(node_label(node), f"({node.op}) takes {tensor.name!r} as a parameter")
                self.mark_unscalable(self._labels[id(tensor)], refusal)

    def _linear(self, node: gs.Node) -> None:
        """Record a linear layer: end the labels that it reads and begin those that it writes."""
        linear = as_linear(self.model, node, self._rank)
        if isinstance(linear, Refusal):
            raise Unknown(linear.rule, linear.remedy)
        if node.op == "Gemm" and attribute(node, "transA", 0):
            raise Unknown("transposes its input")
        output, label = node.outputs[0], node_label(node)
        try:
            reads = self._channels(node.inputs[linear.data_at], linear.inputs)
        except Unknown as unknown:
            reads = self.new_labels((linear.inputs,))
            self.mark_unscalable(reads, Refusal(label, f"({node.op}) {unknown.rule}", unknown.remedy))
        writes = self.new_labels((1, linear.outputs, *[1] * (linear.rank - 2)))
        self._set(output, writes)
        own = layer_params.check_shared(self.model, linear, label, copy_shared=False) is None
        layer = LabelledLayer(linear, reads, writes.reshape(-1), own)
        self._layers.append(layer)
        if not layer.scalable:
            self.mark_unscalable(reads, _fixed(layer))
            self.mark_unscalable(writes, _fixed(layer))
        if layer_params.bias(self.model, linear) is None:
            self.mark_unscalable(writes, Refusal(label, f"({node.op}) has a bias that is not a constant"))
        self._mark_parameters(node, linear.data_at)

    def _channels(self, tensor: gs.Tensor, count: int) -> Labels:
        """Collect the labels, shape (count,), of the channels (axis 1) that a linear layer reads."""
        labels = self.labels(tensor)
        if labels.ndim < 2 or labels.shape[1] not in (1, count):
            raise Unknown(f"reads {count} channels, {tensor.name!r} has shape {labels.shape}")
        merged = self.union_along(labels, (0, *range(2, labels.ndim)))
        return np.array(np.broadcast_to(merged.reshape(-1), (count,)))

    def _rank(self, tensor: gs.Tensor) -> int | None:
        if id(tensor) in self._labels:
            return self._labels[id(tensor)].ndim
        shape = self.topology.shape(tensor)
        return None if shape is None else len(shape)

    def _mark_outside(self) -> None:
        """Mark channels that are visible outside the main graph."""
        outputs = {id(t) for t in self.model.graph.outputs}
        for node in self.topology.order:
            for tensor in node.outputs:
                labels = self._labels.get(id(tensor))
                if labels is None:
                    continue
                if id(tensor) in outputs:
                    self.mark_unscalable(labels, Refusal(tensor.name, "is an output of the model"))
                if any(map(self.model.in_body, tensor.outputs)):
                    self.mark_unscalable(
                        labels, Refusal(tensor.name, "is read inside the body of an If, Loop or Scan")
                    )

    # The result --------------------------------------------------------------------------------------

    def result(self) -> ChannelGroups:
        """Collect the result, each label replaced by the one that represents its group.

        Returns:
            The channel groups.
        """
        roots = self.roots()
        groups = ChannelGroups(count=len(roots), unscalable=self.unscalable(roots))
        for layer in self._layers:
            groups.layers.append(replace(layer, reads=roots[layer.reads], writes=roots[layer.writes]))
        groups.origins = dict(self._tensors)
        groups.tensors = {name: roots[labels] for name, labels in self._tensors.items()}
        groups.offsets = [replace(o, labels=roots[o.labels]) for o in self.offsets]
        groups.bounds = [replace(b, labels=roots[b.labels]) for b in self.bounds]
        groups.untraced = {int(root) for labels in self._untraced for root in np.unique(roots[labels])}
        return groups


def _fixed(layer: LabelledLayer) -> Refusal:
    """Say why a layer's weight cannot be scaled."""
    node = layer.linear.node
    if not layer.own:
        return Refusal(node_label(node), f"({node.op}) shares its weight", "give each node its own copy")
    rule = f"({node.op}) has weights of type {layer.linear.weight.dtype.name}, which scaling would round"
    return Refusal(node_label(node), rule, "convert the model to float32")


def _no_rule(node: gs.Node) -> tuple[str, str]:
    if node.op in ("QuantizeLinear", "DequantizeLinear"):
        return "quantizes", "equalize before quantizing"
    return "is an operator without a rule for channels", ""
