"""The options of `quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxcompress.errors import OptionError
from onnxcompress.optimize.calibration import (
    InputRequest,
    count_option,
    images_option,
    inputs_option,
    preprocess_option,
)
from onnxcompress.option_fields import input_shape_option, option


@dataclass(frozen=True)
class QuantizeOptions:
    """What `quantize` is asked for; its fields are the options of the command."""

    images: str | None = images_option()
    preprocess: str | None = preprocess_option()
    count: int | None = count_option()
    inputs: Literal["auto", "images", "distilled", "procedural", "layerwise"] = inputs_option()
    input_shape: str | None = input_shape_option()
    synthetic: int = option(128, "Images to make.")
    weight_bits: int = option(8, "Of weights, 2 to 8; with a budget the most.")
    activation_bits: int = option(8, "Of what layers read, 2 to 8; 0: weights only.")
    first_last: int = option(8, "Bits of the first and last layer, at least; 0: as the others.")
    depthwise: int = option(
        8,
        "Bits of depthwise convolutions where weights alone are quantized, at least: few weights whose "
        "errors nothing averages; 0: as the others.",
    )
    bits_budget: float | None = option(
        None,
        "Average bits of all weights, at most; each layer gets its own, those with the least error. Fewer "
        "bits make the file smaller only with --small-types; the budget then counts 4 or 8.",
        metavar="BITS",
    )
    size_budget: float | None = option(
        None, "The same as a size: MB (10⁶ bytes) of all weights, scales not counted.", metavar="MB"
    )
    sensitivity: str | None = option(
        None,
        "With a budget: what `onnxcompress sensitivity MODEL --json` printed, instead of measuring.",
        metavar="JSON",
        file="read",
    )
    per_channel: bool = option(True, "A scale for each output channel of a weight, or one per tensor.")
    activation_type: Literal["uint8", "int8"] = option("uint8", "How activations are stored.")
    weight_type: Literal["int8", "uint8"] = option("int8", "How weights are stored.")
    small_types: bool = option(
        False, "Store 4 bits and fewer as int4 and uint4 (opset 21 and later): half the size."
    )
    overflow_safe: bool = option(
        True, "8-bit weights of which no two overflow onnxruntime's kernels for CPUs without VNNI."
    )
    symmetric: bool = option(False, "Activations with zero point in the middle (TensorRT, with int8).")
    ranges: Literal["mse", "minmax"] = option("mse", "Activation ranges: least squares, or the ends seen.")
    reconstruct: bool = option(True, "Round weights so that layers' outputs stay, not each to its nearest.")
    stretch: bool = option(
        True,
        "Give channels between layers equal ranges first, by factors folded into the layers; not where "
        "activations stay floats.",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where torch computes.")
    seed: int = option(0, "Of all draws.")

    def check(self) -> None:
        """Raises OptionError for wrong options."""
        self.request.check()
        for name, least in (
            ("weight_bits", 2),
            ("activation_bits", 0),
            ("first_last", 0),
            ("depthwise", 0),
        ):
            value = getattr(self, name)
            if not (value == 0 and least == 0) and not 2 <= value <= 8:
                raise OptionError(
                    f"--{name.replace('_', '-')} {value}: expected 2 to 8" + (", or 0" if not least else "")
                )

        for name, low, high in (("bits_budget", 2.0, 8.0), ("size_budget", 0.0, float("inf"))):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                said = "2 to 8 bits" if name == "bits_budget" else "0 or more megabytes"
                raise OptionError(f"--{name.replace('_', '-')} {value:g}: expected {said}")
        if self.sensitivity is not None and not self.mixed:
            raise OptionError("--sensitivity: give a budget with it, --bits-budget or --size-budget")

    def hints(self) -> list[str]:
        """Options that leave more of the network what it is."""
        found = ["--weight-bits 8"] if self.weight_bits < 8 else []
        if self.activation_bits:
            found.append("--activation-bits 8" if self.activation_bits < 8 else "--activation-bits 0")
        if not self.images:
            found.append("--images with a hundred real ones")
            found += [f"--inputs {kind}" for kind in ("distilled", "procedural") if kind != self.inputs]
        return found

    @property
    def mixed(self) -> bool:
        """Whether layers get bits of their own, under a budget."""
        return self.bits_budget is not None or self.size_budget is not None

    @property
    def safe(self) -> bool:
        """Whether pairs of 8-bit weights stay small (`optimize.reconstruction.saturation`)."""
        return self.overflow_safe and (self.weight_type, self.activation_type) == ("int8", "uint8")

    @property
    def request(self) -> InputRequest:
        return InputRequest(
            self.images,
            self.preprocess,
            self.count,
            self.inputs,
            self.synthetic,
            self.seed,
            input_shape=self.input_shape,
        )
