"""The figures that `quantize` measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from onnxcompress.account import Figures, Refusal
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome
from onnxcompress.quantization.ort_fusion import OptimizedNodes
from onnxcompress.runtime.block_latency import LatencyChange


@dataclass(frozen=True)
class QuantizedLayerRow:
    """A layer that was quantized."""

    name: str
    op: str
    weight_bits: int
    input_bits: int
    """Bits of the layer's input; 0: it stays a float."""
    weight_scale: tuple[float, float]
    """Smallest and largest scale of the weight's channels."""
    input_scale: float | None
    """Scale of the input; None: it stays a float."""
    input_range: tuple[float, float] | None
    """Smallest and largest value that the quantized input can have; None: it stays a float."""
    snr_db: float
    """Signal to noise ratio of the layer's output, in decibels, before all layers were tuned together
    and any tensor was left in floats."""


@dataclass(frozen=True)
class Budget:
    """What a budget for the weights' bits gave."""

    counted: Literal["stored", "information"]
    """Whether bits count as the file stores them (4 or 8), or as information."""
    average_bits: float
    """Bits of a weight, on average."""
    budget_bits: float
    """Bits that a weight might have, on average."""
    megabytes: float
    """Size of all weights, in 10⁶ bytes, counted as `counted` says."""
    layers_by_bits: Mapping[int, int]
    """Bits of the weight -> number of layers."""
    estimated_error: float
    """Error of the outputs over their variance, as the sum of what each layer costs alone."""
    sensitivity: str
    """Origin of the layers' sensitivities: a file, or the inputs that they were measured on."""
    seconds: float
    """Time for measuring them and choosing the bits."""


@dataclass(frozen=True)
class FloatLayer:
    """A layer that stays a float layer since quantizing it loses time, or gains none and costs accuracy."""

    name: str
    gain: float
    """Share of the quantized network's latency that quantizing the layers of its kind gains; negative
    where they take longer."""
    low: float
    """Lower end of the gain's 95 % interval."""
    high: float
    """Upper end of the gain's 95 % interval."""
    noise: float
    """Noise of the outputs over their variation that goes with the layers of its kind."""
    of_its_kind: int
    """Number of layers that were measured together, as a rule those with the same shapes."""

    def refusal(self, provider: str) -> Refusal:
        """Say why the layer stays a float layer.

        Args:
            provider: The provider on which it was timed.

        Returns:
            A refusal with the figures.
        """
        kind = (
            "quantizing it" if self.of_its_kind == 1 else f"quantizing the {self.of_its_kind} of its kind"
        )
        time = f"{abs(100 * self.gain):.2g} % {'less' if self.gain >= 0 else 'more'} time"
        rule = (
            f"it stays a float layer: {kind} takes {time} on {provider}, and adds noise of "
            f"{100 * self.noise:.2g} % of the outputs' variation"
        )
        return Refusal(self.name, rule, "without --only-faster it is quantized")


@dataclass(frozen=True)
class FloatLayers:
    """The layers that stay float layers, and what that gives."""

    layers: tuple[FloatLayer, ...]
    latency: LatencyChange
    """Latency with all layers quantized, and with these in floats."""
    noise_before: float
    """Noise of the outputs over their variation with all layers quantized."""
    noise: float
    """The same with these layers in floats."""


@dataclass(frozen=True)
class QuantizeFigures(Figures):
    """The figures of `quantize`."""

    layers: tuple[QuantizedLayerRow, ...]
    """The quantized layers, in the order of the network."""
    channel_ranges: int
    """Number of channel groups that were brought to equal ranges first."""
    runtime: OptimizedNodes
    """What onnxruntime makes of the result."""
    budget: Budget | None = None
    """What the budget gave; None: there was none."""
    float_tensors: Mapping[str, float] | None = None
    """Tensor that stays floats -> noise of the outputs over their variation if it alone were quantized;
    None: none had to."""
    float_layers: FloatLayers | None = None
    """Layers that gain no time by being quantized and cost accuracy; None: none, or nobody asked."""

    tuning: TuningOutcome | None = None
    """What tuning all layers together gave; its errors are those of the outputs. None: it was not done."""

    @property
    def layer_snr_db(self) -> dict[str, float]:
        """Layer -> signal to noise ratio of its own output, in decibels."""
        return {row.name: row.snr_db for row in self.layers}
