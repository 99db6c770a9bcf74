"""Sections on blocks and layers: the results of `drop-blocks`, `drop-channels`, `quantize`, …."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from onnxcompress.account import Figures, Refusal
from onnxcompress.formatting import number, percent
from onnxcompress.optimize.block_drop.figures import BlockRow, DropBlocksFigures
from onnxcompress.optimize.channel_drop.figures import ChannelGroupRow, DropChannelsFigures
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome, tuning_text
from onnxcompress.passes.prune.figures import PruneFigures
from onnxcompress.passes.quantize.figures import QuantizedLayerRow, QuantizeFigures
from onnxcompress.quantization.ort_fusion import OptimizedNodes
from onnxcompress.report.charts import Bars, Point, Scatter
from onnxcompress.report.elements import Fold, Part, Plot, Prose, Section, Table
from onnxcompress.report.run_data import Material
from onnxcompress.report.sections.passes import left_alone
from onnxcompress.runtime.block_latency import Share, additivity_text, latency_text

DRAWN = 60
"""Largest number of layers in a chart."""


def blocks(material: Material) -> Section | None:
    """Show which blocks were dropped, and the scores that decided it.

    Args:
        material: The facts about the run.

    Returns:
        The section; None where the run has nothing to show there.
    """
    parts: list[Part] = []
    for step in material.steps:
        if isinstance(step.result.measured, DropBlocksFigures):
            parts += _blocks(step.result.measured)
    return Section("blocks", "Blocks", parts) if parts else None


def _blocks(figures: DropBlocksFigures) -> list[Part]:
    rows = figures.blocks
    order = {name: place for place, name in enumerate(figures.order or (), 1)}
    gone = sorted((r.name for r in rows if r.dropped), key=lambda name: order.get(name, 0))
    text = (
        f"{len(gone)} of {len(rows)} blocks were dropped: {', '.join(gone)}."
        if gone
        else "None was dropped."
    )
    parts: list[Part] = [Prose(text)]
    scored = [
        _Scored(r, Share(*(100 * v for v in r.latency_share)), r.recoverability, r.score or 0.0)
        for r in rows
        if r.latency_share is not None and r.recoverability is not None
    ]
    if scored:
        parts += [_scatter(scored), _table(scored, order)]
    if figures.noisy_latency:
        parts.append(
            Prose("The machine was too busy to tell blocks apart: their share was taken by multiply-adds.")
        )
    if figures.latency.clock == "processor":
        parts.append(
            Prose("The machine was too busy for a wall clock: latency is processor time on one thread.")
        )
    if figures.additivity is not None:
        text = additivity_text(figures.additivity)
        parts.append(Prose(f"{text[0].upper()}{text[1:]} (95 %)."))
    error = figures.feature_error
    if error is not None:
        parts.append(
            Prose(
                f"After tuning, the features differ from the original's by {percent(error**0.5, 1)} (root "
                "of the relative squared error) on inputs that nothing was tuned on."
            )
        )
    if figures.tuning is not None:
        text = tuning_text(figures.tuning)
        parts.append(Prose(f"{text[0].upper()}{text[1:]}."))
    return parts


def channels(material: Material) -> Section | None:
    """Show which channels were cut.

    Args:
        material: The facts about the run.

    Returns:
        The section; None where the run has nothing to show there.
    """
    parts: list[Part] = []
    for step in material.steps:
        figures = step.result.measured
        if isinstance(figures, DropChannelsFigures):
            parts += [Prose(f"{latency_text(figures.latency)}."), _groups(figures.groups)]
    return Section("channels", "Channels", parts) if parts else None


def _groups(rows: Sequence[ChannelGroupRow]) -> Table:
    errors = ["–" if r.error is None else f"{r.error:.2g}" for r in rows]
    cells = [
        [r.name, str(r.channels), str(r.kept), number(r.parameters), number(r.macs), error]
        for r, error in zip(rows, errors, strict=True)
    ]
    columns = ["group", "channels", "kept", "parameters", "multiply-adds", "predicted error"]
    cut = frozenset(at for at, row in enumerate(rows) if row.kept < row.channels)
    return Table("Groups of channels", columns, cells, marked=cut)


@dataclass(frozen=True)
class _Scored:
    """A block with scores."""

    row: BlockRow
    percent: Share
    """Its share of the latency, in percent."""
    recoverability: float
    score: float


def _scatter(blocks: Sequence[_Scored]) -> Plot:
    points = [Point(b.row.name, *b.percent, b.recoverability, b.row.dropped) for b in blocks]
    chart = Scatter(
        points,
        "share of the network's latency, %",
        "recoverability R: relative error left",
        "dropped",
        "kept",
    )
    low = min(blocks, key=lambda b: b.recoverability)
    high = max(blocks, key=lambda b: b.recoverability)
    return Plot(
        "What each block costs, and what is lost without it",
        "Blocks low and to the right are the best to drop: they take time, and the rest can learn what "
        "they did; lines are 95 % intervals. "
        f"Least is lost without {low.row.name} (R {low.recoverability:.3g}), most without "
        f"{high.row.name} (R {high.recoverability:.3g}). R is taken with one block gone; it changes as "
        "others go.",
        chart,
    )


def _table(blocks: Sequence[_Scored], order: Mapping[str, int]) -> Table:
    shown = []
    for b in blocks:
        value, low, high = b.percent
        decision = "kept"
        if b.row.dropped:
            decision = f"dropped, {order[b.row.name]}." if b.row.name in order else "dropped"
        share = f"{value:.2f} % ({low:.2f} to {high:.2f})"
        shown.append([b.row.name, decision, f"{b.recoverability:.4f}", share, f"{b.score:.3f}"])
    columns = ["block", "decision", "recoverability R", "latency share (95 % interval)", "R / share"]
    marked = frozenset(i for i, b in enumerate(blocks) if b.row.dropped)
    return Table("Blocks as first scored", columns, shown, 2, marked)


def noise(material: Material) -> Section | None:
    """Show the signal to noise of each layer that was quantized or pruned.

    Args:
        material: The facts about the run.

    Returns:
        The section; None where the run has nothing to show there.
    """
    parts: list[Part] = []
    for step in material.steps:
        figures = step.result.measured
        if isinstance(figures, QuantizeFigures):
            rows = [_Noisy(r.name, r.snr_db, _quantized(r)) for r in figures.layers]
            columns = ["weight", "input", "input range"]
            parts += [*_noise(figures, rows, "quantization", columns), _runtime(figures.runtime)]
            parts += [] if figures.tuning is None else [_tuning(figures.tuning)]
        elif isinstance(figures, PruneFigures):
            pruned = [r for r in figures.layers or () if r.snr_db is not None]
            rows = [_Noisy(r.name, r.snr_db or 0.0, [percent(r.sparsity, 1)]) for r in pruned]
            parts += _noise(figures, rows, "pruning", ["zeros"]) if rows else []
    return Section("layers", "Sensitivity per layer", parts) if parts else None


def _tuning(outcome: TuningOutcome) -> Prose:
    text = tuning_text(outcome)
    return Prose(
        f"{text[0].upper()}{text[1:]}. The outputs differ from the original's by "
        f"{percent(outcome.error**0.5, 1)} (root of the relative squared error) on {outcome.held_out} "
        "inputs that nothing was learned from."
    )


class _Noisy(NamedTuple):
    """A layer with the signal to noise ratio of its output, and its other cells of the table."""

    name: str
    snr_db: float
    cells: list[str]


def _noise(figures: Figures, rows: Sequence[_Noisy], what: str, columns: list[str]) -> list[Part]:
    worst = min(rows, key=lambda r: r.snr_db)
    shown, note = list(rows), ""
    if len(rows) > DRAWN:
        kept = {id(r) for r in sorted(rows, key=lambda r: r.snr_db)[:DRAWN]}
        shown = [r for r in rows if id(r) in kept]
        note = f" The {DRAWN} noisiest of {len(rows)} layers are drawn."
    outputs = "; ".join(f"{name}: {db:.1f} dB" for name, db in (figures.output_snr_db or {}).items())
    finding = (
        f"The shorter the bar, the more {what} costs there; 20 dB is noise of a tenth of the signal. "
        f"{worst.name} suffers most ({worst.snr_db:.1f} dB).{note}"
        + (f" At the outputs, on the inputs learned from: {outputs}." if outputs else "")
    )
    bars = Bars([(r.name, [r.snr_db]) for r in shown], "signal to noise of the output, dB")
    cells = [[r.name, *r.cells, f"{r.snr_db:.1f} dB"] for r in rows]
    table = Table("Layers, in the network's order", ["layer", *columns, "signal to noise"], cells, 1)
    return [
        Plot("Signal to noise of each layer's output", finding, bars),
        Fold(f"All {len(rows)} layers", [table]),
    ]


def _quantized(row: QuantizedLayerRow) -> list[str]:
    span = row.input_range
    return [
        f"{row.weight_bits} bits",
        f"{row.input_bits} bits" if row.input_bits else "float",
        "–" if span is None else f"{span[0]:.3g} to {span[1]:.3g}",
    ]


def _runtime(runtime: OptimizedNodes) -> Prose:
    fused = ", ".join(f"{count} {op}" for op, count in runtime.fused.items())
    text = (
        f"onnxruntime fuses {fused}." if fused else "onnxruntime fuses nothing: no speed is to be expected."
    )
    left = ", ".join(f"{len(names)} {op}" for op, names in runtime.in_float.items())
    return Prose(text + (f" It computes with floats: {left}." if left else ""))


def sensitivity(material: Material) -> Section | None:
    """Show how much a change of each layer alone affects the outputs.

    Args:
        material: The facts about the run.

    Returns:
        The section; None where the run has nothing to show there.
    """
    rows = material.account.get("rows") or []
    if not rows or "error" not in rows[0]:
        return None
    parts: list[Part] = []
    kinds = dict.fromkeys(r["kind"] for r in rows)
    parts += [_sensitive([r for r in rows if r["kind"] == kind]) for kind in kinds]
    columns = ["layer", "change", "error of the outputs", "other top-1 class"]
    table = Table("Each change of a layer alone", columns, [_changed(r) for r in rows], 2)
    parts.append(Fold(f"All {len(rows)} measurements", [table]))
    if material.account.get("refusals"):
        refusals = [Refusal(**values) for values in material.account["refusals"]]
        parts += left_alone(refusals, "Not measured")
    return Section("sensitivity", "Sensitivity per layer", parts)


def _sensitive(rows: Sequence[Mapping[str, Any]]) -> Plot:
    """A chart of the strongest change of one kind."""
    values = [float(r["value"]) for r in rows]
    hardest = max(values) if rows[0]["kind"] == "sparsity" else min(values)
    shown = [r for r in rows if float(r["value"]) == hardest]
    worst = max(shown, key=lambda r: float(r["error"]))
    drawn = {id(r) for r in sorted(shown, key=lambda r: -float(r["error"]))[:DRAWN]}
    bars = [(str(r["layer"]), [100 * float(r["error"])]) for r in shown if id(r) in drawn]
    cut = f" The {DRAWN} most sensitive of {len(shown)} layers are drawn." if len(shown) > DRAWN else ""
    return Plot(
        f"One layer with {words(worst)}, all others as they were",
        f"The longer the bar, the more the network's outputs change; 1 % is 20 dB of signal to noise. "
        f"{worst['layer']} matters most ({100 * worst['error']:.3g} %).{cut}",
        Bars(bars, "error of the outputs, % of their variance"),
    )


def words(row: Mapping[str, Any]) -> str:
    """Describe a change of a layer.

    Args:
        row: A row of the sensitivity analysis.

    Returns:
        Such as `4-bit weights`.
    """
    if row["kind"] == "sparsity":
        return f"{percent(row['value'], 0)} of its weights zero"
    return f"{row['value']:g}-bit {str(row['kind']).removesuffix('_bits')}s"


def _changed(row: Mapping[str, Any]) -> list[str]:
    changed = "–" if row["changed"] is None else percent(row["changed"], 1)
    return [str(row["layer"]), words(row), percent(row["error"], 3), changed]
