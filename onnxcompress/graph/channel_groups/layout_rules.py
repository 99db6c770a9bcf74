"""Rules for operators that move, pad, join or reduce values; see `rules`.

Every rule takes the tracer and the node, returns the labels of the outputs, and raises `Unknown` where the
channels cannot be followed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph.channel_groups.groups import MAX_LABELS, Labels, Unknown
from onnxcompress.graph.channel_groups.labels import TensorLabels
from onnxcompress.graph.query import attribute, input_at, node_label


def within_channels(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of a pool, whose labels must not vary over the image.

    Args:
        tracer: The labels of the tensors so far.
        node: The node.

    Returns:
        Labels of the output, in a list.

    Raises:
        Unknown: The labels of its input are not known.
    """
    labels = tracer.labels(node.inputs[0])
    return [tracer.union_along(labels, tuple(range(2, labels.ndim)))]


def concat(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of a Concat.

    Args:
        tracer: The labels of the tensors so far.
        node: The node.

    Returns:
        Labels of the output, in a list.

    Raises:
        Unknown: It joins batches, or an operand's channels are not known.
    """
    rank = next(tracer.labels(t).ndim for t in node.inputs if tracer.carries(t))
    axis = attribute(node, "axis") % rank
    if axis == 0:
        raise Unknown("joins batches")
    parts = [tracer.labels(t) if tracer.carries(t) else _part(tracer, node, t, axis) for t in node.inputs]
    if axis > 1 and all(p.shape[axis] == 1 for p in parts):
        return [tracer.union(*parts)]  # pieces of one image
    parts = [_along(tracer, t, p, axis) for t, p in zip(node.inputs, parts, strict=True)]
    shape = [max(p.shape[a] for p in parts) for a in range(rank)]
    if any(p.shape[a] not in (1, shape[a]) for p in parts for a in range(rank) if a != axis):
        raise Unknown("joins tensors whose shapes do not fit together")
    wide = [np.broadcast_to(p, [*shape[:axis], p.shape[axis], *shape[axis + 1 :]]) for p in parts]
    return [np.concatenate(wide, axis)]


def _along(tracer: TensorLabels, tensor: gs.Tensor, labels: Labels, axis: int) -> Labels:
    """Repeat a part's labels along the axis of the Concat, up to its size there."""
    if tracer.carries(tensor):
        return tracer.expanded(tensor, axis)
    size = tracer.sizes(tensor)[axis]
    return np.repeat(labels, size or 1, axis) if labels.shape[axis] == 1 else labels


def _part(tracer: TensorLabels, node: gs.Node, tensor: gs.Tensor, axis: int) -> Labels:
    """Create labels of a constant part: zeros have any scale, other numbers none."""
    value = tracer.constant(tensor)
    if value is None:
        raise Unknown(f"has an operand {tensor.name!r} that depends on the shape of an input")
    labels = tracer.new_labels(tuple(n if a == axis == 1 else 1 for a, n in enumerate(value.shape)))
    if value.any():
        tracer.mark_unscalable(labels, Refusal(node_label(node), "(Concat) joins a constant"))
    return labels


def pad(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of a Pad.

    Args:
        tracer: The labels of the tensors so far.
        node: The node.

    Returns:
        Labels of the output, in a list.

    Raises:
        Unknown: It pads the batch, with a number other than 0, or by an unknown amount.
    """
    labels = tracer.labels(node.inputs[0])
    rank = labels.ndim
    given = attribute(node, "pads", attribute(node, "paddings"))
    pads = tracer.constant(input_at(node, 1)) if given is None else np.asarray(given)
    axes = tracer.constant(input_at(node, 3)) if input_at(node, 3) is not None else np.arange(rank)
    if pads is None or axes is None:
        raise Unknown("has pads that are not constants")
    before, after = np.zeros(rank, np.int64), np.zeros(rank, np.int64)
    before[axes], after[axes] = np.asarray(pads).reshape(2, -1)
    mode = attribute(node, "mode", "constant")
    value = tracer.constant(input_at(node, 2)) if input_at(node, 2) is not None else None
    zero = attribute(node, "value", 0.0) == 0 if value is None else not np.any(value)
    if mode in ("constant", b"constant") and (
        not zero or (input_at(node, 2) is not None and value is None)
    ):
        raise Unknown("pads with a number other than 0")
    for axis in np.flatnonzero(before | after).tolist():
        if axis == 0 or (labels.shape[axis] > 1 and axis != 1):
            raise Unknown(f"pads axis {axis}")
        if axis == 1:
            labels = _pad_channels(tracer, node, int(before[1]), int(after[1]), mode)
    return [labels]


def _pad_channels(
    tracer: TensorLabels, node: gs.Node, before: int, after: int, mode: str | bytes
) -> Labels:
    """Put channels of zeros, which have any scale, before and behind the others."""
    labels = tracer.expanded(node.inputs[0], 1)
    if mode not in ("constant", b"constant") or labels[:, :1].size != 1:
        raise Unknown("pads channels with copies")
    kept = labels[:, max(-before, 0) : labels.shape[1] - max(-after, 0)]
    ends = [tracer.new_labels((1, max(n, 0), *[1] * (labels.ndim - 2))) for n in (before, after)]
    return np.concatenate([ends[0], kept, ends[1]], 1)


def slice_(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of a Slice.

    Args:
        tracer: The labels of the tensors so far.
        node: The node.

    Returns:
        Labels of the output, in a list.

    Raises:
        Unknown: Its bounds, axes or steps are not constant where channels depend on them.
    """
    labels = tracer.labels(node.inputs[0])
    if input_at(node, 1) is None:
        starts, ends = attribute(node, "starts"), attribute(node, "ends")
        axes, steps = attribute(node, "axes", list(range(len(starts)))), [1] * len(starts)
    else:
        starts, ends, axes, steps = _bounds(tracer, node)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis % labels.ndim
        if labels.shape[axis] == 1:
            continue
        if start is None or end is None:
            raise Unknown(f"has bounds on axis {axis} that are not constants")
        last = None if step < 0 and end < -labels.shape[axis] else end
        labels = labels[(slice(None),) * axis + (slice(start, last, step),)]
    return [labels]


def _bounds(
    tracer: TensorLabels, node: gs.Node
) -> tuple[list[int | None], list[int | None], list[int], list[int]]:
    """Read starts, ends, axes and steps of a Slice from opset 10 on; None for an unknown start or end."""
    values = [tracer.constant(input_at(node, at)) for at in range(1, 5)]
    axes, steps = values[2], values[3]
    known = [v for v in values if v is not None]
    if (input_at(node, 3) is not None and axes is None) or not known:
        raise Unknown("slices along axes that are not constants")
    if input_at(node, 4) is not None and steps is None:
        raise Unknown("has steps that are not constants")
    count = known[0].size
    missing: list[int | None] = [None] * count
    starts, ends = (missing if v is None else v.reshape(-1).tolist() for v in values[:2])
    along = list(range(count)) if axes is None else axes.reshape(-1).tolist()
    return starts, ends, along, [1] * count if steps is None else steps.reshape(-1).tolist()


def split(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the outputs of a Split.

    Args:
        tracer: The labels of the tensors so far.
        node: The node.

    Returns:
        Labels of each output.

    Raises:
        Unknown: It splits the batch, or its sizes are not constant.
    """
    labels = tracer.labels(node.inputs[0])
    axis = attribute(node, "axis", 0) % labels.ndim
    if axis == 0:
        raise Unknown("splits the batch")
    if labels.shape[axis] == 1:
        return [labels] * len(node.outputs)
    sizes = attribute(node, "split")
    if input_at(node, 1) is not None:
        value = tracer.constant(node.inputs[1])
        if value is None:
            raise Unknown("has sizes that are not constants")
        sizes = value.tolist()
    if sizes is None:
        part = -(-labels.shape[axis] // attribute(node, "num_outputs", len(node.outputs)))
        sizes = [part] * len(node.outputs)
    return np.split(labels, np.cumsum(sizes)[:-1], axis)


def gather(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of a Gather.

    Args:
        tracer: The labels of the tensors so far.
        node: The node.

    Returns:
        Labels of the output, in a list.

    Raises:
        Unknown: Its indices are not constant, or it picks from the batch.
    """
    labels, index = tracer.labels(node.inputs[0]), tracer.constant(node.inputs[1])
    axis = attribute(node, "axis", 0) % labels.ndim
    if index is None or axis == 0:
        raise Unknown("picks what an input decides" if axis else "picks from the batch")
    if labels.shape[axis] == 1:
        return [labels.take(np.zeros((1,) * index.ndim, np.int64), axis)]
    return [labels.take(index, axis)]


def transpose(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of a Transpose.

    Args:
        tracer: The labels of the tensors so far.
        node: The node.

    Returns:
        Labels of the output, in a list.

    Raises:
        Unknown: It moves the batch axis.
    """
    labels = tracer.labels(node.inputs[0])
    perm = attribute(node, "perm", tuple(reversed(range(labels.ndim))))
    if perm[0] != 0:
        raise Unknown("moves the batch axis")
    return [labels.transpose(perm)]


def reshape(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of a Reshape, Flatten, Squeeze or Unsqueeze that keeps images apart.

    Args:
        tracer: The labels of the tensors so far.
        node: The node.

    Returns:
        Labels of the output, in a list.

    Raises:
        Unknown: It mixes images of a batch, or the image has an unknown or too large size.
    """
    source, target = node.inputs[0], node.outputs[0]
    labels = tracer.labels(source)
    before, after = tracer.sizes(source)[1:], tracer.sizes(target)[1:]
    if not tracer.sizes(source) or not tracer.sizes(target):
        raise Unknown("reshapes to or from a single number")
    if before == after and None not in before:
        return [labels]
    if None in before or after.count(None) > 1:
        raise Unknown("reshapes an image of open size", "fix the size of the images")
    sizes = [d for d in before if d is not None]
    total, known = int(np.prod(sizes)), int(np.prod([d for d in after if d is not None]))
    shape = [total // max(known, 1) if d is None else d for d in after]
    batches = (tracer.sizes(source)[0], tracer.sizes(target)[0])
    if int(np.prod(shape)) != total or (None not in batches and batches[0] != batches[1]):
        raise Unknown("mixes images of the batch")
    if total > MAX_LABELS:
        raise Unknown("reshapes a tensor too large to follow")
    full = np.broadcast_to(labels, (1, *sizes)).reshape(1, *shape)
    for axis in range(1, full.ndim):
        if full.shape[axis] and axis != 1 and (full == full.take([0], axis)).all():
            full = full.take([0], axis)
    return [full]


def reduce(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of a reduction.

    Args:
        tracer: The labels of the tensors so far.
        node: The node.

    Returns:
        Labels of the output, in a list.

    Raises:
        Unknown: It reduces over the batch, or over axes that are not constant.
    """
    labels = tracer.labels(node.inputs[0])
    axes = attribute(node, "axes")
    if axes is None and input_at(node, 1) is not None:
        value = tracer.constant(node.inputs[1])
        if value is None:
            raise Unknown("reduces over axes that are not constants")
        axes = value.reshape(-1).tolist()
    axes = tuple(int(a) % labels.ndim for a in axes or range(labels.ndim))
    if 0 in axes:
        raise Unknown("reduces over the batch")
    labels = tracer.union_along(labels, axes)
    return [labels if attribute(node, "keepdims", 1) else labels.squeeze(axes)]


def resize(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of a Resize or Upsample.

    Args:
        tracer: The labels of the tensors so far.
        node: The node.

    Returns:
        Labels of the output, in a list.

    Raises:
        Unknown: It resizes more than the image, or extrapolates.
    """
    before, after = tracer.sizes(node.inputs[0]), tracer.sizes(node.outputs[0])
    batches = {before[0], after[0]} - {None}
    if before[1] is None or before[1] != after[1] or len(batches) > 1:
        raise Unknown("resizes more than the image")
    if attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Unknown("crops and extrapolates")
    return within_channels(tracer, node)
