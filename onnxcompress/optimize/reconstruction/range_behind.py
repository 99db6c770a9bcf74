"""Ranges of activations by the error behind the layers that read them.

    min over low, high:   Σ_t mean_c E (t_c(x) − t_c(x̂))² / var t_c

t_c: channels of the outputs of the readers' activations. Values beyond the range in which these change
(HardSwish below -3, outliers that a SiLU or ReLU behind the next layer hides) cost nothing there, while the
squared error of the tensor itself is mostly theirs.

Images that are made without knowing the training data hold no objects: the deeper a feature, the further
real images drive it beyond them. `headroom` widens the upper end, the more the deeper.

What it is worth on YOLOv8n: `tests/benchmarks/field_accuracy.py scores`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import onnx_graphsurgeon as gs
from torch import Tensor

from onnxcompress.graph.query import is_op, is_output, value_readers
from onnxcompress.graph.self_gated import gated_output
from onnxcompress.model import Model
from onnxcompress.optimize.reconstruction.activation_range import fake
from onnxcompress.quantization.affine_grid import Grid
from onnxcompress.quantization.moving_ops import MOVING
from onnxcompress.quantization.qdq_plan import FUSED, Plan, behind_activation

IMAGES = 8
"""Images on which the readers run."""
SHARES = tuple(0.8**step for step in range(18))
"""Shares of an end that are tried, down to 1/44."""
HOPELESS = 8.0
"""Multiple of the least error so far from which on more clipping cannot help."""
MAPS = (*FUSED, "HardSigmoid", "Sigmoid", "AveragePool", "GlobalAveragePool", "MaxPool", "Identity")
"""Operators of one data input that are passed on the way to the readers."""
HEADROOM = 1.75
LOGIT = 6.0
"""Beyond it a Sigmoid is within half an 8-bit step of 0 or 1."""


def ends_behind(model: Model, plan: Plan, tensor: gs.Tensor) -> list[str]:
    """Find the tensors at which an error of a tensor is measured.

    Args:
        model: The model.
        plan: Its linear layers.
        tensor: The tensor.

    Returns:
        Names of the outputs of its readers' activations; the tensor itself, or what a gate makes of it,
        where other nodes read that.
    """
    ends: list[str] = []
    pending = [tensor]
    while pending:
        at = pending.pop()
        gated = None if is_output(model, at) else gated_output(at)
        if gated is not None:
            pending.append(gated)
            continue
        if is_output(model, at):
            ends.append(str(at.name))
        for node in value_readers(at):
            layer = plan.layers.get(id(node))
            if layer is not None and node.inputs[layer.linear.data_at] is at:
                output = node.outputs[0]
                ends.append(str((gated_output(output) or behind_activation(model, output)).name))
            elif is_op(node, *MAPS) or _by_constant(node):
                pending.append(node.outputs[0])
            else:
                ends.append(str(at.name))
    return list(dict.fromkeys(ends))


def _by_constant(node: gs.Node) -> bool:
    """Return whether the node multiplies by a constant."""
    return is_op(node, "Mul") and any(isinstance(t, gs.Constant) for t in node.inputs)


def fit_ends(
    x: Tensor,
    grid: Callable[[float, float], Grid],
    run: Callable[[Tensor], Sequence[Tensor]],
    low: float,
    high: float,
) -> tuple[float, float]:
    """Choose the ends of a tensor's range with the least relative squared error behind its readers.

    Args:
        x: Values of the tensor, (N, …).
        grid: Makes a grid of a low and a high end.
        run: Computes the tensors of `ends_behind` from values of the tensor.
        low: Smallest value, at most 0.
        high: Largest value, at least 0.

    Returns:
        The low and the high end.
    """
    wanted = run(x)
    units = [_channel_variance(t) for t in wanted]

    @cache
    def error(a: float, b: float) -> float:
        found = run(fake(x, grid(a, b)))
        parts = zip(found, wanted, units, strict=True)
        return sum(float(((f - w).square() / unit).mean()) for f, w, unit in parts)

    a, b = low, high
    for _ in range(2 if low < -0.1 * high else 1):
        if low < 0:
            a = _best_share(low, partial(error, b=b))
        b = _best_share(high, partial(error, a))
    return a, b


def _best_share(end: float, error: Callable[[float], float]) -> float:
    """Return the share of an end with the least error; smaller ones than a HOPELESS one are not tried."""
    best, least = end, math.inf
    for share in SHARES:
        found = error(end * share)
        if found < least:
            best, least = end * share, found
        elif found > HOPELESS * least:
            break
    return best


def _channel_variance(x: Tensor) -> Tensor:
    """Return the variance of each channel, (1, C, 1, …); channels that hardly vary count as others do."""
    variance = x.var([axis for axis in range(x.ndim) if axis != 1], keepdim=True)
    return variance.clamp_min(1e-3 * float(variance.mean()) + 1e-12)


def headroom(depth: float) -> float:
    """Compute the factor of the upper end for inputs that know nothing of the training data.

    Args:
        depth: Share of the network's layers that come before the tensor, from 0 to 1.

    Returns:
        The factor, from 1 to HEADROOM, reached at three quarters of the network.
    """
    return 1 + min(HEADROOM - 1, depth)


def reaches_sigmoid(tensor: gs.Tensor) -> bool:
    """Tell whether a tensor holds logits: whether, moved or concatenated at most, a Sigmoid reads it.

    Args:
        tensor: The tensor.

    Returns:
        Whether it does; the Sigmoid of a SiLU does not count.
    """
    if gated_output(tensor) is not None:
        return False
    return any(
        is_op(node, "Sigmoid")
        or (is_op(node, "Concat", *MOVING) and any(map(reaches_sigmoid, node.outputs)))
        for node in value_readers(tensor)
    )
