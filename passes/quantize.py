"""Quantize weights and activations after training, without data, to QDQ that runtimes fuse.

 1. BatchNorm and zero pads are folded                                       `_quantize_prepare`
 2. what is quantized where, and with how many bits                          `quantization.plan`
 3. inputs: images distilled from the record, procedural ones, …             `inputs.source`
 4. layer by layer, the student reading its own earlier error: ranges of activations by least squares,
    weights rounded in closed form, biases corrected                         `optimize.quantizer`
 5. QuantizeLinear and DequantizeLinear are written                          `quantization.emit`
 6. onnxruntime loads the result: what fused, and how far the outputs are    `quantization.fused`

Sources: Nagel et al., Data-Free Quantization (ICCV 2019); Horton et al. (arXiv 2011.09058) §3.4 for
layer-wise reconstruction on generated inputs; GPTQ and QuantEase for its closed form (`optimize.rounding`).

Bits: weights and activations have 2 to 8 each. onnxruntime has integer kernels for 8 only: with fewer the
file is no faster. Fewer are held in 8-bit types, in the narrower range (see `quantization.emit`), or with
`small_types` in 4-bit ones. The first and last layer keep 8 bits unless told otherwise, as is usual; so do
residual sums (`plan`).

Inputs: `auto` takes images if there are any; else, with 8 bits, procedural ones through the twin that has
the recorded statistics (`layerwise`: made at once); with fewer distilled ones, which take longer and are
better for EfficientNet-Lite0; without a record plain procedural ones.

`overflow_safe`: without it, onnxruntime's result on a CPU with AVX2 and no VNNI is far from what the file
says (`tests/benchmarks/overflow.py`). It costs next to nothing: no pair of weights is too large, but each
has 8 bits (`optimize.integers`). uint8 weights cannot overflow, and are slower; depthwise kernels add in
32 bits.

Does not handle: several inputs; models that are quantized already; see `plan` for the operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from onnxcompress.errors import ModelError, OptionError
from onnxcompress.inputs.source import (
    InputRequest,
    count_option,
    images_option,
    inputs_option,
    preprocess_option,
)
from onnxcompress.model import Model
from onnxcompress.passes._quantize_prepare import prepare
from onnxcompress.passing import Pass, PassResult, Progress, Refusal, option, silent

OPSET = 13
"""From which on scales may be per channel."""
QDQ = ("QuantizeLinear", "DequantizeLinear")
SMALL_OPSET = 21
"""From which on there are int4 and uint4."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize weights and activations to few bits, without data.

    \b
    Example:
      onnxcompress quantize net.onnx int8.onnx
      onnxcompress quantize net.onnx w4.onnx --weight-bits 4 --activation-bits 0
      onnxcompress quantize net.onnx mixed.onnx --bits-budget 4.5
    """

    name: ClassVar[str] = "quantize"
    needs: ClassVar[tuple[str, ...]] = ("torch", "onnxruntime")

    images: str | None = images_option()
    preprocess: str | None = preprocess_option()
    count: int | None = count_option()
    inputs: Literal["auto", "images", "distilled", "procedural", "layerwise"] = inputs_option()
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

    def apply(self, model: Model, progress: Progress = silent) -> PassResult:
        """Quantize in place; what cannot be comes back as refusals."""
        self.check()
        if model.opset < OPSET:
            raise ModelError(
                f"{model.name}: opset {model.opset}; {OPSET} or later is needed for scales per channel; "
                "convert it with onnx.version_converter"
            )
        if self.small_types and model.opset < SMALL_OPSET:
            raise ModelError(
                f"{model.name}: opset {model.opset}; --small-types needs {SMALL_OPSET} or later; "
                "convert it with onnx.version_converter"
            )
        if any(node.op in QDQ for node in model.graph.nodes):
            rule = "it is quantized already: it has QuantizeLinear or DequantizeLinear nodes"
            return PassResult(refusals=[Refusal(model.name, rule, "start from the float model")])
        from onnxcompress.passes._quantize_work import quantize

        original = model.copy()
        changes = prepare(model)
        return quantize(self, original, model, changes, progress)

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

    @property
    def mixed(self) -> bool:
        """Whether layers get bits of their own, under a budget."""
        return self.bits_budget is not None or self.size_budget is not None

    @property
    def safe(self) -> bool:
        """Whether pairs of 8-bit weights stay small (`optimize.integers`)."""
        return self.overflow_safe and (self.weight_type, self.activation_type) == ("int8", "uint8")

    @property
    def request(self) -> InputRequest:
        return InputRequest(
            self.images, self.preprocess, self.count, self.inputs, self.synthetic, self.seed
        )
