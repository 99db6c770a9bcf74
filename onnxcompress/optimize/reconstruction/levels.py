"""Places besides the features at which a student is matched with its teacher: before and behind them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import onnx_graphsurgeon as gs

from onnxcompress.graph.blocks import ACTIVATIONS
from onnxcompress.graph.query import is_op, producer, value_readers
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model

POOLS = ("GlobalAveragePool", "AveragePool", "ReduceMean", "GlobalMaxPool", "MaxPool", "ReduceMax")
FEWEST_POOLED = 200
"""Images from which on pooled features are matched: of fewer they are learned by heart. ResNet-56 without
eight blocks, on 50 images, keeps 97.8 % of the classes of other training images without, 96.4 % with."""
EACH = 3
"""Places of one resolution, at most. With one of each larger resolution, more is learned by heart."""


def feature_levels(
    teacher: Model, student: Model, feature: str, instead: Mapping[str, str] | None = None
) -> tuple[tuple[str, str], ...]:
    """Choose tensors that everything goes through, evenly spread over the way to the features.

    Of each resolution only the tensors with the fewest channels are taken, none that only an activation
    reads, since below zero it may be whatever it likes, and none with a border of zeros.

    Args:
        teacher: The whole network.
        student: The network without some of the teacher's blocks or channels.
        feature: Name of the teacher's feature tensor.
        instead: {tensor that the student lacks: tensor that is read in its place}.

    Returns:
        Name in the student and in the teacher of each, (N, C, H, W), first to last; none where the features
        do not lie behind them.
    """
    shapes, instead = tensor_shapes(teacher), instead or {}
    trunk = teacher.analysis(Topology).trunk()
    names = [str(tensor.name) for tensor in trunk]
    if feature not in names:
        return ()
    there = student.graph.tensors()
    by_size: dict[object, dict[str, str]] = defaultdict(dict)
    for tensor in trunk[1 : names.index(feature) + 1]:
        name, shape = str(tensor.name), shapes.get(tensor.name, ())
        own = instead.get(name, name)
        if len(shape) == 4 and own in there and (name == feature or _is_comparable(tensor)):
            by_size[shape[2:]].pop(own, None)  # what stands for several tensors, for the last of them
            by_size[shape[2:]][own] = name
    chosen = [pair for same in by_size.values() for pair in _spread(same, shapes)]
    own_feature = instead.get(feature, feature)
    return tuple((own, name) for own, name in chosen if own != own_feature)


def pooled_features(
    teacher: Model, student: Model, feature: str, images: int, instead: Mapping[str, str] | None = None
) -> tuple[tuple[str, str], ...]:
    """Find what the global pool makes of the features: one number for each image and channel.

    Args:
        teacher: The whole network.
        student: The network without some of the teacher's blocks or channels.
        feature: Name of the teacher's feature tensor.
        images: Number of images to learn from.
        instead: {tensor that the student lacks: tensor that is read in its place}.

    Returns:
        Its name in the student and in the teacher; none where no pool reads the features alone, or of so
        few images that they would be learned by heart.
    """
    shapes, trunk = tensor_shapes(teacher), teacher.analysis(Topology).trunk()
    names = [str(tensor.name) for tensor in trunk]
    if images < FEWEST_POOLED or feature not in names[:-1]:
        return ()
    pooled = trunk[names.index(feature) + 1]
    shape, name = shapes.get(pooled.name, ()), str(pooled.name)
    own = (instead or {}).get(name, name)
    is_row = len(shape) >= 2 and all(size == 1 for size in shape[2:])
    is_read = is_op(producer(pooled), *POOLS) and own in student.graph.tensors()
    return ((own, name),) if is_row and is_read else ()


def _is_comparable(tensor: gs.Tensor) -> bool:
    """Return whether more than an activation reads the tensor, and it is not just padded."""
    readers = value_readers(tensor)
    awaits = len(readers) == 1 and is_op(readers[0], *ACTIVATIONS)
    return not awaits and not any(is_op(node, "Pad") for node in tensor.inputs)


def _spread(same: Mapping[str, str], shapes: Mapping[str, tuple[object, ...]]) -> list[tuple[str, str]]:
    """Choose EACH of the narrowest tensors of one resolution, the last of them among these."""
    fewest = min(_channels(shapes[name]) for name in same.values())
    narrow = [(own, name) for own, name in same.items() if _channels(shapes[name]) == fewest]
    places = {round((at + 1) * len(narrow) / EACH) - 1 for at in range(EACH)} - {-1}
    return [narrow[place] for place in sorted(places)]


def _channels(shape: tuple[object, ...]) -> int:
    return shape[1] if isinstance(shape[1], int) else 0
