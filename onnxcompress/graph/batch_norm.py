"""A BatchNormalization node as the affine map that it is at inference: `y = scale * x + shift`.

    scale = gamma / sqrt(variance + epsilon)        shift = beta - mean * scale       (float64, per channel)

A node is accepted where these rules hold (numbered; the code refers to the numbers):
 1. the operator set is 7 or newer, and `spatial` (7, 8) is not 0;
 2. it is in inference mode: no `training_mode` (14 on), no outputs but the first (before 14 they *mean*
    training mode; from 14 on they may be listed if nothing reads them);
 3. its four parameters are constants: initializers, or reached through Identity, Cast, Constant;
 4. they are vectors of one length, the number of channels;
 5. variance + epsilon > 0, and scale and shift are finite.

Over the training set the output has mean beta, and the input has the stored mean and variance. The output's
standard deviation is |gamma| sqrt(variance / (variance + epsilon)): that is |gamma| (Horton et al., arXiv
2011.09058, §3.1) except for channels that hardly vary, such as the dead ones of depthwise convolutions.
Does not handle: operator sets below 7 (`is_test`, `consumed_inputs`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.query import attribute, input_at, is_op, is_output, node_label
from onnxcompress.model import Model

OLDEST_OPSET = 7
LISTED_OUTPUTS_ALLOWED = 14
"""First operator set in which `training_mode`, not the number of outputs, means training mode."""
DEFAULT_EPSILON = float(np.float32(1e-5))
"""Attributes and their defaults are in single precision."""
PARAMETERS = ("scale", "bias", "mean", "variance")


@dataclass(frozen=True)
class BatchNorm:
    """The parameters of a BatchNormalization node; all arrays have shape (channels,), float64."""

    node: gs.Node
    gamma: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    """Mean of the input over the training set."""
    variance: np.ndarray
    """Variance of the input over the training set."""
    deviation: np.ndarray
    """Standard deviation of the input: sqrt(variance + epsilon)."""

    @property
    def scale(self) -> np.ndarray:
        """Factor of each channel, `gamma / sqrt(variance + epsilon)`."""
        return np.asarray(self.gamma / self.deviation)

    @property
    def shift(self) -> np.ndarray:
        """Offset of each channel, `beta - mean * scale`."""
        return np.asarray(self.beta - self.mean * self.scale)

    @property
    def output_std(self) -> np.ndarray:
        """Standard deviation of the output over the training set."""
        return np.asarray(np.abs(self.scale) * np.sqrt(np.maximum(self.variance, 0)))

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.gamma)


def is_batch_norm(node: gs.Node) -> bool:
    """Return whether a node is a BatchNormalization of the default domain.

    Args:
        node: The node.

    Returns:
        True for any mode and operator set; `read_batch_norm` checks those.
    """
    return is_op(node, "BatchNormalization")


def read_batch_norm(model: Model, node: gs.Node) -> BatchNorm | Refusal:
    """Read a BatchNormalization node as a per-channel affine map.

    Args:
        model: The model.
        node: A BatchNormalization node.

    Returns:
        The parameters, or the refusal that names the rule it breaks.
    """
    refusal = _check_mode(model, node)
    if refusal:
        return refusal
    values = []
    for index, name in enumerate(PARAMETERS, start=1):
        tensor = input_at(node, index)
        value = None if tensor is None else constant_value(model, tensor)
        if value is None:  # rule 3
            return Refusal(node_label(node), f"its {name} is not a constant", "make it an initializer")
        values.append(np.asarray(value, np.float64))
    shapes = [v.shape for v in values]
    if len(shapes[0]) != 1 or len(set(shapes)) != 1:  # rule 4
        found = ", ".join(f"{n} {list(s)}" for n, s in zip(PARAMETERS, shapes, strict=True))
        return Refusal(node_label(node), f"its parameters are not vectors of one length: {found}")
    gamma, beta, mean, variance = values
    with np.errstate(all="ignore"):
        deviation = np.sqrt(variance + attribute(node, "epsilon", DEFAULT_EPSILON))
        norm = BatchNorm(node, gamma, beta, mean, variance, deviation)
        bad = ~((deviation > 0) & np.isfinite(norm.scale) & np.isfinite(norm.shift))
    if bad.any():  # rule 5
        at = int(np.flatnonzero(bad)[0])
        rule = f"channel {at} has no finite scale (gamma {gamma[at]:g}, variance {variance[at]:g})"
        return Refusal(node_label(node), rule, "repair the parameters of this channel")
    return norm


def _check_mode(model: Model, node: gs.Node) -> Refusal | None:
    """Check rules 1 and 2."""
    if input_at(node, 0) is None or not node.outputs or node.outputs[0].is_empty():
        return Refusal(node_label(node), "it has no input or no output")
    if model.opset < OLDEST_OPSET:
        remedy = "convert the model with onnx.version_converter"
        return Refusal(node_label(node), f"operator set {model.opset} is below {OLDEST_OPSET}", remedy)
    if not attribute(node, "spatial", 1):
        return Refusal(node_label(node), "spatial=0: its statistics are per position, not per channel")
    extra = [t for t in node.outputs[1:] if not t.is_empty()]
    old = model.opset < LISTED_OUTPUTS_ALLOWED
    if attribute(node, "training_mode", 0) or (extra and old):
        return Refusal(node_label(node), "it is in training mode", "export the network in evaluation mode")
    if any(t.outputs or is_output(model, t) for t in extra):
        return Refusal(node_label(node), "its running statistics are read", "remove those outputs")
    return None
