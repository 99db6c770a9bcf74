"""Mean and variance of each channel of any tensor, from recorded statistics alone, in closed form.

A recorded tensor's channels are Gaussians N(β, γ²). Behind it, with φ, Φ the density and distribution of
N(0, 1), and a' = (a − μ)/σ, b' = (b − μ)/σ (Nagel et al., ICCV 2019, §4.2.1, and its second moment):

    Clip [a, b]   E[y]  = a Φ(a') + b (1 − Φ(b')) + μ (Φ(b') − Φ(a')) + σ (φ(a') − φ(b'))
                  E[y²] = a² Φ(a') + b² (1 − Φ(b')) + (μ² + σ²) (Φ(b') − Φ(a'))
                          + σ ((μ + a) φ(a') − (μ + b) φ(b'))
    Relu          [0, ∞]; LeakyRelu, PRelu: relu(x) − s relu(−x); Min and Max with a constant: one bound
    others        (Sigmoid, HardSwish, x · sigmoid(x), x · clip(x + 3) / 6, …) the integral, over a grid of
                  QUADRATURE points
    Add, Sub      means add; variances, too, as if independent
    Mul           by a constant, or by a gate: E[x] E[g], as if independent
    pools         the mean over positions keeps the mean; its variance is taken to stay, an upper bound that
                  matters only to an activation behind the pool
    moves         Concat, Slice, Flatten, Pad of channels, …: every channel by itself (`channel_groups`)

Chains of functions of one tensor are treated as one function. Otherwise an operator takes its input for a
Gaussian with these moments: nearly right behind sums, less so for a second activation behind a pool or a
Concat.
Does not handle: MaxPool, Softmax, normalizations: their means need samples.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.graph.channel_groups.groups import ChannelGroups
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.query import attribute, input_at, is_op, node_label, per_channel, producer
from onnxcompress.model import Model
from onnxcompress.statistics.gaussian import FUNCTIONS, Function, Pair, clipped, integrate
from onnxcompress.statistics.record import ChannelStatistics

POINTWISE = ("Add", "Clip", "Div", "Max", "Min", "Mul", "Relu", "Sub", *FUNCTIONS)
SAME = ("AveragePool", "Dropout", "GlobalAveragePool", "Identity", "ReduceMean")
MOVES = (
    "Concat",
    "Flatten",
    "Gather",
    "Pad",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
REMEDY = "give it inputs: --inputs distilled, procedural or layerwise, or --images"


class UnknownMoments(Exception):
    """The reason why the moments of a tensor do not follow from the record."""

    def __init__(self, rule: str, remedy: str = REMEDY) -> None:
        super().__init__(rule)
        self.rule, self.remedy = rule, remedy


class MomentPropagation:
    """Propagates moments through one graph, from known statistics of some of its tensors."""

    def __init__(self, model: Model, groups: ChannelGroups, known: Mapping[str, ChannelStatistics]) -> None:
        self.model, self.groups, self.known = model, groups, known
        self._found: dict[str, Pair | UnknownMoments] = {}

    def of(self, tensor: gs.Tensor) -> Pair:
        """Compute the moments of a tensor.

        Args:
            tensor: The tensor.

        Returns:
            Mean and variance of each channel, shape (channels,) each, float64.

        Raises:
            UnknownMoments: They do not follow from the known statistics.
        """
        if tensor.name not in self._found:
            try:
                self._found[tensor.name] = self._compute(tensor)
            except UnknownMoments as problem:
                self._found[tensor.name] = problem
        found = self._found[tensor.name]
        if isinstance(found, UnknownMoments):
            raise found
        return found

    def _compute(self, tensor: gs.Tensor) -> Pair:
        known, node = self.known.get(tensor.name), producer(tensor)
        if known is not None:
            return known.mean.astype(np.float64), known.std.astype(np.float64) ** 2
        if node is None:
            return self._image(tensor)
        if is_op(node, *SAME):
            return self.of(node.inputs[0])
        base = self._base(tensor)
        several = base is not tensor and all(base is not t for t in node.inputs)
        function = self._function(tensor, base) if several else None
        if function is not None:
            return integrate(*self.of(base), function)
        if is_op(node, "Relu", "LeakyRelu", "PRelu"):
            return self._rectify(node)
        if is_op(node, "Clip", "Max", "Min"):
            return self._clip(node)
        if is_op(node, *FUNCTIONS):
            return integrate(*self.of(node.inputs[0]), FUNCTIONS[node.op](node))
        if is_op(node, "Add", "Sub", "Sum", "Mul", "Div"):
            return self._combine(node)
        if is_op(node, *MOVES) and tensor.name in self.groups.origins:
            return self._move(node, tensor)
        raise UnknownMoments(f"no closed form is known for {node.op} {node_label(node)!r}")

    def _base(self, tensor: gs.Tensor) -> gs.Tensor:
        """Find the nearest tensor behind element-wise operators, or a recorded one among them."""
        while tensor.name not in self.known and is_op(node := producer(tensor), *POINTWISE):
            data = [t for t in node.inputs if t.name in self.groups.origins]
            if len(data) != 1:
                break
            tensor = data[0]
        return tensor

    def _image(self, tensor: gs.Tensor) -> Pair:
        """Assume N(0, 1) of an input without statistics, as Horton et al. do of normalized images."""
        channels = tensor.shape[1] if tensor.shape is not None and len(tensor.shape) > 1 else None
        if not isinstance(channels, int):
            raise UnknownMoments(
                f"the statistics of the input {tensor.name!r} are not known", "run calibrate"
            )
        return np.zeros(channels), np.ones(channels)

    def _constant(self, tensor: gs.Tensor, like: gs.Tensor) -> np.ndarray | None:
        """Read a constant operand beside a tensor, shape (channels,); None where it is not a constant."""
        value = constant_value(self.model, tensor)
        labels = self.groups.origins.get(like.name)
        if value is None or labels is None:
            return None
        found = per_channel(value, max(labels.ndim, value.ndim), len(self.of(like)[0]))
        if found is None:
            raise UnknownMoments(f"the constant {tensor.name!r} is not one number for each channel")
        return found

    def _rectify(self, node: gs.Node) -> Pair:
        mean, variance = self.of(node.inputs[0])
        above = clipped(mean, variance, 0.0, np.inf)
        if is_op(node, "Relu"):
            return above
        slope: np.ndarray | None = np.array(attribute(node, "alpha", 0.01))
        if is_op(node, "PRelu"):
            slope = self._constant(node.inputs[1], node.inputs[0])
        if slope is None:
            raise UnknownMoments(f"the slope of PRelu {node_label(node)!r} is not a constant")
        below = clipped(-mean, variance, 0.0, np.inf)
        second = (above[1] + above[0] ** 2) + slope**2 * (below[1] + below[0] ** 2)
        first = above[0] - slope * below[0]
        return first, np.maximum(second - first**2, 0.0)

    def _clip(self, node: gs.Node) -> Pair:
        if is_op(node, "Clip"):
            source, ends = node.inputs[0], self._bounds(node)
        else:
            if len(node.inputs) != 2:
                raise UnknownMoments(f"{node.op} {node_label(node)!r} has {len(node.inputs)} operands")
            at = int(node.inputs[0].name not in self.groups.origins)
            source, end = node.inputs[at], self._constant(node.inputs[1 - at], node.inputs[at])
            if end is None:
                raise UnknownMoments(f"{node.op} {node_label(node)!r} compares two tensors")
            ends = (end, np.array(np.inf)) if is_op(node, "Max") else (np.array(-np.inf), end)
        return clipped(*self.of(source), *ends)

    def _bounds(self, node: gs.Node) -> tuple[np.ndarray, np.ndarray]:
        """Read the bounds of a Clip; infinite where it has none."""
        ends = []
        for at, (free, key) in enumerate([(-np.inf, "min"), (np.inf, "max")], start=1):
            tensor = input_at(node, at)
            value = (
                np.array(attribute(node, key, free))
                if tensor is None
                else constant_value(self.model, tensor)
            )
            if value is None or value.size != 1:
                raise UnknownMoments(f"a bound of Clip {node_label(node)!r} is not a constant")
            ends.append(value.reshape(()).astype(np.float64))
        return ends[0], ends[1]

    def _combine(self, node: gs.Node) -> Pair:
        data = [t for t in node.inputs if t.name in self.groups.origins]
        if not data:
            raise UnknownMoments(f"the channels of {node.op} {node_label(node)!r} are not known")
        gated = self._gated(node)
        if gated is not None:
            return gated
        pairs = []
        for tensor in node.inputs:
            number = None if tensor in data else self._constant(tensor, data[0])
            pairs.append(self.of(tensor) if number is None else (number, np.zeros_like(number)))
        if is_op(node, "Mul", "Div"):
            (mean, variance), (other, spread) = pairs
            if is_op(node, "Div"):
                if spread.any():
                    raise UnknownMoments(f"Div {node_label(node)!r} divides by a tensor")
                other = 1 / other
            first = mean * other
            second = (variance + mean**2) * (spread + other**2)
            return first, np.maximum(second - first**2, 0.0)
        signs = [1.0, -1.0] if is_op(node, "Sub") else [1.0] * len(pairs)
        mean = np.sum([s * p[0] for s, p in zip(signs, pairs, strict=True)], axis=0)
        return mean, np.sum([p[1] for p in pairs], axis=0)

    def _gated(self, node: gs.Node) -> Pair | None:
        """Integrate x · g(x), as exporters write SiLU and HardSwish; None for nodes of other forms."""
        for at in (0, 1) if is_op(node, "Mul") else ():
            source = node.inputs[at]
            gate = None if source is node.inputs[1 - at] else self._function(node.inputs[1 - at], source)
            if gate is not None:
                mean, variance = self.of(source)
                return integrate(mean, variance, _times(gate))
        return None

    def _function(self, tensor: gs.Tensor, source: gs.Tensor) -> Function | None:
        """Express a tensor as an element-wise function of the source; None where none is known."""
        if tensor is source:
            return lambda x: x
        node = producer(tensor)
        if is_op(node, "Relu", "Clip", *FUNCTIONS):
            inner = self._function(node.inputs[0], source)
            bounds = self._bounds(node) if is_op(node, "Clip") else (np.array(0.0), np.array(np.inf))
            outer = FUNCTIONS[node.op](node) if node.op in FUNCTIONS else _within(*bounds)
            return None if inner is None else _chain(outer, inner)
        if is_op(node, "Add", "Div", "Max", "Min", "Mul", "Sub") and len(node.inputs) == 2:
            for at in (0,) if node.op in ("Div", "Sub") else (0, 1):
                inner = self._function(node.inputs[at], source)
                number = None if inner is None else self._constant(node.inputs[1 - at], source)
                if inner is not None and number is not None:
                    return _with_number(node.op, inner, number[:, None])
        return None

    def _move(self, node: gs.Node, tensor: gs.Tensor) -> Pair:
        """Gather the moments of a tensor that holds channels of the inputs, or new ones that are zero."""
        table: dict[int, tuple[float, float]] = {}
        for source in node.inputs:
            labels = self.groups.origins.get(source.name)
            if labels is not None:
                mean, variance = self.of(source)
                if labels.size != len(mean):
                    raise UnknownMoments(f"the channels of {source.name!r} vary over the image")
                pairs = zip(mean.tolist(), variance.tolist(), strict=True)
                table |= zip(labels.reshape(-1).tolist(), pairs, strict=True)
        labels = self.groups.origins[tensor.name]
        if labels.ndim < 2 or labels.size != labels.shape[1]:
            raise UnknownMoments(f"the channels of {tensor.name!r} vary over the image")
        found = np.array([table.get(label, (0.0, 0.0)) for label in labels.reshape(-1).tolist()])
        return found[:, 0], found[:, 1]


def _times(gate: Function) -> Function:
    return lambda x: x * gate(x)


def _within(low: np.ndarray, high: np.ndarray) -> Function:
    return lambda x: np.clip(x, low, high)


def _chain(outer: Function, inner: Function) -> Function:
    return lambda x: outer(inner(x))


def _with_number(op: str, inner: Function, number: np.ndarray) -> Function:
    return lambda x: np.asarray(PAIRWISE[op](inner(x), number))


PAIRWISE = {
    "Add": np.add,
    "Div": np.divide,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mul": np.multiply,
    "Sub": np.subtract,
}
