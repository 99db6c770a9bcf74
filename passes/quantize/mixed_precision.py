"""Bits of each layer's weight under a budget: measured in the same command, or read from a file.

A budget counts bits of all weights that are quantized. In 8-bit types, where fewer bits are a narrower
range, it counts them as information, and the file is as large as with 8 bits; with `small_types` it counts
what is stored, 4 bits up to 4 and 8 beyond.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnxcompress.errors import InputError
from onnxcompress.model import Model
from onnxcompress.optimize.reconstruction.context import CalibrationContext
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


@dataclass(frozen=True)
class Chosen:
    """What the budget gave."""

    bits: dict[str, int]
    """By name of the weight."""
    account: dict[str, Any]


def choose_bits(
    one: QuantizeOptions, subject: CalibrationContext, bits: Bits, original: Model, progress: Progress
) -> Chosen:
    """Bits within the budget. Raises OptionError where there is no such, InputError for a wrong file."""
    start = time.perf_counter()
    layers = subject.plan.layers.values()
    sizes = {layer.linear.weight_name: int(layer.linear.weight.size) for layer in layers}
    lowest = make_plan(subject.model, replace(bits, weight=LEAST)).layers.values()
    floors = {layer.linear.weight_name: layer.weight_bits for layer in lowest}
    if one.sensitivity is not None:
        rows = read_rows(Path(one.sensitivity), original.digest())
        _check(rows, sizes, one.sensitivity)
    else:
        rows = _measure(one, subject, progress)
    total = sum(sizes.values())
    budget = min(
        float("inf") if one.bits_budget is None else one.bits_budget * total,
        float("inf") if one.size_budget is None else one.size_budget * 8e6,
    )
    chosen = mixed_bits(rows, sizes, floors, one.weight_bits, budget, small_types=one.small_types)
    cost = sum(sizes[name] * stored_bits(b, one.small_types) for name, b in chosen.items())
    known = curves(rows, "weight_bits")
    return Chosen(
        chosen,
        {
            "counted": "stored" if one.small_types else "information",
            "average_bits": cost / total,
            "budget_bits": budget / total,
            "megabytes": cost / 8e6,
            "layers_by_bits": {str(b): n for b, n in sorted(Counter(chosen.values()).items())},
            "estimated_error": sum(_estimate(known.get(name, {}), b) for name, b in chosen.items()),
            "sensitivity": one.sensitivity or f"measured on {min(SENSED, len(subject.images))} inputs",
            "seconds": time.perf_counter() - start,
        },
    )


def _measure(one: QuantizeOptions, subject: CalibrationContext, progress: Progress) -> list[Row]:
    count = max(SENSED // subject.batch, 1) * subject.batch
    few = replace(subject, images=subject.images[:count])
    how = Measuring(one.per_channel, one.safe, one.reconstruct, one.seed)
    return layer_errors(few, _variants(one), how, progress)


def _variants(one: QuantizeOptions) -> list[Variant]:
    """With small types all bits of one size cost the same, the most of each are enough."""
    most = one.weight_bits
    levels = {min(4, most), most} if one.small_types else {b for b in MEASURED if b < most} | {most}
    return make_variants(sorted(levels | {LEAST} if len(levels) == 1 else levels), (), ())


def _estimate(curve: dict[float, float], bits: int) -> float:
    """0 for a layer whose bits are given and were not measured."""
    return error_at(curve, bits) if curve and min(curve) <= bits <= max(curve) else 0.0


def _check(rows: list[Row], sizes: dict[str, int], path: str) -> None:
    """Raises InputError where a layer is not in the file, or of another size."""
    known = {row.weight: row.parameters for row in rows}
    for name, size in sizes.items():
        if known.get(name) != size:
            raise InputError(
                f"--sensitivity {path}: it has no weight {name!r} of {size} elements; measure this model "
                "with onnxcompress sensitivity"
            )
