"""Find where a network computes with numbers of its channels, which a cut changes.

r --Shape--> sizes --Gather, Concat--> target of a Reshape     its channels are tied to those of r
                   --Mul, Div--------> target of a Reshape     it is computed anew (`channel_removal`)
                   --Cast, Div-------> data                    r keeps its channels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph.channel_groups.groups import Labels, Unknown
from onnxcompress.graph.channel_groups.labels import TensorLabels
from onnxcompress.graph.query import attribute, input_at, is_op, node_label

TARGETS = (("Reshape", 1), ("Resize", 3))
"""Operators that make a tensor of given sizes, and which of their inputs these are."""


@dataclass(frozen=True)
class _Sizes:
    """What an integer tensor of sizes knows of channels."""

    labels: Labels
    """The channels that it counts."""
    places: Sequence[Labels | None] | None
    """The channels that each element counts, None where it counts none; None: it was computed with."""


class ChannelCounts:
    """Walk over the integers that are computed from shapes."""

    def __init__(self, tracer: TensorLabels) -> None:
        self.tracer = tracer
        self._known: dict[int, _Sizes] = {}

    def run(self) -> None:
        """Tie channels whose number makes the size of others, and mark those whose number is data."""
        outputs = {id(t) for t in self.tracer.model.graph.outputs}
        for node in self.tracer.topology.order:
            sizes = self._sizes(node)
            if sizes is None:
                continue
            for tensor in node.outputs:
                self._known[id(tensor)] = sizes
                if id(tensor) in outputs or any(map(self.tracer.model.in_body, tensor.outputs)):
                    self._stays(sizes.labels, Refusal(str(tensor.name), "gives the number of its channels"))

    def _sizes(self, node: gs.Node) -> _Sizes | None:
        """Compute what the outputs of a node count; None where they count no channels, or are data."""
        if is_op(node, "Shape", "Size"):
            return self._measured(node)
        given = {at: self._known[id(t)] for at, t in enumerate(node.inputs) if id(t) in self._known}
        if any(self.tracer.carries(t) for t in node.outputs):
            for at, sizes in given.items():
                self._end(node, at, sizes)
            return None
        if not given:
            return None
        places = self._moved(node, given)
        if places is not None and all(place is None for place in places):
            return None
        return _Sizes(np.concatenate([sizes.labels for sizes in given.values()]), places)

    def _measured(self, node: gs.Node) -> _Sizes | None:
        source = node.inputs[0]
        if isinstance(source, gs.Constant):  # a weight, say: the layer that reads it keeps its channels
            refusal = Refusal(node_label(node), f"({node.op}) reads the shape of a parameter")
            for tensor in (t for reader in source.outputs for t in (*reader.inputs, *reader.outputs)):
                if (own := self._labels(tensor)) is not None:
                    self._stays(own, refusal)
            return None
        labels = self._labels(source)
        axes = [] if labels is None else [axis for axis, size in enumerate(labels.shape) if size > 1]
        if labels is None or not axes:
            return None
        flat = labels.reshape(-1)
        if is_op(node, "Size") or len(axes) > 1:
            return _Sizes(flat, None)
        places = [flat if axis == axes[0] else None for axis in range(labels.ndim)]
        seen = places[attribute(node, "start", 0) : attribute(node, "end")]
        return None if all(place is None for place in seen) else _Sizes(flat, seen)

    def _moved(self, node: gs.Node, given: Mapping[int, _Sizes]) -> Sequence[Labels | None] | None:
        """Follow the elements of sizes; None where they are computed with."""
        if is_op(node, "Concat"):
            joined: list[Labels | None] = []
            for at, tensor in enumerate(node.inputs):
                part = given[at].places if at in given else self._uncounted(tensor)
                if part is None:
                    return None
                joined += part
            return joined
        places = given[0].places if 0 in given else None
        if places is None or is_op(node, "Cast", "Identity", "Squeeze", "Unsqueeze"):
            return places
        if is_op(node, "Gather"):
            index = self.tracer.constant(node.inputs[1])
            return None if index is None else [places[int(i)] for i in np.reshape(index, -1)]
        if is_op(node, "Slice"):
            start, end, step = (self.tracer.constant(input_at(node, at)) for at in (1, 2, 4))
            if start is None or end is None:
                return None
            by = 1 if step is None else int(step.reshape(-1)[0])
            return places[slice(int(start.reshape(-1)[0]), int(end.reshape(-1)[0]), by)]
        return None

    def _end(self, node: gs.Node, at: int, sizes: _Sizes) -> None:
        """Judge sizes that a node on data reads."""
        label = node_label(node)
        if (node.op, at) not in TARGETS:
            self._stays(sizes.labels, Refusal(label, f"({node.op}) computes with the number of channels"))
            return
        made = self._labels(node.outputs[0])
        for axis, own in enumerate(sizes.places or ()):
            if own is None:
                continue
            if (
                made is not None
                and made.size == own.size
                and made.ndim > axis
                and made.shape[axis] == own.size
            ):
                self.tracer.union(made.reshape(-1), own)
            else:
                self._stays(own, Refusal(label, f"({node.op}) gives their number to other data"))

    def _labels(self, tensor: gs.Tensor) -> Labels | None:
        try:
            return self.tracer.labels(tensor)
        except Unknown:
            return None

    def _uncounted(self, tensor: gs.Tensor) -> Sequence[Labels | None] | None:
        """Return the places of a vector that counts no channels; None where its length is not known."""
        shape = self.tracer.topology.shape(tensor)
        size = shape[0] if shape is not None and len(shape) == 1 else None
        return [None] * size if isinstance(size, int) else None

    def _stays(self, labels: Labels, refusal: Refusal) -> None:
        self.tracer.mark_unscalable(labels, refusal)
