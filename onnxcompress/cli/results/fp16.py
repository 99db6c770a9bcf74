"""Show the result of `fp16`: the error of the outputs, the float32 nodes, and the provider used."""

from __future__ import annotations

import math

from rich.console import Console

from onnxcompress.passes.base import PassResult
from onnxcompress.passes.fp16.figures import HalfPrecisionFigures, ProviderRun


def show_fp16(console: Console, result: PassResult[HalfPrecisionFigures | None]) -> None:
    """Print a line for each figure; the nodes that stayed are listed with the refusals.

    Args:
        console: Where to print.
        result: The result of the pass.
    """
    measured = result.measured
    if measured is None:
        console.print("nothing to change")
        return
    kept = len(measured.kept_float32)
    text = f"{measured.converted} nodes compute in float16, {kept} stay float32 to limit the error"
    console.print(text, markup=False)
    whole = _error(measured.all_float16)
    text = f"error of the outputs: {_error(measured.error)}, at most {_error(measured.max_error)} asked"
    if kept:
        text += f"; with all nodes in float16: {whole}"
    console.print(text, markup=False)
    for used in result.inputs:
        console.print(f"measured on {used.count} {used.source} ({used.why})", markup=False)
    _show_runtime(console, measured.runtime)


def _show_runtime(console: Console, runtime: ProviderRun | None) -> None:
    if runtime is None:
        return
    note = ""
    if runtime.provider == "cpu":
        note = "; a CPU computes it in float32, the gain is on GPUs"
    error = _error(runtime.error)
    console.print(f"run on {runtime.provider}: error {error}{note}", markup=False)


def _error(share: float) -> str:
    return "infinite" if math.isinf(share) else f"{100 * share:.2g} %"
