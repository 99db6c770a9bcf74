"""Labels of a graph's tensors, and what the rules of operators need to know of those tensors."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.graph.channel_groups.groups import (
    Bounds,
    ChannelLabels,
    Labels,
    Offset,
    Unknown,
)
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model


class TensorLabels(ChannelLabels):
    """Labels of each tensor that carries data, as far as the graph has been walked."""

    def __init__(self, model: Model, scale_clips: bool) -> None:
        super().__init__()
        self.model, self.scale_clips = model, scale_clips
        self.topology = Topology(model)
        self.offsets: list[Offset] = []
        self.bounds: list[Bounds] = []
        self._labels: dict[int, Labels] = {}
        self._tensors: dict[str, Labels] = {}

    def labels(self, tensor: gs.Tensor) -> Labels:
        """Look up the labels of a tensor that carries data.

        Args:
            tensor: The tensor.

        Returns:
            Its labels.

        Raises:
            Unknown: Its labels are not known.
        """
        if id(tensor) not in self._labels:
            raise Unknown(f"has an input {tensor.name!r} whose channels are not known")
        return self._labels[id(tensor)]

    def carries(self, tensor: gs.Tensor) -> bool:
        """Return whether a tensor carries data: depends on the values of a graph input.

        Args:
            tensor: The tensor.

        Returns:
            False for constants and for values computed from shapes.
        """
        return id(tensor) in self.topology.data

    def constant(self, tensor: gs.Tensor | None) -> np.ndarray | None:
        """Compute the value of a tensor that carries no data.

        Args:
            tensor: The tensor, or None.

        Returns:
            Its value; None where there is no tensor, it carries data, or it cannot be evaluated.
        """
        if tensor is None or tensor.is_empty() or self.carries(tensor):
            return None
        return constant_value(self.model, tensor)

    def sizes(self, tensor: gs.Tensor) -> list[int | None]:
        """Look up a tensor's shape.

        Args:
            tensor: The tensor.

        Returns:
            The dimensions, None for unknown ones.

        Raises:
            Unknown: The rank is not known.
        """
        shape = self.topology.shape(tensor)
        if shape is None:
            raise Unknown(
                f"has a tensor {tensor.name!r} of unknown rank", "store its shape with onnx.shape_inference"
            )
        return [d if isinstance(d, int) else None for d in shape]

    def expanded(self, tensor: gs.Tensor, axis: int) -> Labels:
        """Repeat a tensor's labels along an axis, so that they have the axis's full size there.

        Args:
            tensor: The tensor.
            axis: The axis.

        Returns:
            The labels.

        Raises:
            Unknown: The labels or the size of the axis are not known.
        """
        labels = self.labels(tensor)
        size = self.sizes(tensor)[axis] if labels.shape[axis] == 1 else labels.shape[axis]
        if size is None:
            raise Unknown(
                f"has a tensor {tensor.name!r} whose axis {axis} is open", "fix the size of the images"
            )
        return np.repeat(labels, size, axis) if labels.shape[axis] == 1 else labels
