"""The paths from a layer's output to its readers along which a constant can be moved. See `absorb_bias`.

`graph.channel_groups` says which channel is which along the paths; the walk itself is done here, because
operators that commute with a factor are others than those that commute with an added constant.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph import layer_params
from onnxcompress.graph.channel_groups.groups import ChannelGroups, LabelledLayer, Labels
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.linear_layer import LINEAR_OPS, Linear
from onnxcompress.graph.query import (
    attribute,
    auto_pad,
    input_at,
    is_op,
    is_output,
    node_label,
    per_channel,
    producer,
)
from onnxcompress.model import Model
from onnxcompress.passes.fold_bn import into_following

MOVES = (
    "Concat", "Dropout", "Flatten", "Gather", "GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool",
    "ReduceMax", "ReduceMean", "ReduceMin", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip
"""Operators whose output rises by c in a channel when their input rises by c in that channel."""
RECTIFIERS = ("LeakyRelu", "PRelu", "Relu")


@dataclass(frozen=True)
class Reader:
    """A layer that takes over the moved bias."""

    layer: LabelledLayer
    pads: bool
    """Whether it also reads padded zeros, which stay zero: inexact at the border."""


@dataclass
class Path:
    """The paths from one tensor to all layers that read it."""

    tensor: gs.Tensor
    writer: gs.Node
    linear: Linear | None
    """The writer as a linear layer; None: it is an Add of a constant."""
    constant_at: int
    """Which operand of that Add the constant is."""
    labels: Labels
    """Channel labels of the tensor, (channels,)."""
    rank: int
    ceiling: np.ndarray
    """Upper bound of each channel, (channels,); infinite where nothing is clipped."""
    rectified: bool = False
    padded: bool = False
    """Whether a Pad with a constant lies in between."""
    readers: list[Reader] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    """Names of the tensors from the writer's output to the readers' inputs."""

    def along(self, labels: Labels, shift: np.ndarray) -> np.ndarray:
        """Map amounts of the writer's channels to other channels by their labels.

        Args:
            labels: The labels of the channels, (channels,).
            shift: The amount for each of the writer's channels, (writer's channels,).

        Returns:
            The amount for each of the labelled channels, of the shape of `labels`; 0 for labels of other
            tensors.
        """
        order = np.argsort(self.labels)
        at = np.minimum(np.searchsorted(self.labels[order], labels), len(order) - 1)
        return np.where(self.labels[order][at] == labels, shift[order][at], 0.0)


class _Blocked(Exception):
    """The reason why a constant cannot be moved along a path."""

    def __init__(self, node: str, rule: str, remedy: str = "") -> None:
        super().__init__(rule)
        self.node, self.rule, self.remedy = node, rule, remedy


def follow(
    model: Model, groups: ChannelGroups, tensor: gs.Tensor, approximate: bool
) -> Path | Refusal | None:
    """Follow all paths from a tensor to the layers that read it.

    Args:
        model: The model.
        groups: Channel labels of its tensors.
        tensor: The output of the layer whose bias is to be moved.
        approximate: Whether layers that pad with zeros are allowed.

    Returns:
        The paths, the reason why the bias cannot be moved (rules 1 to 4), or None where no linear layer
        writes the tensor.
    """
    node = producer(tensor)
    labels = groups.tensors.get(tensor.name)
    linear = groups.layer_of.get(id(node))
    if node is None or labels is None or not (linear or is_op(node, "Add")):
        return None
    channels = labels.reshape(-1)
    free = np.full(len(channels), np.inf)
    path = Path(tensor, node, linear.linear if linear else None, 0, channels, labels.ndim, free)
    try:
        if labels.ndim < 2 or labels.shape[1] != labels.size or len(np.unique(channels)) < len(channels):
            raise _Blocked(node_label(node), "does not have separate channels along axis 1")
        _check_writer(model, path)
        _walk(model, groups, path, approximate)
    except _Blocked as blocked:
        rule = f"its high bias stays: {blocked.node!r} {blocked.rule}"
        return Refusal(node_label(node), rule, blocked.remedy)
    return path


def _check_writer(model: Model, path: Path) -> None:
    """Check rule 4, and that the bias is a constant."""
    node, linear = path.writer, path.linear
    if linear is not None:
        if layer_params.bias(model, linear) is None:
            raise _Blocked(node_label(node), f"({node.op}) has a bias that is not a constant")
        return
    values = [constant_value(model, t) for t in node.inputs]
    if (values[0] is None) == (values[1] is None):
        raise _Blocked(node_label(node), "(Add) adds two tensors")
    path.constant_at = int(values[1] is not None)
    constant = values[path.constant_at]
    assert constant is not None
    if per_channel(constant, path.rank, len(path.labels)) is None:
        raise _Blocked(node_label(node), f"(Add) adds a constant of shape {list(constant.shape)}")


def _walk(model: Model, groups: ChannelGroups, path: Path, approximate: bool) -> None:
    """Check rules 1 to 3 from the tensor through all its readers."""
    pending, seen = [path.tensor], {id(path.tensor)}
    visited: set[int] = set()
    while pending:
        tensor = pending.pop(0)
        path.between.append(tensor.name)
        if is_output(model, tensor):
            raise _Blocked(tensor.name, "is an output of the model")
        for node in tensor.outputs:
            if model.in_body(node):
                raise _Blocked(tensor.name, "is read inside the body of an If, Loop or Scan")
            if is_op(node, "Shape", "Size"):
                continue
            if is_op(node, *LINEAR_OPS):
                if id(node) not in visited:
                    path.readers.append(_reader(model, groups.layer_of, node, tensor, approximate))
                visited.add(id(node))
                continue
            if node.inputs[0] is not tensor and not is_op(node, "Concat", "Max", "Min"):
                raise _Blocked(node_label(node), f"({node.op}) takes it as a parameter")
            _pass(model, groups, path, node, approximate)
            _check_channels(groups, path, node)
            new = [t for t in node.outputs if t.name in groups.tensors and id(t) not in seen]
            seen.update(id(t) for t in new)
            pending += new


def _reader(
    model: Model, layers: dict[int, LabelledLayer], node: gs.Node, tensor: gs.Tensor, approximate: bool
) -> Reader:
    layer = layers.get(id(node))
    name = node_label(node)
    if layer is None or node.inputs[layer.linear.data_at] is not tensor:
        raise _Blocked(name, f"({node.op}) is not a linear layer with a constant weight")
    if layer.linear.takes_bias and layer_params.bias(model, layer.linear) is None:
        raise _Blocked(name, f"({node.op}) has a bias that is not a constant")
    pads = into_following.is_uneven(node, layer.linear.weight)
    if pads and node.op == "ConvTranspose":  # rule 3
        raise _Blocked(name, "(ConvTranspose) does not apply all its taps everywhere")
    if pads and not approximate:  # rule 2
        raise _Blocked(name, f"({node.op}) pads with zeros", "--approximate is wrong at the border only")
    return Reader(layer, pads)


def _pass(model: Model, groups: ChannelGroups, path: Path, node: gs.Node, approximate: bool) -> None:
    """Lead the path through one operator, or raise _Blocked."""
    label = node_label(node)
    if is_op(node, *MOVES):
        return
    if is_op(node, *RECTIFIERS):
        path.rectified = True
    elif is_op(node, "Clip", "Max", "Min"):
        _clip(model, groups, path, node)
    elif is_op(node, "AveragePool"):
        pads = any(attribute(node, "pads", [])) or auto_pad(node) != "NOTSET"
        if pads and attribute(node, "count_include_pad", 0):
            raise _Blocked(label, "(AveragePool) counts zeros around the image")
    elif is_op(node, "Pad"):
        _pad(path, node, approximate)
    else:
        raise _Blocked(label, f"({node.op}) does not move with its input")


def _check_channels(groups: ChannelGroups, path: Path, node: gs.Node) -> None:
    """Check that it is known which channel of the path each channel behind an operator is."""
    written = [t for t in node.outputs if not t.is_empty()]
    for tensor in written if is_op(node, "Split") else written[:1]:  # others are masks and indices
        labels = groups.tensors.get(tensor.name)
        if labels is not None and is_op(node, "Concat"):  # of images: channels of one are those of all
            followed = attribute(node, "axis") in (1, 1 - labels.ndim)
        else:
            followed = labels is not None and bool(np.isin(labels, path.labels).all())
        if not followed:
            raise _Blocked(node_label(node), f"({node.op}) has outputs whose channels cannot be followed")


def _clip(model: Model, groups: ChannelGroups, path: Path, node: gs.Node) -> None:
    """Check that no lower bound is above 0, and note the upper bounds of the channels."""
    label = node_label(node)
    dynamic = [t for t in node.inputs if t.name in groups.tensors]
    operands = [t for t in (*node.inputs[1:], *node.inputs[:1]) if not t.is_empty() and t is not dynamic[0]]
    values = {id(t): constant_value(model, t) for t in operands}
    if len(dynamic) > 1 or any(v is None for v in values.values()):
        raise _Blocked(label, f"({node.op}) has a bound that is not a constant")
    if node.op == "Clip":
        low = values.get(id(input_at(node, 1)), attribute(node, "min", -np.inf))
        high = values.get(id(input_at(node, 2)), attribute(node, "max", np.inf))
    else:
        bounds = list(values.values())
        low = bounds[0] if node.op == "Max" else -np.inf
        high = bounds[0] if node.op == "Min" else np.inf
        if len(bounds) > 1:
            raise _Blocked(label, f"({node.op}) has several bounds")
    if np.max(low) > 0:
        raise _Blocked(label, f"({node.op}) clips from below at {np.max(low):g}")
    path.rectified |= bool(np.isfinite(low).any())
    if np.isfinite(high).any():
        labels = groups.tensors[node.outputs[0].name]
        channels = per_channel(np.asarray(high), labels.ndim, labels.shape[1])
        if channels is None or labels.shape[1] != labels.size:
            raise _Blocked(label, f"({node.op}) clips by position")
        for channel, of in enumerate(path.labels):
            met = channels[labels.reshape(-1) == of]
            path.ceiling[channel] = min([path.ceiling[channel], *met.tolist()])


def _pad(path: Path, node: gs.Node, approximate: bool) -> None:
    mode = attribute(node, "mode", "constant")
    if mode in ("constant", b"constant") and not approximate:
        rule = "(Pad) pads with numbers that do not move"
        raise _Blocked(node_label(node), rule, "--approximate is wrong at the border only")
    path.padded |= mode in ("constant", b"constant")
