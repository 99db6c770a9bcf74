"""The steps of `quantize`: from a prepared model and options to the quantized model and its figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from onnxcompress.account import Change, Refusal, StageSeconds
from onnxcompress.graph.node_selection import EVERY_NODE
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import InputRequest, Inputs, gather_inputs, quick
from onnxcompress.optimize.deterministic_threads import one_thread_each
from onnxcompress.optimize.device import pick_device
from onnxcompress.optimize.effort import QUANTIZE, Effort, QuantizeWork, announce, choose_effort, pixels_of
from onnxcompress.optimize.executor.open_batch import images_per_run
from onnxcompress.optimize.reconstruction.context import (
    CalibrationContext,
    alignment_of,
    fixed_batch,
    whole_batches,
)
from onnxcompress.optimize.reconstruction.damping_choice import least_error_fit
from onnxcompress.optimize.reconstruction.feature_inputs import Stage, stages_of
from onnxcompress.optimize.reconstruction.quantize import QuantizationResults, Quantizer, Settings
from onnxcompress.optimize.reconstruction.quantized_tuning import (
    BATCH,
    TuningData,
    is_tunable,
    tune_quantized,
    tuning_data,
)
from onnxcompress.optimize.reconstruction.range_equalization import stretch
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.optimize.synthesis.synthetic_inputs import MADE_UP
from onnxcompress.passes.base import PassResult
from onnxcompress.passes.quantize.figures import QuantizedLayerRow, QuantizeFigures
from onnxcompress.passes.quantize.float_parameters import Parameters, parameters_of
from onnxcompress.passes.quantize.mixed_precision import choose_bits
from onnxcompress.passes.quantize.options import QuantizeOptions
from onnxcompress.passes.quantize.output_noise import output_snr
from onnxcompress.progress import Progress
from onnxcompress.quantization.affine_grid import Grid, weight_limits
from onnxcompress.quantization.ort_fusion import fused_counts
from onnxcompress.quantization.qdq_plan import STREAM_BITS, Bits, Plan, QuantizedLayer, make_plan
from onnxcompress.quantization.qdq_writer import emit

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Quantized:
    """What quantizing a model came to."""

    result: PassResult[QuantizeFigures | None]
    images: Tensor | None
    """What the layers were fitted on, (N, …); None where no layer was."""
    parameters: tuple[Parameters, ...] = ()
    """What the quantized layers computed with before."""


@one_thread_each()
def quantize(
    options: QuantizeOptions, original: Model, model: Model, changes: list[Change], progress: Progress
) -> Quantized:
    """Quantize a prepared model in place.

    Args:
        options: The options.
        original: The model as it was given.
        model: The model to change: `original` after `fold_and_canonicalize`.
        changes: What that preparation changed.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The changes, the layers that stay floats with the reasons, and the figures; no figures where no
        layer can be quantized.

    Raises:
        OptionError: No bits within the budget do.
        InputError: The inputs or the file of sensitivities cannot be used.
        ModelError: An output would no longer be finite, or onnxruntime cannot load the result.
    """
    plan = layers_of(options, model)
    if not plan.layers:
        return Quantized(PassResult(changes, plan.refusals), None)
    start = time.perf_counter()
    device = pick_device(options.device)
    effort, request, work = work_of(options, model)
    announced = partial(announce, "quantize", effort, model, progress, tuned=work.steps * BATCH)
    inputs = gather_inputs(model, request, device=device, progress=progress, announce=announced)
    repair = _few(options) or inputs.real
    gathered = time.perf_counter()
    context, channel_ranges, data = _prepare(options, model, plan, inputs, work, repair)
    budget = None
    plan = context.plan
    if options.mixed:
        bits, budget = choose_bits(options, context, bits_of(options), original, progress)
        plan = make_plan(model, bits_of(options), bits)
    chosen = time.perf_counter()
    stages = [Stage(context.images, context.alignment)]
    if inputs.may_use_record and _rounds_weights_alone(options):
        stages = stages_of(context, seed=options.seed, device=device, progress=progress)
    staged = time.perf_counter()
    generic = not _few(options) and all(used.source in MADE_UP for used in inputs.sources)
    context = replace(context, plan=plan)
    fit = partial(_fit, options, context, stages, work, repair, generic, progress)
    results = fit() if data is None else least_error_fit(context, fit, data.aside, device)
    fitted = time.perf_counter()
    tuning = None
    if data is not None:
        results, tuning = tune_quantized(
            context, results, data, steps=work.steps, seed=options.seed, device=device, progress=progress
        )
    ended = time.perf_counter()
    parameters = parameters_of(model, plan)
    rows = _write(options, model, plan, results)
    made = (stage.used for stage in stages if stage.used)
    figures = QuantizeFigures(
        layers=rows,
        channel_ranges=channel_ranges,
        runtime=fused_counts(model),
        budget=budget,
        inputs=(*inputs.sources, *made),
        seconds=StageSeconds(
            inputs=gathered - start + staged - chosen,
            layers=fitted - staged + chosen - gathered - (budget.seconds if budget else 0.0),
            tuning=ended - fitted if tuning is not None else None,
        ),
        output_snr_db=output_snr(original, model, context.images),
        effort=effort,
        tuning=tuning,
    )
    changed = [Change(r.name, f"weight {r.weight_bits} bits, input {r.input_bits}") for r in rows]
    result = PassResult([*changes, *changed], plan.refusals, figures, inputs.shown)
    return Quantized(result, context.images, parameters)


def preview_work(options: QuantizeOptions, model: Model, progress: Progress) -> None:
    """Report the effort and the expected time, as `quantize` does before its work.

    Args:
        options: The options.
        model: The model, prepared.
        progress: Called once, with no steps.
    """
    effort, request, work = work_of(options, model)
    announce("quantize", effort, model, progress, request.expected, tuned=work.steps * BATCH)


def work_of(options: QuantizeOptions, model: Model) -> tuple[Effort, InputRequest, QuantizeWork]:
    """Choose how much work to do: with fewer bits than 8 the counts of a higher effort.

    Symmetric ranges leave 7 bits behind a ReLU: channels of unlike ranges then cost too much (MobileNetV2).

    Args:
        options: The options.
        model: The model, prepared.

    Returns:
        The effort, the inputs to gather, and the counts.
    """
    effort = choose_effort(options.effort, model, "quantize", QUANTIZE["best"].inputs)
    few = _few(options)
    if effort == "fast" and (few or options.symmetric):
        work = QUANTIZE["balanced"]
    else:
        work = QUANTIZE["best" if few else effort]
    if not 0 < options.activation_bits < STREAM_BITS or not options.reconstruct:
        work = replace(work, steps=0)
    elif options.steps is not None:
        work = replace(work, steps=options.steps)
    request = replace(options.request, synthetic=options.synthetic or work.count(pixels_of(model)))
    return effort, request if few and effort != "fast" else quick(request, model), work


def _few(options: QuantizeOptions) -> bool:
    """Return whether anything gets fewer bits than 8."""
    return options.weight_bits < 8 or 0 < options.activation_bits < 8


def _prepare(
    options: QuantizeOptions, model: Model, plan: Plan, inputs: Inputs, work: QuantizeWork, repair: bool
) -> tuple[CalibrationContext, int, TuningData | None]:
    """Align the statistics and equalize the channels' ranges, where that is asked for.

    Returns the context of the fits, the number of channel groups that were equalized, and what tuning needs
    besides, where all is tuned together in the end.
    """
    x, data = whole_batches(model, inputs, fixed_batch(model)), None
    if work.steps > 0 and is_tunable(model, inputs):
        x, data = tuning_data(model, inputs, x, options.seed)
    batch = images_per_run(model, x)
    alignment = alignment_of(model, x) if inputs.layerwise else StatisticsAlignment()
    equalized = 0
    if work.stretch and options.stretch and options.activation_bits:  # what stays a float needs no room
        power = 1.0 if repair and options.per_channel else 0.5
        few = options.activation_bits if options.activation_bits <= 4 else None
        equalized = stretch(model, plan, x, alignment, batch, power, few)
        plan = make_plan(model, bits_of(options))
    context = CalibrationContext(model, plan, x, alignment, batch, min(inputs.real_count, len(x)))
    return context, equalized, data


def _rounds_weights_alone(options: QuantizeOptions) -> bool:
    """Return whether weights of few bits are fitted, which needs many inputs for the deep layers."""
    return options.weight_bits < 8 and not options.activation_bits and options.reconstruct


def _fit(
    options: QuantizeOptions,
    context: CalibrationContext,
    stages: Sequence[Stage],
    work: QuantizeWork,
    repair: bool,
    generic_inputs: bool,
    progress: Progress,
    damping: float = 1.0,
) -> QuantizationResults:
    """Fit ranges, weights and biases layer by layer, stage by stage."""
    settings = Settings(
        per_channel=options.per_channel,
        storage=options.activation_type,
        symmetric=options.symmetric,
        reconstruct=options.reconstruct,
        small_types=options.small_types,
        saturation_safe=options.saturation_safe,
        generic_inputs=generic_inputs,
        minmax=options.ranges == "minmax",
        places=work.places,
        repair=repair,
        damping=damping,
        ratios=work.ratios,
        sweeps=work.sweeps if options.per_channel else max(work.sweeps, 1),
        batch=context.batch,
        seed=options.seed,
    )
    results, lost = QuantizationResults(), None
    for stage in stages:
        worker = Quantizer(
            context.model,
            context.plan,
            settings,
            stage.alignment,
            start=stage.start,
            stop=stage.stop,
            results=results,
        )
        worker.run(stage.inputs, progress, stage.seen(lost))
        lost = None if stage.stop is None else worker.lost(stage.stop)
    return results


def _write(
    options: QuantizeOptions, model: Model, plan: Plan, results: QuantizationResults
) -> tuple[QuantizedLayerRow, ...]:
    """Write the quantized weights, biases and nodes into the model; return a row for each layer."""
    weights = {id(layer.linear.node): _integers(layer, results, options) for layer in plan.layers.values()}
    biases = {i: b.numpy() for i, b in results.biases.items()}
    rows = tuple(
        _row(layer, results, weights[id(layer.linear.node)][1], plan) for layer in plan.layers.values()
    )
    emit(model, plan, results.grids, weights, biases, options.placement.integer_bias)
    return rows


def bits_of(options: QuantizeOptions) -> Bits:
    """Return the bits that the options ask for, without a budget.

    Args:
        options: The options.

    Returns:
        The bits of weights and activations.
    """
    weights, inputs = options.weight_bits, options.activation_bits or None
    return Bits(
        weights, inputs, options.first_last or None, options.depthwise, options.selection, options.placement
    )


def layers_of(options: QuantizeOptions, model: Model) -> Plan:
    """Plan what to quantize.

    Args:
        options: The options.
        model: The model, prepared (`fold_and_canonicalize`).

    Returns:
        The plan; where it has no layer, a refusal says so.

    Raises:
        OptionError: Layers could be quantized, and the patterns leave none.
    """
    bits = bits_of(options)
    plan = make_plan(model, bits)

    def all_layers() -> int:
        return len(make_plan(model, replace(bits, selection=EVERY_NODE)).layers)

    options.selection.check_taken(len(plan.layers), all_layers, "quantized")
    if not plan.layers and not plan.refusals:
        rule = "no Conv, ConvTranspose, Gemm or MatMul of it reads data with a constant weight"
        plan.refusals.append(Refusal(model.name, rule))
    return plan


def _integers(
    layer: QuantizedLayer, results: QuantizationResults, options: QuantizeOptions
) -> tuple[np.ndarray, Grid]:
    """Return the weight's integers in the layout of the initializer, and their grid."""
    found = results.weights[id(layer.linear.node)]
    low, high = weight_limits(layer.weight_bits)
    integers = np.empty(layer.linear.weight.shape, np.int32)
    view = layer.linear.view(integers)
    view[...] = found.integers.numpy().reshape(view.shape)
    scale = found.scale.numpy().reshape(-1).astype(np.float32)
    if not layer.per_channel(options.per_channel):
        scale = np.asarray(scale[0])
    if options.small_types and layer.weight_bits <= 4:
        return integers, Grid(scale, 0, low, high, "int4")
    shift = 128 if options.weight_type == "uint8" else 0
    return integers, Grid(scale, shift, low + shift, high + shift, options.weight_type)


def _row(layer: QuantizedLayer, results: QuantizationResults, grid: Grid, plan: Plan) -> QuantizedLayerRow:
    data = None if layer.input is None else results.grids[plan.root(layer.input)]
    noise = results.noise[id(layer.linear.node)]
    return QuantizedLayerRow(
        name=layer.linear.label,
        op=layer.linear.node.op,
        weight_bits=layer.weight_bits,
        input_bits=0 if layer.input is None else layer.input[1],
        weight_scale=(float(grid.scale.min()), float(grid.scale.max())),
        input_scale=None if data is None else float(data.scale),
        input_range=None if data is None else data.bounds,
        snr_db=float(-10 * np.log10(max(noise, 1e-12))),
    )
