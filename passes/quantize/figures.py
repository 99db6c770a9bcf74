"""The figures that `quantize` measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from onnxcompress.account import Figures
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome
from onnxcompress.quantization.ort_fusion import OptimizedNodes


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

    tuning: TuningOutcome | None = None
    """What tuning all layers together gave; its errors are those of the outputs. None: it was not done."""

    @property
    def layer_snr_db(self) -> dict[str, float]:
        """Layer -> signal to noise ratio of its own output, in decibels."""
        return {row.name: row.snr_db for row in self.layers}
