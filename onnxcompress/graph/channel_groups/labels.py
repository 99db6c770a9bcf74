"""Labels of a graph's tensors: what the rules of operators ask for."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.graph.channel_groups.groups import (
    Bounds,
    Channels,
    Labels,
    Offset,
    Unknown,
)
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model


class TensorLabels(Channels):
    """The labels of each tensor that carries data, as far as the walk has come."""

    def __init__(self, model: Model, scale_clips: bool) -> None:
        super().__init__()
        self.model, self.scale_clips = model, scale_clips
        self.topology = Topology(model)
        self.offsets: list[Offset] = []
        self.bounds: list[Bounds] = []
        self._labels: dict[int, Labels] = {}
        self._tensors: dict[str, Labels] = {}

    def labels(self, tensor: gs.Tensor) -> Labels:
        """The labels of a tensor that carries data. Raises Unknown where they are lost."""
        if id(tensor) not in self._labels:
            raise Unknown(f"has an input {tensor.name!r} whose channels are not known")
        return self._labels[id(tensor)]

    def carries(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor depends on the values of an input."""
        return id(tensor) in self.topology.data

    def constant(self, tensor: gs.Tensor | None) -> np.ndarray | None:
        """The value of a tensor that no input reaches."""
        if tensor is None or tensor.is_empty() or self.carries(tensor):
            return None
        return constant_value(self.model, tensor)

    def sizes(self, tensor: gs.Tensor) -> list[int | None]:
        """The tensor's shape, None for each dimension that is open. Raises Unknown without a rank."""
        shape = self.topology.shape(tensor)
        if shape is None:
            raise Unknown(
                f"has a tensor {tensor.name!r} of unknown rank", "store its shape with onnx.shape_inference"
            )
        return [d if isinstance(d, int) else None for d in shape]

    def spelled(self, tensor: gs.Tensor, axis: int) -> Labels:
        """The tensor's labels, written out along one axis."""
        labels = self.labels(tensor)
        size = self.sizes(tensor)[axis] if labels.shape[axis] == 1 else labels.shape[axis]
        if size is None:
            raise Unknown(
                f"has a tensor {tensor.name!r} whose axis {axis} is open", "fix the size of the images"
            )
        return np.repeat(labels, size, axis) if labels.shape[axis] == 1 else labels
