"""The section on what each pass did, and what it refused and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.account import Change, Figures, Refusal
from onnxcompress.evaluation.guard import GuardMeasurements, Verdict
from onnxcompress.formatting import counted, percent
from onnxcompress.optimize.block_drop.figures import DropBlocksFigures
from onnxcompress.optimize.channel_drop.figures import DropChannelsFigures
from onnxcompress.passes.fp16.figures import HalfPrecisionFigures
from onnxcompress.passes.prune.figures import PruneFigures
from onnxcompress.passes.quantize.figures import QuantizeFigures
from onnxcompress.pipeline.chain import Step
from onnxcompress.report.elements import Code, Fold, Heading, Part, Prose, Section, Table, Terms
from onnxcompress.report.run_data import Material
from onnxcompress.runtime.block_latency import LatencyChange, latency_text

SHOWN = 12
"""Rows of a table in view; the rest is folded away."""
ELSEWHERE: Mapping[type[Figures], tuple[str, ...]] = {
    Figures: ("inputs", "target_missed"),
    DropBlocksFigures: ("blocks", "latency", "order", "additivity"),
    DropChannelsFigures: ("groups", "latency"),
    HalfPrecisionFigures: ("kept_float32",),
    PruneFigures: ("layers",),
    QuantizeFigures: ("layers",),
}
"""Fields that other parts of the report show."""


def passes(material: Material) -> Section | None:
    """Show for each pass what it did, what it refused and why, and what it measured.

    Args:
        material: The facts about the run.

    Returns:
        The section; None where the run has nothing to show there.
    """
    steps = material.steps
    if not steps:
        return None
    parts: list[Part] = []
    for number, step in enumerate(steps, 1):
        parts += _account(number if len(steps) > 1 else 0, step)
    parts += _guard(material.guard, material.verdict, "All passes together: ")
    parts += _latency(material.latency, "All passes together: ")
    return Section("passes", "What each pass did" if len(steps) > 1 else "What the pass did", parts)


def _account(number: int, step: Step) -> list[Part]:
    parts: list[Part] = []
    if number:
        took = f"{step.seconds:.1f} s" + (", kept from an earlier run" if step.cached else "")
        parts.append(Heading(f"{number}. {step.pass_.name}", took))
    result = step.result
    parts += _changes(result.changes)
    if result.refusals:
        parts += left_alone(result.refusals)
    else:
        parts.append(Prose("Nothing was refused.", "quiet"))
    parts += _guard(result.guard, step.verdict, "") + _latency(result.latency, "")
    hidden = ["latency"] * (result.latency is not None)
    hidden += [name for kind in type(result.figures).__mro__ for name in ELSEWHERE.get(kind, ())]
    terms = plain_terms({k: v for k, v in result.measured_json().items() if k not in hidden})
    more: list[Part] = [Terms(terms)] if terms else []
    options = json.dumps(step.pass_.options(), indent=2)
    parts.append(Fold("What it measured, and its options", [*more, Code(options)]))
    return parts


def _changes(changes: Sequence[Change]) -> list[Part]:
    if not changes:
        return [Prose("It changed nothing.")]
    kinds = Counter(c.what for c in changes)
    if len(kinds) > SHOWN:
        text = f"{counted(len(changes), 'change')}, of {counted(len(kinds), 'kind')}."
    else:
        text = "; ".join(what if n == 1 else f"{n} × {what}" for what, n in kinds.items()) + "."
    rows = [[c.node, c.what] for c in changes]
    return [Prose(text), Fold(f"All {len(rows)} changes", [Table("Changes", ["node", "what"], rows, 2)])]


def left_alone(refusals: Sequence[Refusal], title: str = "Left alone") -> list[Part]:
    """Show refusals as a table; rows beyond SHOWN are folded away.

    Args:
        refusals: The refusals.
        title: Caption of the table.

    Returns:
        The table, and the folded rest.
    """
    rows = [[r.node, r.rule, r.remedy or "–"] for r in refusals]
    columns = ["node", "why", "what would make it possible"]
    if not any(r.remedy for r in refusals):
        rows, columns = [row[:2] for row in rows], columns[:2]
    parts: list[Part] = [Table(f"{title}: {len(rows)}", columns, rows[:SHOWN], 3)]
    if len(rows) > SHOWN:
        rest = Table(f"{title}, the rest", columns, rows[SHOWN:], 3)
        parts.append(Fold(f"{len(rows) - SHOWN} more", [rest]))
    return parts


def _guard(measured: GuardMeasurements | None, verdict: Verdict | None, whose: str) -> list[Part]:
    """Show how far the outputs are from what they were, and what to try where that is too far."""
    if measured is None or verdict is None:
        return []
    on = f", on {measured.inputs}" if measured.inputs else ""
    word = {"warned": "Warning: ", "forced": "Warning, written by --force: "}.get(verdict.status, "")
    fidelity = measured.fidelity
    if measured.max_rel is not None and fidelity is not None and fidelity.outputs:
        text = fidelity.furthest_text
    else:
        same = None if fidelity is None else fidelity.agreement
        text = verdict.text + ("" if same is None else f", the same class for {percent(same)}")
    tone = "missed" if word else ""
    text = text if whose or word else text[:1].upper() + text[1:]
    return [Prose(f"{word}{whose}{text}{on}.", tone), *(Prose(f"{advice}.") for advice in verdict.advice)]


def _latency(change: LatencyChange | None, whose: str) -> list[Part]:
    """Say what the latency was and is, and where that is no gain."""
    if change is None:
        return []
    text = latency_text(change)
    text = text if whose else text[:1].upper() + text[1:]
    return [Prose(f"{whose}{text}.", "" if change.high < 1 else "missed")]


def plain_terms(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """List values with their names; nested names are joined.

    Args:
        values: JSON values by name.
        prefix: Text before each name.

    Returns:
        Pairs of name and value; of a long list only its first 8 elements.
    """
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += plain_terms(value, f"{key}: ") if value else [(name, "none")]
        elif isinstance(value, list):
            shown = ", ".join(plain(v) for v in value[:8])
            rows.append((name, (shown + (f" … ({len(value)})" if len(value) > 8 else "")) or "none"))
        else:
            rows.append((name, plain(value)))
    return rows


def plain(value: Any) -> str:
    """Format a JSON value.

    Args:
        value: A value that is neither a list nor a mapping.

    Returns:
        Its text; numbers with four digits.
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
