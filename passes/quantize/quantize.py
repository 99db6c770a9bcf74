"""Quantize weights and activations after training, without data, to QDQ that runtimes fuse.

 1. BatchNorm and zero pads are folded                                       `graph.canonicalize`
 2. what is quantized where, and with how many bits                          `quantization.qdq_plan`
 3. inputs: images distilled from the record, procedural ones, …             `optimize.calibration`
 4. layer by layer, the student reading its own earlier error: ranges of activations by least squares,
    weights rounded in closed form, biases corrected                         `reconstruction.quantize`
 5. activations of fewer bits than 8: step 4 with several dampings     `reconstruction.damping_choice`,
    then all layers are tuned together                               `reconstruction.quantized_tuning`
 6. QuantizeLinear and DequantizeLinear are written                          `quantization.qdq_writer`
 7. onnxruntime loads the result: what fused, and how far the outputs are    `quantization.ort_fusion`

Sources: Nagel et al., Data-Free Quantization (ICCV 2019); Horton et al. (arXiv 2011.09058) §3.4 for
layer-wise reconstruction on generated inputs; GPTQ and QuantEase for its closed form (`gptq`).

Bits: weights have 2 to 8, activations 2 to 16. onnxruntime has integer kernels for 8 only: with others the
file is no faster. Fewer are held in 8-bit types, in the narrower range (`quantization.qdq_writer`), or with
`small_types` in 4-bit ones. The first and last layer keep 8 bits unless told otherwise, as is usual; so do
residual sums (`quantization.qdq_plan`).

Inputs: `auto` takes images if there are any; else, with 8 bits, procedural ones through the twin that has
the recorded statistics (`layerwise`: made at once); with fewer distilled ones, which take longer and are
better for EfficientNet-Lite0; without a record plain procedural ones. Where `auto` took `layerwise` and an
output falls below the guard's floor on pictures that nothing was learned from, the network sees other
pictures than its record tells of (PP-LCNet learned on documents): procedural ones are tried, and the
better result is kept. Where a detector finds nothing in those pictures, they cannot tell whether it would
still find what there is, and procedural inputs are taken, which kept more of PP-OCR's masks
(`tests.benchmarks.field_accuracy masks`). Where that is too little, too, the tensors that cost most stay
floats (`float_tensors`). With `only_faster` layers stay floats that gain no time on the provider by being
quantized, and cost accuracy (`unprofitable_layers`).

`overflow_safe`: without it, onnxruntime's result on a CPU with AVX2 and no VNNI is far from what the file
says (`tests/benchmarks/overflow.py`). It costs next to nothing: no pair of weights is too large, but each
has 8 bits (`reconstruction.saturation`). uint8 weights cannot overflow, and are slower; depthwise kernels
add in 32 bits.

Does not handle: several inputs; models that are quantized already. `quantization.qdq_plan` says which
operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from onnxcompress.account import Figures, Refusal
from onnxcompress.errors import CompressError
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import assume_sizes
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
from onnxcompress.passes.opsets import at_opset
from onnxcompress.passes.preview import check_inputs, raised
from onnxcompress.passes.quantize.figures import QuantizeFigures
from onnxcompress.passes.quantize.options import QuantizeOptions
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.qdq_plan import STREAM_BITS
from onnxcompress.quantization.quantized_models import refuse_quantized

if TYPE_CHECKING:
    from onnxcompress.passes.quantize.engine import Quantized
    from onnxcompress.passes.quantize.figures import FloatLayers
    from onnxcompress.passes.quantize.float_tensors import FloatTensor, Judge

OPSET = 13
"""From which on scales may be per channel."""
QDQ_OPSET, CLIP_OPSET = 10, 11
"""From which on there are QuantizeLinear, and Clip with bounds as inputs, which narrow ranges need."""
SMALL_OPSET = 21
"""From which on there are int4, uint4, int16 and uint16."""


INTEGER_KERNELS = ("cpu", "tensorrt", "openvino")
"""Providers that fuse QDQ of 8 bits to integer kernels."""
UNSEEN = "the network finds nothing in the pictures by which layer-wise ones could be judged"
"""Why procedural inputs are taken although the file has statistics."""
QUANTIZED = "start from the float model"
"""What to do with a model that is quantized already."""


@dataclass(frozen=True)
class Quantize(QuantizeOptions, Pass):
    """Quantize weights and activations to few bits, with images or without.

    For CPUs with integer instructions, and for accelerators (--for). On onnxruntime's CUDA provider int8 is
    slower than floats: `onnxcompress guide slow-int8`.

    \b
    Example:
      onnxcompress quantize net.onnx int8.onnx
      onnxcompress quantize net.onnx w4.onnx --weight-bits 4 --activation-bits 0
      onnxcompress quantize net.onnx mixed.onnx --bits-budget 4.5
    """

    name: ClassVar[str] = "quantize"
    figures: ClassVar[type[Figures]] = QuantizeFigures
    needs: ClassVar[tuple[str, ...]] = ("torch", "onnxruntime")
    timed: ClassVar[bool] = True

    def is_repeatable(self, figures: Figures) -> bool:
        """Return whether another run would leave the same layers in floats.

        Args:
            figures: The figures of a result.

        Returns:
            False where layers were chosen by the latency of a disturbed clock.
        """
        found = figures.float_layers if isinstance(figures, QuantizeFigures) else None
        return super().is_repeatable(figures) and (found is None or found.latency.clock == "wall")

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[QuantizeFigures | None]:
        """Quantize in place.

        Args:
            model: The model to change.
            progress: Called with the stage, the steps done and the steps in all.

        Returns:
            The changes, the layers that stay floats with the reasons, and the figures; none of these where
            no layer can be quantized.

        Raises:
            OptionError: Options contradict each other, or no bits keep the budget.
            CompressError: The inputs cannot be gathered, or the model cannot be handled.
        """
        self.check()
        if refusal := refuse_quantized(model, QUANTIZED):
            return PassResult(refusals=[refusal])
        chosen = self.resolved()
        return at_opset(model, chosen.lowest_opset, lambda own: chosen._quantize(own, progress))

    def resolved(self) -> Quantize:
        """Return the pass with the values that its runtime wants, where no option gives others.

        Returns:
            A pass whose options are what is done.
        """
        return replace(self, **self.runtime_options())

    def _quantize(self, model: Model, progress: Progress) -> PassResult[QuantizeFigures | None]:
        """Quantize in place; with layers in floats that gain no time, where that is asked for."""
        from onnxcompress.passes.quantize.float_tensors import Judge

        before = model.copy()
        made = self._attempt(model, progress)
        if made.images is None or self.activation_bits != STREAM_BITS:
            return made.result
        assume_sizes(before, self.request)
        try:
            judge = Judge(before, self.request)
        except CompressError:  # onnxruntime does not run it: the guard says so
            return made.result
        made = self._keeping_enough(made, before, model, judge, progress)
        return self._profitable(made, before, model, judge, progress) if self.only_faster else made.result

    def _keeping_enough(
        self, made: Quantized, before: Model, model: Model, judge: Judge, progress: Progress
    ) -> Quantized:
        """Quantize by other inputs, or with some tensors in floats, where too little is kept."""
        from onnxcompress.passes.quantize.float_tensors import FLOOR, leave_floats

        kept = judge.kept_db(model)
        if (kept < FLOOR or judge.unseen) and self.inputs == "auto" and _aligned(made.result):
            procedural = before.copy()
            other = replace(self, inputs="procedural")._attempt(procedural, progress)
            other_kept = judge.kept_db(procedural)
            if other_kept > kept or judge.unseen:
                why = (
                    UNSEEN
                    if judge.unseen
                    else f"layer-wise ones, tried first, left {kept:.1f} dB of the outputs"
                )
                model.become(procedural)
                made, kept = replace(other, result=_because(other.result, why)), other_kept
        if kept >= FLOOR or not self.float_tensors:
            return made
        tensors = leave_floats(model, judge, kept, progress)
        return _with_floats(made, before, model, tensors) if tensors else made

    def _profitable(
        self, made: Quantized, before: Model, model: Model, judge: Judge, progress: Progress
    ) -> PassResult[QuantizeFigures | None]:
        """Leave layers in floats that gain no time by being quantized, and cost accuracy."""
        from onnxcompress.optimize.executor.open_batch import timed_batch
        from onnxcompress.passes.quantize.unprofitable_layers import leave_unprofitable
        from onnxcompress.runtime.stopwatch import Stopwatch

        batch = timed_batch(before, self.latency_batch)
        stopwatch = Stopwatch(self.runs_on, batch, self.threads, self.seed)
        found = leave_unprofitable(before, model, made.parameters, judge, stopwatch, progress)
        return made.result if found is None else _with_float_layers(made, before, model, found)

    def _attempt(self, model: Model, progress: Progress) -> Quantized:
        from onnxcompress.passes.quantize.engine import quantize

        assume_sizes(model, self.request)
        original = model.copy()
        changes = fold_and_canonicalize(model, self.copy_shared)
        self.selection.check(original, model)
        return quantize(self, original, model, changes, progress)

    def no_gain_on(self, provider: str, batch: int) -> str:
        """Say why the result is not expected to be faster, where that is known before the work.

        Args:
            provider: Short name of onnxruntime's execution provider.
            batch: Images in a run.

        Returns:
            One sentence; empty where it may be faster.
        """
        if self.for_runtime is not None and self.activation_bits:
            return self.resolved()._without_gain(provider)
        return self._without_gain(provider)

    def _without_gain(self, provider: str) -> str:
        if provider == "cuda":
            return (
                "onnxruntime fuses no integer layers on cuda: there a quantized network took 1.4 to 2.1 "
                "times as long (H100); `onnxcompress fp16` is faster there, TensorRT has integer kernels"
            )
        if provider in INTEGER_KERNELS and not self.activation_bits:
            return "with weights alone quantized, layers compute with floats as before: smaller, not faster"
        if provider in INTEGER_KERNELS and self.activation_bits != STREAM_BITS:
            return f"{provider} has integer kernels of 8 bits only: not faster with {self.activation_bits}"
        return ""

    def preview(self, model: Model, progress: Progress = silent) -> list[Refusal]:
        """List the layers that would stay floats, and check that inputs can be gathered.

        Args:
            model: The model; it stays as it is.
            progress: Called with the expected work, with no steps.

        Returns:
            The layers, with the reasons.

        Raises:
            CompressError: `apply` would fail on this model with these options.
        """
        self.check()
        if refusal := refuse_quantized(model, QUANTIZED):
            return [refusal]
        from onnxcompress.passes.quantize.engine import layers_of, preview_work

        chosen = self.resolved()
        own = raised(model, chosen.lowest_opset)
        assume_sizes(own, self.request)
        fold_and_canonicalize(own, self.copy_shared)
        self.selection.check(model, own)
        plan = layers_of(chosen, own)
        if plan.layers:
            check_inputs(own, self.request)
            preview_work(chosen, own, progress)
        return plan.refusals

    @property
    def lowest_opset(self) -> int:
        """The lowest operator set that has what these options write."""
        if self.small_types or self.activation_bits > STREAM_BITS:
            return SMALL_OPSET
        if self.per_channel:
            return OPSET
        return CLIP_OPSET if 0 < self.activation_bits < STREAM_BITS else QDQ_OPSET


def _aligned(result: PassResult[QuantizeFigures | None]) -> bool:
    """Return whether the pass learned from inputs with aligned statistics."""
    return any(used.source == "layerwise" for used in result.inputs)


def _because(result: PassResult[QuantizeFigures | None], why: str) -> PassResult[QuantizeFigures | None]:
    """Say why inputs other than those with aligned statistics were taken."""
    assert result.measured is not None
    inputs = tuple(replace(used, why=why) for used in result.inputs)
    return replace(result, measured=replace(result.measured, inputs=inputs))


def _with_floats(
    made: Quantized, original: Model, model: Model, tensors: Sequence[FloatTensor]
) -> Quantized:
    """Note which tensors stay floats, which layers read floats now, and what that gives."""
    from onnxcompress.passes.quantize.float_tensors import float_readers

    figures, floats = made.result.measured, float_readers(model)
    assert figures is not None
    figures = replace(
        figures,
        layers=tuple(
            replace(row, input_bits=0, input_scale=None, input_range=None) if row.name in floats else row
            for row in figures.layers
        ),
        float_tensors={one.name: one.noise for one in tensors},
    )
    refusals = [*made.result.refusals, *(one.refusal for one in tensors)]
    result = replace(made.result, refusals=refusals, measured=_again(figures, made, original, model))
    return replace(made, result=result)


def _with_float_layers(
    made: Quantized, original: Model, model: Model, found: FloatLayers
) -> PassResult[QuantizeFigures | None]:
    """Note which layers stay float layers, and what that gives; a network of these alone is unchanged."""
    figures, gone = made.result.measured, {layer.name for layer in found.layers}
    assert figures is not None
    refusals = [*made.result.refusals, *(layer.refusal(found.latency.provider) for layer in found.layers)]
    rows = tuple(row for row in figures.layers if row.name not in gone)
    if not rows:
        return PassResult(refusals=refusals)
    figures = _again(replace(figures, layers=rows, float_layers=found), made, original, model)
    changes = [change for change in made.result.changes if change.node not in gone]
    return replace(made.result, changes=changes, refusals=refusals, measured=figures)


def _again(figures: QuantizeFigures, made: Quantized, original: Model, model: Model) -> QuantizeFigures:
    """Measure again what depends on the network as a whole."""
    from onnxcompress.passes.quantize.output_noise import output_snr
    from onnxcompress.quantization.ort_fusion import fused_counts

    assert made.images is not None
    return replace(
        figures, runtime=fused_counts(model), output_snr_db=output_snr(original, model, made.images)
    )
