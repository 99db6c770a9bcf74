"""Bias correction: change a layer's bias by the mean error that its rounded or pruned weights cause.

With weights W of a reference file, Ŵ of the quantized or pruned model, and x the input of the layer,

    E[Ŵ x + b̂] = E[W x + b]        for        b̂ = b − E[(Ŵ − W) x] = b − Σ over inputs, taps (Ŵ − W) m

where m is the mean input of each tap (`kernel_taps`: exact at zero-padded borders). m comes from the record
in closed form (`statistics.propagation`: Nagel et al., Data-Free Quantization through Weight Equalization
and Bias Correction, ICCV 2019, §4.2 and appendix), or is measured on inputs of any source. b̂ is set from
the reference's b, so a second run changes nothing.

The reference is first brought to the form that the model was in before its weights changed
(`correct_bias.reference`), and outputs must not get further from the reference's on inputs that nothing was
learned from (`correct_bias.output_check`): else the pass fails and nothing is written.

Layers are matched by the name of their output tensor, else of the node; a layer is left alone, with the
reason, where
 1. the model has no layer of that name, operator and shape of weight (its twin), or the twin's weight is no
    constant, directly or through DequantizeLinear of one scale per tensor or channel;
 2. its weights differ by more than their size, or by factors of channels, or the record's statistics of its
    output differ: the twin is not the reference with other weights (quantize scales channels);
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from onnxcompress.account import BeforeAfter, Change, Figures, Refusal, json_name
from onnxcompress.errors import CompressError, OptionError, require
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.graph.query import attribute, node_label
from onnxcompress.model import Model, load
from onnxcompress.optimize.calibration import (
    Inputs,
    assume_sizes,
    gather_inputs,
)
from onnxcompress.optimize.input_options import InputOptions
from onnxcompress.optimize.synthesis.drawn_inputs import Samples
from onnxcompress.option_fields import option
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.correct_bias.input_means import measured_means, recorded_means
from onnxcompress.passes.correct_bias.layer_matching import Pair, pairs_of, write_bias
from onnxcompress.passes.correct_bias.output_check import check_nearer
from onnxcompress.passes.correct_bias.reference import bring_along
from onnxcompress.passes.opsets import at_opset, without_functions
from onnxcompress.passes.preview import check_inputs
from onnxcompress.passes.several_inputs import packed_like
from onnxcompress.progress import Progress, silent

HOLD_OUT_EVERY, MIN_IMAGES_TO_HOLD_OUT = 4, 8
"""Where there are MIN_IMAGES_TO_HOLD_OUT real images, each HOLD_OUT_EVERY-th of them judges the result; the
means are estimated on the others."""


@dataclass(frozen=True)
class CorrectBiasFigures(Figures):
    """The figures of `correct-bias`."""

    layers: int
    """Number of layers whose bias was corrected."""
    left: int
    """Number of layers that stay."""
    largest: float
    """Largest correction, in units of the layer's output."""
    reference_snr_db: BeforeAfter | None = field(default=None, metadata=json_name("output_snr_db"))
    """Signal to noise ratio of the worst output against the reference, in decibels; None: no change."""


@dataclass(frozen=True)
class CorrectBias(InputOptions, Pass):
    """Correct the biases of a quantized or pruned model, given the model that it was made from.

    Outputs must not get further from that model's on inputs that nothing was learned from: else nothing is
    written. Prune and quantize correct biases themselves; this is for what other tools rounded.

    \b
    Example:
      onnxcompress correct-bias rounded.onnx corrected.onnx --reference net.onnx
    """

    name: ClassVar[str] = "correct-bias"
    figures: ClassVar[type[Figures]] = CorrectBiasFigures

    reference: str = option(
        "", "The model before its weights were changed; it must be given.", metavar="ONNX", file="read"
    )
    inputs: Literal["record", "layerwise", "images", "distilled", "procedural"] = option(  # type: ignore[assignment]
        "record",
        "Where the means of layers' inputs come from; record: the file's statistics, in closed form.",
    )

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[CorrectBiasFigures | None]:
        """Correct the biases in place.

        Args:
            model: The model whose weights were changed.
            progress: Called with the stage, the steps done and the steps in all.

        Returns:
            The changes, the layers that stay with the reasons, and the figures; none of these where the
            reference as a whole is refused.

        Raises:
            OptionError: There is no reference, or the inputs contradict each other.
            ModelError: The reference cannot be used, or the outputs would get further from its own; the
                model is then as it was.
            InputError: The inputs cannot be used.
        """
        self.check()
        return at_opset(model, 0, lambda own: self._correct_all(own, progress))

    def _correct_all(self, model: Model, progress: Progress) -> PassResult[CorrectBiasFigures | None]:
        given, before = packed_like(without_functions(load(Path(self.reference))), model), model.copy()
        reference = given.copy()
        if self.inputs != "record":
            assume_sizes(reference, self.request)
        if refusal := bring_along(reference, model):
            return PassResult(refusals=[refusal])
        pairs, refusals = pairs_of(reference, model)
        means, inputs, kept = self._means(reference, [pair.layer for pair in pairs], progress)
        changes, largest, nearer = [], 0.0, None
        for pair in pairs:
            written = _correct(reference, model, pair, means[pair.layer.output_name])
            if isinstance(written, Refusal):
                refusals.append(written)
            elif written > 0:
                largest = max(largest, written)
                changes.append(Change(node_label(pair.twin), "bias corrected"))
        if changes:
            try:
                nearer = check_nearer(given, before, model, kept)
            except CompressError:
                model.become(before)
                raise
        sources = () if inputs is None else inputs.sources
        figures = CorrectBiasFigures(len(changes), len(refusals), largest, nearer, inputs=sources)
        return PassResult(changes, refusals, figures, None if inputs is None else inputs.shown)

    def preview(self, model: Model, progress: Progress = silent) -> list[Refusal]:
        """List the layers without a counterpart in the model, and check that inputs can be gathered.

        Args:
            model: The model whose weights were changed; it stays as it is.
            progress: Called with the expected work, with no steps.

        Returns:
            The layers that would be left alone, with the reasons.

        Raises:
            CompressError: `apply` would fail on this model with these options.
        """
        self.check()
        reference, own = packed_like(load(Path(self.reference)), model), model.copy()
        if refusal := bring_along(reference, own):
            return [refusal]
        if self.inputs != "record":
            check_inputs(reference, self.request)
        return pairs_of(reference, own)[1]

    def check(self) -> None:
        """Check the options on their own, without a model.

        Raises:
            OptionError: There is no reference, or the inputs contradict each other.
            RuntimeUnavailable: torch is missing, and the inputs need it.
        """
        if not self.reference:
            raise OptionError("--reference is needed: the model before its weights were changed")
        if self.inputs != "record":
            require(f"correct-bias --inputs {self.inputs}", "torch")
            super().check()
        elif self.images is not None:
            raise OptionError("--images: say --inputs images, too; --inputs record uses no images")

    def hints(self) -> list[str]:
        """Suggest sources of inputs whose means are closer to those of real inputs.

        Returns:
            Options with their values, as on the command line.
        """
        return [f"--inputs {kind}" for kind in ("layerwise", "images") if kind != self.inputs]

    def _means(
        self, reference: Model, layers: list[Linear], progress: Progress
    ) -> tuple[Mapping[str, np.ndarray | Refusal], Inputs | None, Samples | None]:
        """Return the mean input of each tap of each layer, by name of the layer's output tensor.

        Then the inputs that they were measured on, and real images that were held out from these.
        """
        if self.inputs == "record":
            return recorded_means(reference, layers), None, None
        inputs, kept = _kept_aside(gather_inputs(reference, self.request, progress=progress))
        return measured_means(reference, layers, inputs, progress), inputs, kept


def _kept_aside(inputs: Inputs) -> tuple[Inputs, Samples | None]:
    """Split the inputs into those to estimate means on and those to judge by."""
    if inputs.real_count < MIN_IMAGES_TO_HOLD_OUT:
        return inputs, None
    places = np.arange(len(inputs.images))
    aside = (places < inputs.real_count) & (places % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1)
    kept = inputs.images.take(places[aside])
    sources = tuple(
        replace(used, count=used.count - len(kept)) if used.source == "images" else used
        for used in inputs.sources
    )
    return replace(inputs, images=inputs.images.take(places[~aside]), sources=sources), kept


def _correct(reference: Model, model: Model, pair: Pair, means: np.ndarray | Refusal) -> float | Refusal:
    """Correct one layer's bias in place; return the largest correction, 0 where the bias is right."""
    if isinstance(means, Refusal):
        return Refusal(node_label(pair.twin), means.rule, means.remedy)
    shift = bias_shift(pair.layer, pair.weight, means)
    written = write_bias(reference, model, pair, shift)
    if isinstance(written, Refusal):
        return written
    return max(float(np.abs(shift).max()), np.finfo(np.float64).tiny) if written else 0.0


def bias_shift(layer: Linear, weight: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Compute what new weights change in the mean of a layer's output: E[(Ŵ − W) x].

    Args:
        layer: The layer, with W.
        weight: Ŵ, stored as the layer's own.
        means: Mean input of each tap, (inputs, taps).

    Returns:
        The change, (outputs,), float64.
    """
    change = layer.view(weight.astype(np.float64) - layer.weight.astype(np.float64))
    groups, _, inputs, taps = change.shape
    found = np.einsum("goit,git->go", change, means.reshape(groups, inputs, taps)).reshape(-1)
    return np.asarray(found * attribute(layer.node, "alpha", 1.0) if layer.node.op == "Gemm" else found)
