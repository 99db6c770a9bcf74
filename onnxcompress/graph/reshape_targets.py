"""Rewrite Reshape targets that contain the batch size, so that they hold for any number of images.

Exporters write the batch that they traced with into the targets of Reshape nodes: [1, −1] in front of a
classifier. With the sizes known from shape inference they become

    [n, a, b]  ->  [−1, a, b]        [n, −1]  ->  [−1, the known size], or [0, −1] where it is not known

The result is the same for the number of images in the file. Whether the graph treats each image of a larger
batch alone is another question (`open_batch.images_at_once` tries it).
"""

from __future__ import annotations

import numpy as np

from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.query import attribute, is_op, read_inputs
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model


def batch_free_targets(model: Model) -> dict[int, np.ndarray]:
    """Compute targets that hold for any batch.

    Args:
        model: The model.

    Returns:
        New targets, int64, by id of the Reshape node; without those that hold for any batch already.
    """
    targets: dict[int, np.ndarray] = {}
    for node in model.graph.nodes:
        if not is_op(node, "Reshape") or len(node.inputs) < 2 or attribute(node, "allowzero", 0):
            continue
        value = constant_value(model, node.inputs[1])
        if value is None or value.ndim != 1 or not len(value) or value[0] <= 0:
            continue
        target = _without_batch(model, node.outputs[0].name, [int(v) for v in value])
        if target is not None:
            targets[id(node)] = np.array(target, np.int64)
    return targets


def _without_batch(model: Model, output: str, target: list[int]) -> list[int] | None:
    """Return the target for any batch; None where its first size is no multiple of the file's batch."""
    shapes = tensor_shapes(model)
    batches = [s[0] for t in read_inputs(model) if (s := shapes.get(t.name))]
    batch = next((d for d in batches if isinstance(d, int)), 1)
    if target[0] % batch:
        return None
    known = shapes.get(output, ())
    sizes = [known[axis] if size == -1 and axis < len(known) else size for axis, size in enumerate(target)]
    inner = [size if isinstance(size, int) else -1 for size in sizes[1:]]
    if -1 not in inner:
        return [-1, *inner]
    return [0, *inner] if target[0] == batch else None
