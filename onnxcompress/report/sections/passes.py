"""The section on what each pass did, and what it refused and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from onnxcompress.formatting import percent
from onnxcompress.report.elements import Code, Fold, Heading, Part, Prose, Section, Table, Terms
from onnxcompress.report.run_data import Material

SHOWN = 12
"""Rows of a table in view; the rest is folded away."""
_ELSEWHERE = (
    "blocks",
    "layers",
    "inputs",
    "latency",
    "difference",
    "target_missed",
    "order",
    "additivity",
    "clock",
    "kept_float32",
)
"""Keys of `measured` that other parts of the report show."""


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
    if "steps" in material.account:
        parts += _guard(material.account.get("guard"), "All passes together: ")
    return Section("passes", "What each pass did" if len(steps) > 1 else "What the pass did", parts)


def _account(number: int, step: Mapping[str, Any]) -> list[Part]:
    parts: list[Part] = []
    if number:
        took = f"{step['seconds']:.1f} s" + (", kept from an earlier run" if step["cached"] else "")
        parts.append(Heading(f"{number}. {step['pass']}", took))
    changes, refusals, measured = step["changes"], step["refusals"], step["measured"]
    parts += _changes(changes)
    if refusals:
        parts += left_alone(refusals)
    else:
        parts.append(Prose("Nothing was refused.", "quiet"))
    parts += _guard(step.get("guard"), "")
    terms = plain_terms({k: v for k, v in measured.items() if k not in _ELSEWHERE})
    more: list[Part] = [Terms(terms)] if terms else []
    options = json.dumps(step["options"], indent=2)
    parts.append(Fold("What it measured, and its options", [*more, Code(options)]))
    return parts


def _changes(changes: Sequence[Mapping[str, str]]) -> list[Part]:
    if not changes:
        return [Prose("It changed nothing.")]
    kinds = Counter(c["what"] for c in changes)
    if len(kinds) > SHOWN:
        text = f"{len(changes)} changes, of {len(kinds)} kinds."
    else:
        text = "; ".join(what if n == 1 else f"{n} × {what}" for what, n in kinds.items()) + "."
    rows = [[c["node"], c["what"]] for c in changes]
    return [Prose(text), Fold(f"All {len(rows)} changes", [Table("Changes", ["node", "what"], rows, 2)])]


def left_alone(refusals: Sequence[Mapping[str, str]], title: str = "Left alone") -> list[Part]:
    """Show refusals as a table; rows beyond SHOWN are folded away.

    Args:
        refusals: Mappings with `node`, `rule` and `remedy`.
        title: Caption of the table.

    Returns:
        The table, and the folded rest.
    """
    rows = [[r["node"], r["rule"], r["remedy"] or "–"] for r in refusals]
    columns = ["node", "why", "what would make it possible"]
    if not any(r["remedy"] for r in refusals):
        rows, columns = [row[:2] for row in rows], columns[:2]
    parts: list[Part] = [Table(f"{title}: {len(rows)}", columns, rows[:SHOWN], 3)]
    if len(rows) > SHOWN:
        rest = Table(f"{title}, the rest", columns, rows[SHOWN:], 3)
        parts.append(Fold(f"{len(rows) - SHOWN} more", [rest]))
    return parts


def _guard(found: Mapping[str, Any] | None, whose: str) -> list[Part]:
    """How far the outputs are from what they were, and what to try where that is too far."""
    if found is None:
        return []
    on = f", on {found['inputs']}" if found["inputs"] else ""
    word = {"warned": "Warning: ", "forced": "Warning, written by --force: "}.get(found["status"], "")
    outputs = found["outputs"]
    if found["max_rel"] is not None and outputs:
        worst = max(outputs, key=lambda one: float(one["max_rel"]))
        text = (
            f"largest difference of its outputs: {worst['max_abs']:.3g} absolute, {worst['max_rel']:.3g} "
            f"relative (output {worst['name']!r})"
        )
    else:
        shares = [one["agreement"] for one in outputs if one["agreement"] is not None]
        text = found["text"] + (f", the same class for {percent(min(shares))}" if shares else "")
    tone = "missed" if word else ""
    text = text if whose or word else text[:1].upper() + text[1:]
    return [Prose(f"{word}{whose}{text}{on}.", tone), *(Prose(f"{one}.") for one in found["advice"])]


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
