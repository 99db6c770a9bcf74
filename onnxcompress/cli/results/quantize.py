"""Show the result of `quantize`: a row for each layer, the nodes that onnxruntime fuses, and the error."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from onnxcompress.cli.console import learned_from, table
from onnxcompress.passes.base import PassResult

SHOWN = 12
"""Number of layers that are listed, those with the most noise."""


def show_quantize(console: Console, result: PassResult) -> None:
    """Print the layers with the most noise, then figures of the whole model.

    Args:
        console: Where to print.
        result: The result of the pass.
    """
    measured = result.measured
    rows = measured.get("layers", [])
    if not rows:
        console.print("nothing to change")
        return
    worst = sorted(rows, key=lambda row: float(row["snr_db"]))[:SHOWN]
    title = f"Layers with the most noise ({len(worst)} of {len(rows)}; all with --json)"
    columns = ["layer", "weight", "input", "input range", "signal to noise"]
    console.print(table(title, columns, [_row(row) for row in worst]))
    for line in learned_from(measured["inputs"]):
        console.print(line, markup=False)
    if "budget" in measured:
        _show_budget(console, measured["budget"])
    _show_runtime(console, measured["runtime"])
    for name, decibels in measured["output_snr_db"].items():
        console.print(f"output {name!r}: signal to noise {decibels:.1f} dB on those inputs", markup=False)


def _row(row: dict[str, Any]) -> list[str]:
    span = row["input_range"]
    return [
        str(row["name"]),
        f"{row['weight_bits']} bits",
        f"{row['input_bits']} bits" if row["input_bits"] else "float",
        "" if span is None else f"{span[0]:.3g} to {span[1]:.3g}",
        f"{row['snr_db']:.1f} dB",
    ]


def _show_budget(console: Console, budget: dict[str, Any]) -> None:
    layers = ", ".join(f"{count} with {bits}" for bits, count in budget["layers_by_bits"].items())
    console.print(
        f"bits of the layers' weights: {layers}; sensitivities: {budget['sensitivity']}", markup=False
    )
    what = "as stored" if budget["counted"] == "stored" else "of information"
    console.print(
        f"weights: {budget['average_bits']:.2f} bits on average, {budget['megabytes']:.3g} MB {what} "
        f"(budget {budget['budget_bits']:.2f} bits)"
    )
    if budget["counted"] != "stored":
        console.print("fewer bits are stored in 8-bit types: the file is smaller only with --small-types")


def _show_runtime(console: Console, runtime: dict[str, Any]) -> None:
    fused = ", ".join(f"{count} {op}" for op, count in runtime["fused"].items())
    console.print(f"onnxruntime fuses: {fused or 'nothing (expect no speedup)'}", markup=False)
    left = ", ".join(f"{len(names)} {op}" for op, names in runtime["float"].items())
    if left:
        console.print(f"it computes with floats: {left}", markup=False)
