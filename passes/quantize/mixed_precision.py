"""Bits of each layer's weight under a budget: measured in the same command, or read from a file.

A budget counts bits of all weights that are quantized. In 8-bit types, where fewer bits are a narrower
range, it counts them as information, and the file is as large as with 8 bits; with `small_types` it counts
what is stored, 4 bits up to 4 and 8 beyond.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from onnxcompress.errors import InputError
from onnxcompress.model import Model
from onnxcompress.optimize.reconstruction.context import CalibrationContext
from onnxcompress.passes.quantize.figures import Budget
from onnxcompress.passes.quantize.options import QuantizeOptions
from onnxcompress.progress import Progress
from onnxcompress.quantization.qdq_plan import Bits, make_plan
from onnxcompress.sensitivity.bit_allocation import curves, error_at, mixed_bits, stored_bits
from onnxcompress.sensitivity.layer_errors import Measuring, layer_errors
from onnxcompress.sensitivity.rows import Row, Variant, make_variants, read_rows

SENSED = 96
"""Inputs by which the layers are measured."""
MEASURED = (2, 4, 8)
"""Between them the error's logarithm is taken to be linear in the bits."""
LEAST = 2
"""Fewest bits that a layer may get."""


def choose_bits(
    options: QuantizeOptions, context: CalibrationContext, bits: Bits, original: Model, progress: Progress
) -> tuple[dict[str, int], Budget]:
    """Choose bits for the weight of each layer within the budget, such that the error is least.

    Args:
        options: The options, with a budget.
        context: The prepared network and its inputs.
        bits: The bits that the options ask for without a budget.
        original: The model as it was given, on which the file of sensitivities was measured.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        Name of the weight -> its bits; and what the budget gave.

    Raises:
        OptionError: No bits keep the budget.
        InputError: The file of sensitivities is damaged, or of another model.
    """
    start = time.perf_counter()
    layers = context.plan.layers.values()
    sizes = {layer.linear.weight_name: int(layer.linear.weight.size) for layer in layers}
    lowest = make_plan(context.model, replace(bits, weight=LEAST)).layers.values()
    floors = {layer.linear.weight_name: layer.weight_bits for layer in lowest}
    if options.sensitivity is not None:
        rows = read_rows(Path(options.sensitivity), original.digest())
        _check(rows, sizes, options.sensitivity)
    else:
        rows = _measure(options, context, progress)
    total = sum(sizes.values())
    budget = min(
        float("inf") if options.bits_budget is None else options.bits_budget * total,
        float("inf") if options.size_budget is None else options.size_budget * 8e6,
    )
    chosen = mixed_bits(rows, sizes, floors, options.weight_bits, budget, small_types=options.small_types)
    cost = sum(sizes[name] * stored_bits(b, options.small_types) for name, b in chosen.items())
    known = curves(rows, "weight_bits")
    return chosen, Budget(
        counted="stored" if options.small_types else "information",
        average_bits=cost / total,
        budget_bits=budget / total,
        megabytes=cost / 8e6,
        layers_by_bits=dict(sorted(Counter(chosen.values()).items())),
        estimated_error=sum(_estimate(known.get(name, {}), b) for name, b in chosen.items()),
        sensitivity=options.sensitivity or f"measured on {min(SENSED, len(context.images))} inputs",
        seconds=time.perf_counter() - start,
    )


def _measure(options: QuantizeOptions, context: CalibrationContext, progress: Progress) -> list[Row]:
    count = max(SENSED // context.batch, 1) * context.batch
    few = replace(context, images=context.images[:count])
    how = Measuring(options.per_channel, options.saturation_safe, options.reconstruct, options.seed)
    return layer_errors(few, _variants(options), how, progress)


def _variants(options: QuantizeOptions) -> list[Variant]:
    """Choose the bits to measure: with small types the most of those that the file stores alike."""
    most = options.weight_bits
    levels = {min(4, most), most} if options.small_types else {b for b in MEASURED if b < most} | {most}
    return make_variants(sorted(levels | {LEAST} if len(levels) == 1 else levels), (), ())


def _estimate(curve: dict[float, float], bits: int) -> float:
    """Estimate what a layer costs; 0 where its bits are given and were not measured."""
    return error_at(curve, bits) if curve and min(curve) <= bits <= max(curve) else 0.0


def _check(rows: list[Row], sizes: dict[str, int], path: str) -> None:
    """Raise InputError where the file lacks a layer, or has it in another size."""
    known = {row.weight: row.parameters for row in rows}
    for name, size in sizes.items():
        if known.get(name) != size:
            raise InputError(
                f"--sensitivity {path}: it has no weight {name!r} of {size} elements; measure this model "
                "with onnxcompress sensitivity"
            )
