"""Rules of operators for the removal of channels: `rule(tracer, node) -> labels of the outputs`.

A channel can be cut out of a tensor where each operator treats channels apart from each other:

| the cut passes                                   | what is cut with it                                   |
|--------------------------------------------------|-------------------------------------------------------|
| operators on single elements, pools, Resize      | nothing                                               |
| BatchNormalization, PRelu, InstanceNormalization | their parameters                                      |
| Add, Mul, Max, Where … of tensors                | the same channel of all of them: a gate, a stream     |
| … of a tensor and a constant                     | the constant, where it varies over the channels       |
| Concat, Split, Slice, Pad, Gather, Transpose     | sizes and positions                                   |
| Reshape, Flatten                                 | the target; each copy of a channel                    |
| DepthToSpace, SpaceToDepth                       | all channels that make up one                         |

Unlike a scale (`rules`), a cut passes operators that are not homogeneous. It does not pass what mixes
channels other than a linear layer does: Softmax or a mean over them. Where a Reshape spreads channels over
several axes (a channel shuffle), they are cut along the longest, the same ones at each place of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph.channel_groups import layout_rules
from onnxcompress.graph.channel_groups.groups import Labels, Unknown
from onnxcompress.graph.channel_groups.labels import TensorLabels
from onnxcompress.graph.channel_groups.rules import Rule
from onnxcompress.graph.query import attribute, input_at, node_label

COMBINES = ("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean",
            "Min", "Mul", "Or", "Pow", "PRelu", "Sub", "Sum", "Where", "Xor")  # fmt: skip
"""Operators on single elements with several operands, which broadcast."""
SINGLE = (
    "Abs", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor",
    "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal",
    "Relu",
    "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh",
    "ThresholdedRelu",
)  # fmt: skip
"""Operators on single elements."""
SOFTMAX_OPSET = 13
"""From which on a Softmax mixes one axis, by default the last; before, all from one on, by default 1."""


def varying(labels: Labels) -> tuple[int, ...]:
    """List the axes along which labels may vary.

    Args:
        labels: The labels of a tensor.

    Returns:
        Axes whose size is not 1.
    """
    return tuple(axis for axis, size in enumerate(labels.shape) if size > 1)


def _same(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    return [tracer.labels(node.inputs[0])]


def _normalize(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of a BatchNormalization, whose parameters must be constants of axis 1."""
    _check_parameters(tracer, node)
    (labels,) = _same(tracer, node)
    if varying(labels) not in ((), (1,)):
        raise Unknown("normalizes axis 1, its channels lie along others")
    return [labels]


def _check_parameters(tracer: TensorLabels, node: gs.Node) -> None:
    if any(tracer.constant(tensor) is None for tensor in node.inputs[1:]):
        raise Unknown("has parameters that are not constants")
    if any(not tensor.is_empty() for tensor in node.outputs[1:]):
        raise Unknown("is in training mode", "export the model in inference mode")


def _dropped(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of a Dropout, and its mask."""
    return [*_same(tracer, node)] * 2


def _max_pool(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of a MaxPool; its indices are counted over all channels, so these stay with them."""
    labels = layout_rules.within_channels(tracer, node)
    if any(not tensor.is_empty() for tensor in node.outputs[1:]):
        tracer.mark_unscalable(labels[0], Refusal(node_label(node), "(MaxPool) gives indices, too"))
    return labels


def _instances(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    _check_parameters(tracer, node)
    return layout_rules.within_channels(tracer, node)


def _combine(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of an operator with several operands: the same channel of each is tied.

    An operand of size 1 along the channels, such as a mask of the image, is not tied to them. One that is
    computed from shapes must be: it cannot be cut.
    """
    operands = [t for t in node.inputs if not t.is_empty()]
    ranks = [tracer.labels(t).ndim if tracer.carries(t) else len(tracer.sizes(t)) for t in operands]
    rank = max(ranks)
    data = [t for t in operands if tracer.carries(t)]
    labels = [_aligned(tracer.labels(t).shape, rank) for t in data]
    axes = [axis for axis in range(rank) if any(shape[axis] > 1 for shape in labels)]
    for tensor in operands:
        if not tracer.carries(tensor) and tracer.constant(tensor) is None:
            sizes = _aligned(tracer.sizes(tensor), rank)
            if any(sizes[axis] != 1 for axis in axes):
                raise Unknown(f"has an operand {tensor.name!r} that is computed from shapes")
    tied = []
    for tensor, shape in zip(data, labels, strict=True):
        sizes = _aligned(tracer.sizes(tensor), rank)
        if not any(shape[axis] == sizes[axis] == 1 for axis in axes):
            tied.append(tracer.labels(tensor).reshape(shape))
    if not tied or any(array.shape != tied[0].shape for array in tied):
        raise Unknown("broadcasts channels")
    return [tracer.union(*tied)]


def _aligned(shape: Sequence[int | None], rank: int) -> tuple[int, ...]:
    """Put axes of size 1 in front of a shape; an unknown size counts as 0."""
    return (1,) * (rank - len(shape)) + tuple(0 if size is None else size for size in shape)


def _along(default: int) -> Rule:
    """Return the rule of an operator that mixes all elements along an axis."""

    def rule(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
        labels = tracer.labels(node.inputs[0])
        old = tracer.model.opset < SOFTMAX_OPSET and node.op in ("Hardmax", "LogSoftmax", "Softmax")
        axis = attribute(node, "axis", 1 if old else default) % labels.ndim
        last = labels.ndim if old or node.op == "LayerNormalization" else axis + 1
        if node.op == "LayerNormalization":
            _check_layer_norm(tracer, node, labels.ndim - axis)
        return [_keep_mixed(tracer, node, labels, range(axis, last))]

    return rule


def _check_layer_norm(tracer: TensorLabels, node: gs.Node, axes: int) -> None:
    """Refuse a LayerNormalization with parameters of more axes than it mixes, or more outputs."""
    if any(not tensor.is_empty() for tensor in node.outputs[1:]):
        raise Unknown("gives its mean and deviation, too")
    if any(len(tracer.sizes(t)) > axes for t in node.inputs[1:] if not t.is_empty()):
        raise Unknown("has parameters that vary over channels")


def _reduce(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    axes = attribute(node, "axes")
    if axes is None:
        value = tracer.constant(input_at(node, 1))
        axes = [] if value is None else value.reshape(-1).tolist()
    labels = tracer.labels(node.inputs[0])
    _keep_mixed(tracer, node, labels, [axis % labels.ndim for axis in axes or range(1, labels.ndim)])
    return layout_rules.reduce(tracer, node)


def _keep_mixed(tracer: TensorLabels, node: gs.Node, labels: Labels, axes: Sequence[int]) -> Labels:
    """Mark channels that lie along one of these axes, which the operator mixes: they stay."""
    if any(labels.shape[axis] > 1 for axis in axes):
        tracer.mark_unscalable(labels, Refusal(node_label(node), f"({node.op}) mixes channels"))
    return labels


def _reshape(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of a Reshape; where channels vary over several axes, all but one are tied."""
    (labels,) = layout_rules.reshape(tracer, node)
    if len(varying(labels)) > 1:
        tied = tracer.roots()[labels]  # the groups of a convolution may be tied to each other already
        axes = [axis for axis in varying(labels) if (tied != tied.take([0], axis)).any()]
        longest = max(axes, key=lambda axis: labels.shape[axis], default=0)
        tracer.union_along(labels, tuple(axis for axis in axes if axis != longest))
    return [labels]


def _slice(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    labels, steps = tracer.labels(node.inputs[0]), tracer.constant(input_at(node, 4))
    if steps is not None:
        given = tracer.constant(input_at(node, 3))
        axes = range(steps.size) if given is None else (given.reshape(-1) % labels.ndim).tolist()
        for axis, step in zip(axes, steps.reshape(-1).tolist(), strict=True):
            if step != 1 and labels.shape[axis] > 1:
                raise Unknown("takes channels in steps")
    return layout_rules.slice_(tracer, node)


def _depth_to_space(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    area = attribute(node, "blocksize") ** 2
    labels = tracer.expanded(node.inputs[0], 1).reshape(-1)
    if attribute(node, "mode", "DCR") == "DCR":
        parts = tracer.union_along(labels.reshape(area, -1), (0,))
    else:
        parts = tracer.union_along(labels.reshape(-1, area), (1,))
    return [parts.reshape(1, -1, 1, 1)]


def _space_to_depth(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    area = attribute(node, "blocksize") ** 2
    return [np.tile(tracer.expanded(node.inputs[0], 1).reshape(1, -1, 1, 1), (1, area, 1, 1))]


def _all(rule: Callable[..., Sequence[Labels]], *ops: str) -> dict[str, Rule]:
    return dict.fromkeys(ops, rule)


CUT_RULES: dict[str, Rule] = {
    **_all(_same, *SINGLE),
    **_all(_combine, *COMBINES),
    **_all(
        layout_rules.within_channels,
        *("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool"),
    ),
    **_all(_along(-1), "Hardmax", "LayerNormalization", "LogSoftmax", "LpNormalization", "Softmax"),
    **_all(_reshape, "Flatten", "Reshape", "Squeeze", "Unsqueeze"),
    **_all(_reduce, "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
           "ReduceProd", "ReduceSum", "ReduceSumSquare"),
    **_all(layout_rules.resize, "Resize", "Upsample"),
    "BatchNormalization": _normalize,
    "Concat": layout_rules.concat,
    "DepthToSpace": _depth_to_space,
    "Gather": layout_rules.gather,
    "Dropout": _dropped,
    "InstanceNormalization": _instances,
    "MaxPool": _max_pool,
    "Pad": layout_rules.pad,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": layout_rules.split,
    "Transpose": layout_rules.transpose,
}  # fmt: skip
"""Rules by operator of the default domain."""
