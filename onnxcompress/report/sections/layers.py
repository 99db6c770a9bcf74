"""Sections on blocks and layers: the results of `drop-blocks`, `quantize`, `prune` and `sensitivity`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.formatting import percent
from onnxcompress.report.charts import Bars, Point, Scatter
from onnxcompress.report.elements import Fold, Part, Plot, Prose, Section, Table
from onnxcompress.report.run_data import Material
from onnxcompress.report.sections.passes import left_alone
from onnxcompress.runtime.block_latency import additivity_text

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
        rows = step["measured"].get("blocks", [])
        if rows:
            parts += _blocks(rows, step["measured"])
    return Section("blocks", "Blocks", parts) if parts else None


def _blocks(rows: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> list[Part]:
    order = {name: place for place, name in enumerate(measured.get("order", []), 1)}
    gone = sorted((r["name"] for r in rows if r["dropped"]), key=lambda name: order.get(name, 0))
    text = (
        f"{len(gone)} of {len(rows)} blocks were dropped: {', '.join(gone)}."
        if gone
        else "None was dropped."
    )
    parts: list[Part] = [Prose(text)]
    scored = [r for r in rows if r.get("latency_share") and r.get("recoverability") is not None]
    if scored:
        parts += [_scatter(scored), _table(scored, order)]
    if measured.get("noisy_latency"):
        parts.append(
            Prose("The machine was too busy to tell blocks apart: their share was taken by multiply-adds.")
        )
    if measured.get("clock") == "processor":
        parts.append(
            Prose("The machine was too busy for a wall clock: latency is processor time on one thread.")
        )
    if "additivity" in measured:
        text = additivity_text(measured["additivity"])
        parts.append(Prose(f"{text[0].upper()}{text[1:]} (95 %)."))
    error = measured.get("feature_error")
    if error is not None:
        parts.append(
            Prose(
                f"After tuning, the features differ from the original's by {percent(error**0.5, 1)} (root "
                "of the relative squared error) on the images that it was tuned on."
            )
        )
    return parts


def _scatter(rows: Sequence[Mapping[str, Any]]) -> Plot:
    points = []
    for r in rows:
        value, low, high = (100 * v for v in r["latency_share"])
        points.append(Point(r["name"], value, low, high, r["recoverability"], r["dropped"]))
    chart = Scatter(
        points,
        "share of the network's latency, %",
        "recoverability R: relative error left",
        "dropped",
        "kept",
    )
    low = min(rows, key=lambda r: float(r["recoverability"]))
    high = max(rows, key=lambda r: float(r["recoverability"]))
    return Plot(
        "What each block costs, and what is lost without it",
        "Blocks low and to the right are the best to drop: they take time, and the rest can learn what "
        "they did; lines are 95 % intervals. "
        f"Least is lost without {low['name']} (R {low['recoverability']:.3g}), most without "
        f"{high['name']} (R {high['recoverability']:.3g}). R is taken with one block gone; it changes as "
        "others go.",
        chart,
    )


def _table(rows: Sequence[Mapping[str, Any]], order: Mapping[str, int]) -> Table:
    shown = []
    for r in rows:
        value, low, high = (100 * v for v in r["latency_share"])
        decision = "kept"
        if r["dropped"]:
            decision = f"dropped, {order[r['name']]}." if r["name"] in order else "dropped"
        shown.append(
            [
                r["name"],
                decision,
                f"{r['recoverability']:.4f}",
                f"{value:.2f} % ({low:.2f} to {high:.2f})",
                f"{r['score']:.3f}",
            ]
        )
    columns = ["block", "decision", "recoverability R", "latency share (95 % interval)", "R / share"]
    marked = frozenset(i for i, r in enumerate(rows) if r["dropped"])
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
        rows = step["measured"].get("layers", [])
        noisy = [r for r in rows if "snr_db" in r] if isinstance(rows, list) else []
        if noisy:
            parts += _noise(noisy, step["measured"])
    return Section("layers", "Sensitivity per layer", parts) if parts else None


def _noise(rows: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> list[Part]:
    quantized = "weight_bits" in rows[0]
    what = "quantization" if quantized else "pruning"
    worst = min(rows, key=lambda r: float(r["snr_db"]))
    shown, note = list(rows), ""
    if len(rows) > DRAWN:
        kept = {id(r) for r in sorted(rows, key=lambda r: float(r["snr_db"]))[:DRAWN]}
        shown = [r for r in rows if id(r) in kept]
        note = f" The {DRAWN} noisiest of {len(rows)} layers are drawn."
    outputs = "; ".join(
        f"{name}: {db:.1f} dB" for name, db in measured.get("output_snr_db", {}).items() if db is not None
    )
    finding = (
        f"The shorter the bar, the more {what} costs there; 20 dB is noise of a tenth of the signal. "
        f"{worst['name']} suffers most ({worst['snr_db']:.1f} dB).{note}"
        + (f" What is left at the outputs: {outputs}." if outputs else "")
    )
    bars = Bars(
        [(str(r["name"]), [float(r["snr_db"])]) for r in shown], "signal to noise of the output, dB"
    )
    columns = ["layer", "weight", "input", "input range"] if quantized else ["layer", "zeros"]
    cells = [[*(_quantized(r) if quantized else _pruned(r)), f"{r['snr_db']:.1f} dB"] for r in rows]
    table = Table("Layers, in the network's order", [*columns, "signal to noise"], cells, 1)
    return [
        Plot("Signal to noise of each layer's output", finding, bars),
        Fold(f"All {len(rows)} layers", [table]),
        *_runtime(measured.get("runtime")),
    ]


def _pruned(row: Mapping[str, Any]) -> list[str]:
    return [str(row["name"]), percent(row["sparsity"], 1)]


def _quantized(row: Mapping[str, Any]) -> list[str]:
    span = row.get("input_range")
    return [
        str(row["name"]),
        f"{row['weight_bits']} bits",
        f"{row['input_bits']} bits" if row["input_bits"] else "float",
        "–" if span is None else f"{span[0]:.3g} to {span[1]:.3g}",
    ]


def _runtime(runtime: Mapping[str, Any] | None) -> list[Part]:
    if not runtime:
        return []
    fused = ", ".join(f"{count} {op}" for op, count in runtime["fused"].items())
    text = (
        f"onnxruntime fuses {fused}." if fused else "onnxruntime fuses nothing: no speed is to be expected."
    )
    left = ", ".join(f"{len(names)} {op}" for op, names in runtime["float"].items())
    return [Prose(text + (f" It computes with floats: {left}." if left else ""))]


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
        parts += left_alone(material.account["refusals"], "Not measured")
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
