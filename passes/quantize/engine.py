"""The course of `quantize`: from a prepared model and options to the quantized one and its account."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcompress.account import Change, Refusal
from onnxcompress.errors import ModelError
from onnxcompress.graph.query import data_input
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import gather_inputs, quick
from onnxcompress.optimize.deterministic_threads import one_thread_each
from onnxcompress.optimize.device import pick_device
from onnxcompress.optimize.executor.open_batch import images_at_once
from onnxcompress.optimize.reconstruction.context import (
    BATCH,
    CalibrationContext,
    fixed_batch,
    twin_of,
    whole_batches,
)
from onnxcompress.optimize.reconstruction.feature_inputs import Stage, stages_of
from onnxcompress.optimize.reconstruction.quantize import QuantizationResults, Quantizer, Settings
from onnxcompress.optimize.reconstruction.range_equalization import stretch
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.passes.base import PassResult
from onnxcompress.passes.quantize.mixed_precision import choose_bits
from onnxcompress.passes.quantize.options import QuantizeOptions
from onnxcompress.progress import Progress
from onnxcompress.quantization.affine_grid import Grid, weight_limits
from onnxcompress.quantization.ort_fusion import fused_counts
from onnxcompress.quantization.qdq_plan import Bits, Plan, QuantizedLayer, make_plan
from onnxcompress.quantization.qdq_writer import emit
from onnxcompress.runtime.inference import unread_feeds

if TYPE_CHECKING:
    from torch import Tensor


SHOWN = 32
"""Images on which the outputs of both networks are compared."""


@one_thread_each()
def quantize(
    one: QuantizeOptions, original: Model, model: Model, changes: list[Change], progress: Progress
) -> PassResult:
    """Quantize the prepared model in place."""
    bits = bits_of(one)
    plan = layers_of(one, model)
    result = PassResult(changes, plan.refusals)
    if not plan.layers:
        return result
    start = time.perf_counter()
    few = one.weight_bits < 8 or 0 < one.activation_bits < 8
    request, device = one.request if few else quick(one.request, model), pick_device(one.device)
    inputs = gather_inputs(model, request, device=device, progress=progress)
    made = time.perf_counter() - start
    x = whole_batches(model, inputs, fixed_batch(model))
    settings = Settings(
        per_channel=one.per_channel,
        storage=one.activation_type,
        symmetric=one.symmetric,
        reconstruct=one.reconstruct,
        small_types=one.small_types,
        saturation_safe=one.safe,
        minmax=one.ranges == "minmax",
        batch=images_at_once(model, x) or BATCH,
        seed=one.seed,
    )
    twin = twin_of(model, x) if inputs.layerwise else StatisticsAlignment()
    stretched = 0
    if one.stretch and one.activation_bits:  # ranges of what stays a float need no room
        stretched = stretch(model, plan, x, twin, settings.batch)
        plan = make_plan(model, bits)
    chosen = None
    subject = CalibrationContext(model, plan, x, twin, settings.batch, min(inputs.real_count, len(x)))
    if one.mixed:
        chosen = choose_bits(one, subject, bits, original, progress)
        plan = make_plan(model, bits, chosen.bits)
    parts = [Stage(x, twin)]
    if inputs.may_use_record and one.weight_bits < 8 and not one.activation_bits and one.reconstruct:
        began = time.perf_counter()
        parts = stages_of(subject, seed=one.seed, device=device, progress=progress)
        made += time.perf_counter() - began
    learned, lost = QuantizationResults(), None
    for part in parts:
        worker = Quantizer(
            model, plan, settings, part.twin, start=part.start, stop=part.stop, results=learned
        )
        worker.run(part.inputs, progress, part.seen(lost))
        lost = None if part.stop is None else worker.lost(part.stop)
    learn = time.perf_counter() - start - made - (chosen.account["seconds"] if chosen else 0)
    weights = {id(layer.linear.node): _integers(layer, learned, one) for layer in plan.layers.values()}
    biases = {i: b.numpy() for i, b in learned.biases.items()}
    rows = [_row(layer, learned, weights[id(layer.linear.node)][1], plan) for layer in plan.layers.values()]
    emit(model, plan, learned.grids, weights, biases)
    result.changes += [
        Change(row["name"], f"weight {row['weight_bits']} bits, input {row['input_bits']}") for row in rows
    ]
    result.shown = inputs.shown
    result.layer_snr_db = {row["name"]: row["snr_db"] for row in rows}
    result.measured = {
        "layers": rows,
        "channel_ranges": stretched,
        "inputs": [asdict(used) for used in (*inputs.sources, *(part.used for part in parts if part.used))],
        "seconds": {"inputs": made, "layers": learn},
        "runtime": fused_counts(model),
        **({} if chosen is None else {"budget": chosen.account}),
        "output_snr_db": output_snr(original, model, x),
    }
    return result


def bits_of(one: QuantizeOptions) -> Bits:
    """The bits that the options ask for."""
    return Bits(one.weight_bits, one.activation_bits or None, one.first_last or None, one.depthwise)


def layers_of(one: QuantizeOptions, model: Model) -> Plan:
    """What would be quantized in a prepared model; where that is nothing, a refusal says so."""
    plan = make_plan(model, bits_of(one))
    if not plan.layers and not plan.refusals:
        rule = "no Conv, ConvTranspose, Gemm or MatMul of it reads data with a constant weight"
        plan.refusals.append(Refusal(model.name, rule))
    return plan


def _integers(
    layer: QuantizedLayer, learned: QuantizationResults, one: QuantizeOptions
) -> tuple[np.ndarray, Grid]:
    """The weight's integers in the initializer's layout, and their grid."""
    found = learned.weights[id(layer.linear.node)]
    low, high = weight_limits(layer.weight_bits)
    integers = np.empty(layer.linear.weight.shape, np.int32)
    view = layer.linear.view(integers)
    view[...] = found.integers.numpy().reshape(view.shape)
    scale = found.scale.numpy().reshape(-1).astype(np.float32)
    if not layer.per_channel(one.per_channel):
        scale = np.asarray(scale[0])
    if one.small_types and layer.weight_bits <= 4:
        return integers, Grid(scale, 0, low, high, "int4")
    shift = 128 if one.weight_type == "uint8" else 0
    return integers, Grid(scale, shift, low + shift, high + shift, one.weight_type)


def _row(layer: QuantizedLayer, learned: QuantizationResults, grid: Grid, plan: Plan) -> dict[str, Any]:
    data = None if layer.input is None else learned.grids[plan.root(layer.input)]
    noise = learned.noise[id(layer.linear.node)]
    return {
        "name": layer.linear.label,
        "op": layer.linear.node.op,
        "weight_bits": layer.weight_bits,
        "input_bits": 0 if layer.input is None else layer.input[1],
        "weight_scale": [float(grid.scale.min()), float(grid.scale.max())],
        "input_scale": None if data is None else float(data.scale),
        "input_range": None if data is None else list(data.bounds),
        "snr_db": float(-10 * np.log10(max(noise, 1e-12))),
    }


def output_snr(original: Model, model: Model, images: Tensor) -> dict[str, float]:
    """Signal to noise of each output on the first of the images, in decibels, of onnxruntime.

    Raises ModelError where an output was finite and is not any more.
    """
    from onnxcompress.runtime.session import session

    name, batch, others = data_input(model).name, fixed_batch(original), unread_feeds(original)
    x = images[: max(batch, SHOWN // batch * batch)].numpy()
    outputs: list[list[list[np.ndarray]]] = []
    for one in (original, model):
        opened = session(one, provider="cpu")
        parts = [x[i : i + batch] for i in range(0, len(x), batch)]
        outputs.append([opened.run(None, {name: part, **others}) for part in parts])
    found = {}
    for index, tensor in enumerate(model.graph.outputs):
        a, b = (np.concatenate([run[index] for run in runs]).astype(np.float64) for runs in outputs)
        if np.isfinite(a).all() and not np.isfinite(b).all():
            raise ModelError(
                f"{original.name}: output {tensor.name!r} would not be finite any more; ask for less"
            )
        found[tensor.name] = float(
            10 * np.log10(max(float(a.var()), 1e-30) / max(float(np.square(a - b).mean()), 1e-30))
        )
    return found
