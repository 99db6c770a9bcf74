"""Leave the layers in floats whose quantization gains no time on the device and costs accuracy.

    gain_k = lat(kind k in floats) / lat(all quantized) − 1
    cost_k = noise(all quantized) − noise(kind k in floats)

noise: of the outputs over their variation (`float_tensors.Judge`). Layers whose weights and outputs have
the same shapes are of one kind: they take the same time, and go together, and so do the kinds that cost
least where there are many. All variants are timed interleaved, in one measurement. Taken are kinds that
lose time, and those that gain none and cost something, by gain over cost; then the whole is timed against
the network with all layers quantized. Where it is slower, half of the kinds, those with the most gain over
cost, go back.

What a layer takes is not read from a profile by node: OpenVINO and TensorRT run the network as one node,
and the conversions that a float layer needs between quantized ones stand in no profile of either network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxcompress.graph.query import attribute, is_op, producer
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model
from onnxcompress.passes.quantize.figures import FloatLayer, FloatLayers
from onnxcompress.passes.quantize.float_parameters import Parameters, put_back
from onnxcompress.passes.quantize.float_tensors import Judge
from onnxcompress.progress import Progress, silent
from onnxcompress.runtime.bootstrap import Ratio
from onnxcompress.runtime.stopwatch import Stopwatch

KINDS = 24
"""Kinds of layers that are timed, at most."""
OTHERS = "others"
"""The kinds beyond these, those that cost least, as one."""
SECONDS, WHOLE_SECONDS = 15.0, 5.0
"""Time for timing all kinds, and for timing the result, at most."""
NEGLIGIBLE = 0.005
"""Share of the noise below which a kind costs nothing."""
NIL = 0.003
"""Share of the latency below which a gain is none."""
NO_SLOWER = 1.01
"""Latency over that with all layers quantized, at most, of a result that is not measurably slower."""
TINY = 1e-12


def leave_unprofitable(
    original: Model,
    model: Model,
    layers: Sequence[Parameters],
    judge: Judge,
    stopwatch: Stopwatch,
    progress: Progress = silent,
) -> FloatLayers | None:
    """Choose layers that stay floats, and put them back in place.

    Args:
        original: The network before.
        model: The quantized network.
        layers: The parameters that its layers had.
        judge: The inputs, and what the network gave before.
        stopwatch: Times both networks on the device.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The layers that stay floats; None where all stay quantized.
    """
    search = _Search(original, model, layers, judge, progress)
    costs = search.costs()
    gains = stopwatch.ratios(model, search.variants, SECONDS)
    ranked = sorted(costs, key=lambda kind: max(gains[kind].value - 1, 0) / max(costs[kind], TINY))
    taken = [kind for kind in ranked if search.is_unprofitable(gains[kind], costs[kind])]
    while taken:
        progress("timing the result", 0, 1)
        trial = search.with_floats(taken)
        change = stopwatch.compare(model, trial, WHOLE_SECONDS)
        noise = search.noise(trial)
        no_slower = change.low <= 1 and change.ratio <= NO_SLOWER
        if no_slower and (noise < search.quantized_noise or change.high < 1):
            model.become(trial)
            rows = search.rows(taken, gains, costs)
            return FloatLayers(rows, change, search.quantized_noise, noise)
        taken = taken[: len(taken) // 2]
    return None


class _Search:
    """Variants of a quantized network with the layers of one kind in floats."""

    def __init__(
        self,
        original: Model,
        model: Model,
        layers: Sequence[Parameters],
        judge: Judge,
        progress: Progress,
    ) -> None:
        self._original, self._model, self._judge, self._progress = original, model, judge, progress
        self.kinds = _kinds(model, layers)
        self.variants: dict[str, Model] = {}
        self.quantized_noise = self.noise(model)

    def noise(self, model: Model) -> float:
        """Measure the noise of a network's outputs over their variation."""
        return float(10 ** (-self._judge.kept_db(model) / 10))

    def costs(self) -> dict[str, float]:
        """Measure the noise that goes with each kind, and put those together that cost least."""
        found = {}
        for at, kind in enumerate(self.kinds):
            self._progress("looking for layers that had better stay floats", at, len(self.kinds))
            found[kind] = self._cost(kind)
        rest = sorted(found, key=lambda kind: -found[kind])[KINDS - 1 :]
        if len(rest) > 1:
            for kind in rest:
                del self.variants[kind], found[kind]
            self.kinds[OTHERS] = [layer for kind in rest for layer in self.kinds.pop(kind)]
            found[OTHERS] = self._cost(OTHERS)
        return found

    def _cost(self, kind: str) -> float:
        self.variants[kind] = self.with_floats([kind])
        return self.quantized_noise - self.noise(self.variants[kind])

    def is_unprofitable(self, gain: Ratio, cost: float) -> bool:
        """Return whether quantizing a kind loses time, or gains none and costs accuracy."""
        return gain.high < 1 or (gain.value - 1 <= NIL and cost > NEGLIGIBLE * self.quantized_noise)

    def with_floats(self, kinds: Sequence[str]) -> Model:
        """Copy the network with the layers of some kinds in floats; the original where these are all."""
        if len(kinds) == len(self.kinds):
            return self._original.copy()
        variant = self._model.copy()
        put_back(variant, [layer for kind in kinds for layer in self.kinds[kind]])
        return variant

    def rows(
        self, kinds: Sequence[str], gains: Mapping[str, Ratio], costs: Mapping[str, float]
    ) -> tuple[FloatLayer, ...]:
        """Describe the layers that stay floats."""
        found = []
        for kind in kinds:
            gain, low, high = (end - 1 for end in (gains[kind].value, gains[kind].low, gains[kind].high))
            alike = self.kinds[kind]
            found += [FloatLayer(layer.label, gain, low, high, costs[kind], len(alike)) for layer in alike]
        return tuple(found)


def _kinds(model: Model, layers: Sequence[Parameters]) -> dict[str, list[Parameters]]:
    """Group layers whose operators and shapes are the same, in the order of the network."""
    shapes = tensor_shapes(model)
    makers = {tensor.name: node for node in model.graph.nodes for tensor in node.outputs}
    found: dict[str, list[Parameters]] = {}
    for layer in layers:
        node = makers[layer.output]
        quantized = is_op(producer(node.inputs[layer.data_at]), "DequantizeLinear")
        group = attribute(node, "group", 1)
        kind = f"{node.op} {layer.weight.shape} {group} {shapes.get(layer.output)} {quantized}"
        found.setdefault(kind, []).append(layer)
    return found
