"""Show the result of `quantize`: a row for each layer, the nodes that onnxruntime fuses, and the error."""

from __future__ import annotations

from rich.console import Console

from onnxcompress.cli.console import learned_from, table
from onnxcompress.optimize.reconstruction.tuning_outcome import tuning_text
from onnxcompress.passes.base import PassResult
from onnxcompress.passes.quantize.figures import Budget, FloatLayers, QuantizedLayerRow, QuantizeFigures
from onnxcompress.quantization.ort_fusion import OptimizedNodes
from onnxcompress.runtime.block_latency import latency_text

SHOWN = 12
"""Number of layers that are listed, those with the most noise."""


def show_quantize(console: Console, result: PassResult[QuantizeFigures | None]) -> None:
    """Print the layers with the most noise, then figures of the whole model.

    Args:
        console: Where to print.
        result: The result of the pass.
    """
    measured = result.measured
    if measured is None:
        console.print("nothing to change")
        return
    rows = measured.layers
    worst = sorted(rows, key=lambda row: row.snr_db)[:SHOWN]
    title = f"Layers with the most noise ({len(worst)} of {len(rows)}; all with --json)"
    columns = ["layer", "weight", "input", "input range", "signal to noise"]
    console.print(table(title, columns, [_row(row) for row in worst]))
    for line in learned_from(result.inputs):
        console.print(line, markup=False)
    if measured.budget is not None:
        _show_budget(console, measured.budget)
    _show_runtime(console, measured.runtime)
    if measured.float_layers is not None:
        _show_float_layers(console, measured.float_layers)
    if measured.tuning is not None:
        console.print(tuning_text(measured.tuning))
        console.print(
            f"relative error of the outputs on {measured.tuning.held_out} inputs kept aside: "
            f"{measured.tuning.error**0.5:.3f} (root mean square)"
        )
    if result.guard is None or result.guard.fidelity is None:  # else its line has that of unseen inputs
        for name, decibels in (measured.output_snr_db or {}).items():
            text = f"output {name!r}: signal to noise {decibels:.1f} dB on the inputs learned from"
            console.print(f"{text} (unseen ones were not compared)", markup=False)


def _row(row: QuantizedLayerRow) -> list[str]:
    span = row.input_range
    return [
        row.name,
        f"{row.weight_bits} bits",
        f"{row.input_bits} bits" if row.input_bits else "float",
        "" if span is None else f"{span[0]:.3g} to {span[1]:.3g}",
        f"{row.snr_db:.1f} dB",
    ]


def _show_budget(console: Console, budget: Budget) -> None:
    layers = ", ".join(f"{count} with {bits}" for bits, count in budget.layers_by_bits.items())
    console.print(
        f"bits of the layers' weights: {layers}; sensitivities: {budget.sensitivity}", markup=False
    )
    what = "as stored" if budget.counted == "stored" else "of information"
    console.print(
        f"weights: {budget.average_bits:.2f} bits on average, {budget.megabytes:.3g} MB {what} "
        f"(budget {budget.budget_bits:.2f} bits)"
    )
    if budget.counted != "stored":
        console.print("fewer bits are stored in 8-bit types: the file is smaller only with --small-types")


def _show_float_layers(console: Console, found: FloatLayers) -> None:
    title = f"Float layers: quantizing them gains no time on {found.latency.provider}"
    rows = [
        [
            layer.name,
            f"{100 * layer.gain:+.1f} % ({100 * layer.low:+.1f} to {100 * layer.high:+.1f} %)",
            f"{100 * layer.noise:.2g} %",
            str(layer.of_its_kind),
        ]
        for layer in found.layers
    ]
    columns = ["layer", "quantized it would gain", "and add noise", "layers measured together"]
    console.print(table(title, columns, rows))
    noise = f"{100 * found.noise_before:.2g} → {100 * found.noise:.2g} %"
    console.print(
        f"with these in floats: noise of the outputs over their variation {noise}; "
        f"{latency_text(found.latency)}",
        markup=False,
    )


def _show_runtime(console: Console, runtime: OptimizedNodes) -> None:
    fused = ", ".join(f"{count} {op}" for op, count in runtime.fused.items())
    console.print(f"onnxruntime fuses: {fused or 'nothing (expect no speedup)'}", markup=False)
    left = ", ".join(f"{len(names)} {op}" for op, names in runtime.in_float.items())
    if left:
        console.print(f"it computes with floats: {left}", markup=False)
