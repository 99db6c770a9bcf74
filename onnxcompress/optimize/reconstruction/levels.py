"""Places on the way to the features at which a student is matched with its teacher, too."""

from __future__ import annotations

from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model


def feature_levels(model: Model, feature: str) -> tuple[str, ...]:
    """List the last tensor of each resolution that everything goes through, in front of the features' own.

    Args:
        model: The network with all its blocks.
        feature: Name of the feature tensor.

    Returns:
        Names of tensors (N, C, H, W), first to last; none where the features do not lie behind them.
    """
    shapes = tensor_shapes(model)
    trunk = [str(tensor.name) for tensor in model.analysis(Topology).trunk()]
    if feature not in trunk:
        return ()
    last: dict[object, str] = {}
    for name in trunk[1 : trunk.index(feature)]:
        shape = shapes.get(name, ())
        if len(shape) == 4 and shape[2:] != shapes[feature][2:]:
            last[shape[2:]] = name
    return tuple(last.values())
