"""Bias correction: what rounded or removed weights change in a layer's mean output, its bias takes back.

With weights W of a reference file, Ŵ of its quantized or pruned twin, and x the input of the layer,

    E[Ŵ x + b̂] = E[W x + b]        for        b̂ = b − E[(Ŵ − W) x] = b − Σ over inputs, taps (Ŵ − W) m

where m is what each tap sees on average (`_correct_taps`: exact at zero-padded borders). m comes from the
record in closed form (`_correct_moments`: Nagel et al., Data-Free Quantization through Weight Equalization
and Bias Correction, ICCV 2019, §4.2 and appendix), or is measured on inputs of any source. b̂ is set from
the reference's b, so a second run changes nothing.

Layers go together by the name of their output tensor, else of the node; one is left alone, with the reason,
where
 1. the twin has no layer of that name, operator and shape of weight, or its weight is no constant, directly
    or through DequantizeLinear of one scale per tensor or channel;
 2. its weights differ by more than their size: the twin is not the reference with other weights (quantize
    equalizes: the reference is what it wrote with everything but the rounding);
 3. a bias is computed or shared, or missing where the weight is quantized: an integer kernel wants an int32
    one with the product of the scales (`onnxcompress quantize` gives each layer one);
 4. the mean of the layer's input is not known;
 5. the new bias does not fit its type.
An int32 bias behind a DequantizeLinear is rounded to its scale. The record stays: it is what the reference
computes, and what the corrected twin computes but for its noise.
Does not handle: rounding of activations; its mean error is near zero where ranges are not clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from onnxcompress.account import Change, Refusal
from onnxcompress.errors import OptionError, require
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.graph.query import attribute, node_label
from onnxcompress.model import Model, load
from onnxcompress.optimize.calibration import (
    InputRequest,
    Inputs,
    count_option,
    images_option,
    preprocess_option,
    synthetic_option,
)
from onnxcompress.option_fields import option
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.correct_bias.input_means import measured_means, recorded_means
from onnxcompress.passes.correct_bias.layer_matching import pairs_of, write_bias
from onnxcompress.progress import Progress, silent


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Correct the biases of a quantized or pruned model, given the model that it was made from.

    \b
    Example: onnxcompress correct-bias pruned.onnx corrected.onnx --reference net.onnx
    """

    name: ClassVar[str] = "correct-bias"

    reference: str = option("", "The model before its weights were changed.", metavar="ONNX", file="read")
    inputs: Literal["record", "layerwise", "images", "distilled", "procedural"] = option(
        "record", "Where the means of layers' inputs come from; record: its statistics, in closed form."
    )
    images: str | None = images_option()
    preprocess: str | None = preprocess_option()
    count: int | None = count_option()
    synthetic: int = synthetic_option()
    seed: int = option(0, "Of all draws.")

    def apply(self, model: Model, progress: Progress = silent) -> PassResult:
        """Correct in place. `measured`: `layers` corrected and `left`, and the `largest` correction.

        Raises OptionError without a reference or for contradictory inputs, ModelError and InputError
        where the reference or the inputs cannot be used.
        """
        self.check()
        reference = load(Path(self.reference))
        pairs, refusals = pairs_of(reference, model)
        means, inputs = self._means(reference, [pair.layer for pair in pairs], progress)
        result = PassResult(refusals=refusals, shown=None if inputs is None else inputs.shown)
        largest = 0.0
        for pair in pairs:
            label = node_label(pair.twin)
            found = means[pair.layer.node.outputs[0].name]
            if isinstance(found, Refusal):
                result.refusals.append(Refusal(label, found.rule, found.remedy))
                continue
            shift = bias_shift(pair.layer, pair.weight, found)
            written = write_bias(reference, model, pair, shift)
            if isinstance(written, Refusal):
                result.refusals.append(written)
            elif written:
                largest = max(largest, float(np.abs(shift).max()))
                result.changes.append(Change(label, "bias corrected"))
        result.measured = {
            "layers": len(result.changes),
            "left": len(result.refusals),
            "largest": largest,
            "inputs": [] if inputs is None else [asdict(used) for used in inputs.sources],
        }
        return result

    def check(self) -> None:
        """Raise OptionError without a reference, or for inputs that contradict each other."""
        if not self.reference:
            raise OptionError("--reference is needed: the model before its weights were changed")
        if self.inputs != "record":
            require(f"correct-bias --inputs {self.inputs}", "torch")
            self._request.check()
        elif self.images is not None:
            raise OptionError("--images: say --inputs images, too; --inputs record uses no images")

    @property
    def _request(self) -> InputRequest:
        return InputRequest(
            self.images, self.preprocess, self.count, self.inputs, self.synthetic, self.seed
        )

    def _means(
        self, reference: Model, layers: list[Linear], progress: Progress
    ) -> tuple[Mapping[str, np.ndarray | Refusal], Inputs | None]:
        """What the taps of each layer see on average, by name of its output tensor, and who showed it."""
        if self.inputs == "record":
            return recorded_means(reference, layers), None
        return measured_means(reference, layers, self._request, progress)


def bias_shift(layer: Linear, weight: np.ndarray, means: np.ndarray) -> np.ndarray:
    """(outputs,) E[(Ŵ − W) x], float64: what other weights change in the mean of a layer's output.

    `weight`: Ŵ, stored as the layer's own. `means`: (inputs, taps) what each tap sees on average.
    """
    change = layer.view(weight.astype(np.float64) - layer.weight.astype(np.float64))
    groups, _, inputs, taps = change.shape
    found = np.einsum("goit,git->go", change, means.reshape(groups, inputs, taps)).reshape(-1)
    return np.asarray(found * attribute(layer.node, "alpha", 1.0) if layer.node.op == "Gemm" else found)
