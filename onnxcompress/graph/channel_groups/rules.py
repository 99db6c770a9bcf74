"""Rules of operators for the scales of channels: `rule(tracer, node) -> labels of the outputs`.

For a positive scale s of each channel (and constants a, b):

| the scale passes                                 | because                                               |
|--------------------------------------------------|-------------------------------------------------------|
| Relu, LeakyRelu, PRelu, Abs, Neg                 | f(s x) = s f(x) for s > 0                             |
| MaxPool, AveragePool, global pools, ReduceMean … | the same within a channel; padding is 0 or -inf       |
| Identity, Dropout, Transpose, Reshape, Slice, …  | they move values                                      |
| Pad with 0, or with values of the channel        | s 0 = 0                                               |
| Resize and Upsample of the image                 | linear within a channel                               |
| Add, Sub, Sum, Max, Min of tensors               | f(s x, s y) = s f(x, y): both get the same scale      |
| … of a tensor and a constant                     | f(s x, s a) = s f(x, a): the constant is scaled       |
| Mul by a constant or by a gate, Div              | linear in x; the gate keeps the scale 1               |
| Clip whose bounds are 0, -inf or inf             | f(s x) = s f(x)                                       |
| Clip to [a, b]                                   | only as min(max(x, s a), s b), bounds per channel     |

Operators in KEEPS_CHANNELS forbid the scale but leave channels where they are. An operator without a rule
forbids it for its inputs and outputs.
Source: Nagel et al., ICCV 2019, §4.1; the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph.channel_groups import layout_rules
from onnxcompress.graph.channel_groups.groups import ACCURATE, Bounds, Labels, Offset, Unknown
from onnxcompress.graph.channel_groups.labels import TensorLabels
from onnxcompress.graph.query import attribute, input_at, node_label

Rule = Callable[[TensorLabels, gs.Node], Sequence[Labels]]

BROADCASTS = 8
"""First operator set in which Max and Min accept a bound for each channel."""
KEEPS_CHANNELS = (
    "BatchNormalization", "Celu", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Hardmax",
    "InstanceNormalization", "LogSoftmax", "LRN", "Log", "LpNormalization", "MeanVarianceNormalization",
    "Mish", "Pow", "Reciprocal", "Selu", "Shrink", "Sigmoid", "Sign", "Softmax", "Softplus", "Softsign",
    "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
)  # fmt: skip


def _same(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    return [tracer.labels(node.inputs[0])]


def _not_homogeneous(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    labels = tracer.labels(node.inputs[0])
    normalizes = node.op == "BatchNormalization"
    rule = "subtracts a mean" if normalizes else "is not positively homogeneous"
    remedy = "run fold-bn first" if normalizes else ""
    return [tracer.mark_unscalable(labels, Refusal(node_label(node), f"({node.op}) {rule}", remedy))]


def _prelu(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    if tracer.constant(node.inputs[1]) is None:
        raise Unknown("has a slope that is not a constant")
    return _same(tracer, node)


def _clip(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    labels = tracer.labels(node.inputs[0])
    low, high = (_bound(tracer, node, at) for at in (1, 2))
    if {low, high} <= {0.0, -np.inf, np.inf}:
        return [labels]
    text = f"(Clip) clips to [{low:g}, {high:g}], which scales would move"
    if tracer.scale_clips and low <= high and tracer.model.opset >= BROADCASTS:
        tracer.bounds.append(Bounds(node, low, high, labels))
        return [labels]
    remedy = "--clip per-channel moves the bounds with them"
    return [tracer.mark_unscalable(labels, Refusal(node_label(node), text, remedy))]


def _bound(tracer: TensorLabels, node: gs.Node, at: int) -> float:
    """Read a bound of a Clip: an attribute before opset 11, then an input; ±inf where there is none."""
    free = (-np.inf, np.inf)[at - 1]
    tensor = input_at(node, at)
    if tensor is None:
        given = float(attribute(node, ("min", "max")[at - 1], free))
    else:
        value = tracer.constant(tensor)
        if value is None or value.size != 1:
            raise Unknown("has a bound that is not a constant")
        given = float(value.item())
    return free if abs(given) >= float(np.finfo(np.float32).max) else given


def _combine(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of Add, Sub, Sum, Max and Min."""
    arrays, constants = [], []
    for at, tensor in enumerate(node.inputs):
        if tracer.carries(tensor):
            arrays.append(tracer.labels(tensor))
            continue
        value = tracer.constant(tensor)
        if value is None or (value.any() and value.dtype.name not in ACCURATE):
            raise Unknown(f"has an operand {tensor.name!r} that is no constant of type float")
        constants.append((at, value))
    rank = max([a.ndim for a in arrays] + [v.ndim for _, v in constants])
    arrays = [a.reshape((1,) * (rank - a.ndim) + a.shape) for a in arrays]
    if any(v.shape[:-1] and v.shape[0] != 1 and v.ndim == rank for _, v in constants):
        raise Unknown("has a constant operand that varies over the batch")
    labels = tracer.union(*arrays)
    for at, value in constants:
        wide = (1,) * (rank - value.ndim) + value.shape
        for axis in [a for a in range(1, min(rank, 2)) if labels.shape[a] == 1 and wide[a] > 1]:
            labels = labels.repeat(wide[axis], axis)
        if value.any():
            tracer.offsets.append(Offset(node, at, labels))
    return [labels]


def _scale(tracer: TensorLabels, node: gs.Node) -> Sequence[Labels]:
    """Label the output of Mul and Div: one operand passes, the other is a constant or a gate of scale 1."""
    first, second = node.inputs[:2]
    if not tracer.carries(second):
        return [_fitted(tracer, node, first, second)]
    if not tracer.carries(first):
        if node.op == "Div":
            raise Unknown("divides by the channels")
        return [_fitted(tracer, node, second, first)]
    data, gate = first, second
    one, two = tracer.labels(first), tracer.labels(second)
    if node.op == "Mul" and _gates(tracer, first, second):
        data, gate, one, two = second, first, two, one
    rule = f"({node.op}) multiplies {data.name!r} by {gate.name!r}"
    tracer.mark_unscalable(two, Refusal(node_label(node), rule))
    if one.ndim < two.ndim or any(a == 1 < b for a, b in zip(one.shape[1:2], two.shape[1:2], strict=False)):
        raise Unknown("broadcasts over the channels")
    return [one]


def _gates(tracer: TensorLabels, first: gs.Tensor, second: gs.Tensor) -> bool:
    """Return whether the first operand of a Mul is the gate of the second."""
    unscalable = [tracer.is_unscalable(tracer.labels(t)) for t in (first, second)]
    if unscalable[0] != unscalable[1]:
        return unscalable[0]
    return tracer.sizes(first)[2:].count(1) > tracer.sizes(second)[2:].count(1)


def _fitted(tracer: TensorLabels, node: gs.Node, data: gs.Tensor, other: gs.Tensor) -> Labels:
    """Label the product of `data` and a constant, which must not broadcast the channels."""
    labels, shape = tracer.labels(data), tracer.sizes(other)
    if len(shape) > labels.ndim:
        raise Unknown("adds axes by broadcasting")
    if len(shape) >= labels.ndim and labels.ndim and shape[0] != 1:
        raise Unknown("has a constant operand that varies over the batch")
    return labels


def _all(rule: Rule, *ops: str) -> dict[str, Rule]:
    return dict.fromkeys(ops, rule)


RULES: dict[str, Rule] = {
    **_all(_same, "Abs", "Dropout", "Identity", "LeakyRelu", "Neg", "Relu"),
    **_all(
        layout_rules.within_channels,
        *("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"),
    ),
    **_all(_not_homogeneous, *KEEPS_CHANNELS),
    **_all(_combine, "Add", "Max", "Min", "Sub", "Sum"),
    **_all(_scale, "Div", "Mul"),
    **_all(layout_rules.reshape, "Flatten", "Reshape", "Squeeze", "Unsqueeze"),
    **_all(
        layout_rules.reduce, "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"
    ),
    **_all(layout_rules.resize, "Resize", "Upsample"),
    "Clip": _clip,
    "Concat": layout_rules.concat,
    "Gather": layout_rules.gather,
    "Pad": layout_rules.pad,
    "PRelu": _prelu,
    "Slice": layout_rules.slice_,
    "Split": layout_rules.split,
    "Transpose": layout_rules.transpose,
}
"""Rules by operator of the default domain."""
