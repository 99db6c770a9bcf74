"""Sections on a model, the sizes of its layers, the inputs of passes, and how to repeat the run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.account import InputSource, Refusal
from onnxcompress.data.preprocessing_choice import preprocess_text
from onnxcompress.formatting import counted, number, percent, size
from onnxcompress.report.chain_chart import Box, ChainChart
from onnxcompress.report.charts import Bars
from onnxcompress.report.elements import Code, Fold, Part, Picture, Plot, Prose, Section, Table, Terms
from onnxcompress.report.run_data import Material
from onnxcompress.report.sections.measurements import device, timings
from onnxcompress.report.sections.passes import left_alone

LARGEST = 30
"""Largest number of layers in the chart of sizes."""
_TINY = 0.005
"""Share of the largest layer's bytes below which nodes that are not layers appear only in the table."""


def sizes(material: Material) -> Section | None:
    """Show the bytes of weights by layer.

    Args:
        material: The facts about the run.

    Returns:
        The section; None where the run has nothing to show there.
    """
    layers = [r for r in material.layers if (r.before or 0) + (r.after or 0) > 0]
    if not layers:
        return None
    ranked = sorted(layers, key=lambda r: -max(r.before or 0, r.after or 0))
    kept = {id(r) for r in ranked[:LARGEST]}
    pair = any(r.after is not None for r in layers)
    most = max(ranked[0].before or 0, ranked[0].after or 0)
    unit, factor = ("kB", 1e3) if most < 5e6 else ("MB", 1e6)

    def scaled(value: int | None) -> float | None:
        return None if value is None else value / factor

    for r in layers:
        if not r.layer and max(r.before or 0, r.after or 0) < _TINY * most:
            kept.discard(id(r))
    rows = [
        (r.name, [scaled(r.before), scaled(r.after)] if pair else [scaled(r.before)])
        for r in layers
        if id(r) in kept
    ]
    chart = Bars(rows, f"weights, {unit}", ("before", "after") if pair else ())
    table = [[r.name, *(_bytes(v) for v in ([r.before, r.after] if pair else [r.before]))] for r in layers]
    columns = ["layer", "before", "after"] if pair else ["layer", "weights"]
    parts: list[Part] = [
        Plot("Weights of each layer", _sizes(material, pair, len(layers)), chart),
        Fold(f"All {len(layers)} layers", [Table("Bytes of weights by layer", columns, table)]),
    ]
    return Section("sizes", "Size by layer", parts)


def _sizes(material: Material, pair: bool, count: int) -> str:
    before = sum(r.before or 0 for r in material.layers)
    text = f"All weights together: {size(before)}"
    if pair:
        gone = sum(r.layer and r.after is None for r in material.layers)
        after = sum(r.after or 0 for r in material.layers)
        text += f" before, {size(after)} after"
        text += f"; gone: {counted(gone, 'layer')}" if gone else ""
    text += "."
    return text + (f" The {LARGEST} largest of {count} layers are drawn." if count > LARGEST else "")


def _bytes(value: int | None) -> str:
    return "–" if value is None else size(value)


def model(material: Material) -> Section | None:
    """Show the facts that `inspect` reports about a model.

    Args:
        material: The facts about the run.

    Returns:
        The section; None where the run has nothing to show there.
    """
    facts = material.account
    if "operators" not in facts:
        return None
    macs = facts["macs"]
    rows = [
        ("file", f"{size(facts['bytes'])}, {number(facts['parameters'])} parameters"),
        ("work", "unknown: not all shapes are known" if macs is None else f"{number(macs)} MACs an image"),
        *((f"input {n}", _shape(s)) for n, s in facts["inputs"].items()),
        *((f"output {n}", _shape(s)) for n, s in facts["outputs"].items()),
        (
            "format",
            f"opset {facts['opset']}, IR {facts['ir_version']}, by {facts['producer'] or 'unknown'}",
        ),
        ("operators", ", ".join(f"{op} {count}" for op, count in facts["operators"].items())),
        ("features", facts["feature"] or "none through which all data flows"),
    ]
    parts: list[Part] = [Terms(rows)]
    if facts.get("blocks"):
        table = [_block(b, facts) for b in facts["blocks"]]
        columns = ["block", "kind", "shape", "parameters", "MACs"]
        parts.append(Table(f"Blocks that can be dropped: {len(table)}", columns, table, 2))
    if facts.get("near_misses"):
        near_misses = [Refusal(**values) for values in facts["near_misses"]]
        parts += left_alone(near_misses, "Nearly a block, but not droppable")
    return Section("model", "The model", parts)


def chain(material: Material) -> Section | None:
    """Draw a network as the chain of its blocks, each as wide as its share of the latency or of the work.

    Args:
        material: The facts about the run.

    Returns:
        The section; None where the run has nothing to show there.
    """
    segments = material.account.get("chain")
    if not segments:
        return None
    timed = material.account.get("latency_on")
    total = sum(s["share"] for s in segments if s["droppable"])
    what = "latency" if timed else "multiply-accumulates"
    rows: list[tuple[str, list[Box]]] = []
    for s in segments:
        size = "×".join(str(d) for d in s["shape"][2:]) or "behind the global pool"
        if not rows or rows[-1][0] != size:
            rows.append((size, []))
        rows[-1][1].append(Box(s["name"], 100 * s["share"], s["droppable"]))
    text = f"Blocks that can be dropped have {percent(total, 1)} of the {what}"
    text += f" on {timed}; what stays shares the rest by its multiply-accumulates." if timed else "."
    if material.account.get("latency_noisy"):
        text += " The machine was too busy to tell blocks apart: shares are of the multiply-accumulates."
    rows = [(f"{size}: {sum(box.share for box in boxes):.1f} %", boxes) for size, boxes in rows]
    chart = ChainChart(rows, f"share of the {what}, %")
    return Section("chain", "Its blocks", [Plot("From the input to the output", text, chart)])


def _shape(shape: list[Any]) -> str:
    return "×".join("?" if d is None else str(d) for d in shape)


def _block(block: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    def share(count: float, total: float | None) -> str:
        return f"{number(count)} ({percent(count / total, 1)})" if total else number(count)

    return [
        str(block["name"]),
        str(block["kind"]),
        _shape(list(block["shape"])[1:]),
        share(block["parameters"], facts["parameters"]),
        share(block["macs"], facts["macs"]),
    ]


def inputs(material: Material) -> Section | None:
    """Show the inputs that passes learned from, with sample images.

    Args:
        material: The facts about the run.

    Returns:
        The section; None where the run has nothing to show there.
    """
    parts: list[Part] = []
    learning = [(step.pass_.name, step.result.inputs) for step in material.steps]
    if isinstance(material.account.get("inputs"), list):  # of sensitivity
        used = tuple(InputSource(**values) for values in material.account["inputs"])
        learning.append((material.command, used))
    parts += [Prose(_learned(who, source)) for who, sources in learning for source in sources]
    if "kind" in material.account and "why" in material.account:
        a = material.account
        parts.append(Prose(f"{a['count']} {a['kind']} images ({a['why']}; seed {a['seed']})."))
    parts += [Picture(p.title, p.text, p.png) for p in material.pictures]
    return Section("inputs", "Inputs", parts) if parts else None


def _learned(who: str, source: InputSource) -> str:
    pixels = source.source != "images" and source.preprocess
    kind = f"{source.source} images" if pixels else source.source
    how = f", {preprocess_text(source.preprocess, source.preprocess_from)}" if source.preprocess else ""
    return f"{who} learned from {source.count} {kind} ({source.why}; seed {source.seed}){how}."


def repeat(material: Material) -> Section:
    """Show how to repeat the run: command, digests of files, software, and provenance of the model.

    Args:
        material: The facts about the run.

    Returns:
        The section.
    """
    parts: list[Part] = [Prose("The same command on the same files:"), Code(_command(material.argv))]
    if material.files:
        rows = [[f.role, f.name, size(f.bytes), f.sha256] for f in material.files]
        parts.append(Table("Files", ["role", "name", "size", "SHA-256"], rows, 4))
    provenance = material.account.get("provenance") or []
    if provenance:
        rows = [
            [f"{n}. {e.get('pass')}", str(e.get("version", "")), str(e.get("input_sha256", ""))]
            for n, e in enumerate(provenance, 1)
        ]
        columns = ["pass", "onnxcompress", "SHA-256 of its input"]
        parts.append(Table("What made the model, as the file itself records it", columns, rows, 3))
        options = "\n".join(json.dumps(e) for e in provenance)
        parts.append(Fold("The record, with all options", [Code(options)]))
    found = timings(material)
    batches = ", ".join(dict.fromkeys(str(t["batch"]) for t in found))
    timed = [("latency on", f"{device(t)}, batch {batches}") for t in found[:1]]
    created = [("made", material.created)] if material.created else []
    parts.append(Terms([*_chosen(material), *timed, *material.environment.items(), *created]))
    return Section("repeat", "How to repeat it", parts)


def _command(argv: Sequence[str]) -> str:
    """The command line, quoted for a shell, with a line for each option."""
    words = ["onnxcompress", *map(shlex.quote, argv)]
    return "".join(
        (" \\\n    " if at and raw.startswith("-") and len(raw) > 1 else " " if at else "") + word
        for at, (raw, word) in enumerate(zip(["onnxcompress", *argv], words, strict=True))
    )


def _chosen(material: Material) -> list[tuple[str, str]]:
    """Seed and device of each pass."""
    rows = []
    for step in material.steps:
        kept = ("seed", "device", "provider", "provider_options")
        held = {k: v for k, v in step.pass_.options().items() if k in kept and v != []}
        if held:
            rows.append(
                (
                    step.pass_.name,
                    ", ".join(
                        f"{k.replace('_', ' ')} {', '.join(v) if isinstance(v, list) else v}"
                        for k, v in held.items()
                    ),
                )
            )
    return rows
