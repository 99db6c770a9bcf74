"""Model cards: what a result is, from what and by which passes, and what was measured where."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from onnxcompress.formatting import milliseconds, percent, size
from onnxcompress.search.trial import Row, Trial, verdicts
from onnxcompress.version import __version__


def model_card(trial: Trial, row: Row, recipe: str) -> str:
    """Describe a result in Markdown: from what, by which passes, measured where, within which limits.

    Args:
        trial: The trial that it came of.
        row: Its figures.
        recipe: What makes the model again.

    Returns:
        The text.
    """
    lines = [f"# {trial.name}", "", f"Made from `{Path(trial.model).name}` by onnxcompress {__version__}."]
    lines += ["", "## Passes", ""]
    lines += [f"{at}. `{one.name}`{_options(one)}" for at, one in enumerate(trial.recipe.passes, 1)]
    lines += ["", "## Figures", "", "| | before | after |", "|---|---|---|"]
    lines.append(f"| size | {size(row['bytes_before'])} | {size(row['bytes'])} |")
    if row.get("top1") is not None:
        lines.append(f"| top-1 accuracy | {percent(row['top1_before'])} | {percent(row['top1'])} |")
    if row.get("agreement") is not None:
        lines.append(f"| same class as before | | {percent(row['agreement'])} |")
    if row.get("latency_ms") is not None:
        before, after = milliseconds(row["latency_before_ms"]), milliseconds(row["latency_ms"])
        low, high = 1 / row["ratio_high"], 1 / row["ratio_low"]
        lines.append(f"| median latency | {before} | {after} |")
        lines.append(f"| speedup | | {1 / row['ratio']:.2f} (95 % interval {low:.2f} to {high:.2f}) |")
    if row.get("inputs"):
        lines += ["", f"Accuracy and agreement: {row['inputs']}, {row['preprocess']}."]
    if row.get("device"):
        lines += ["", f"Latency: onnxruntime, {row['device']}, run by run with the model before."]
    lines += ["", f"Notes: {row['notes']}."] if row.get("notes") else []
    judged = verdicts(row, trial.recipe.gates)
    lines += ["", "## Limits", ""] if judged else []
    lines += [f"- {'kept' if verdict.passed else 'MISSED'}: {verdict.text}" for verdict in judged]
    lines += ["", f"SHA-256 of the file: `{row['sha256']}`. Recipe: {recipe}."]
    return "\n".join(lines) + "\n"


def _options(pass_: Any) -> str:
    chosen = [
        f"{field.name} {getattr(pass_, field.name)}"
        for field in fields(pass_)
        if getattr(pass_, field.name) != field.default
    ]
    return f": {', '.join(chosen)}" if chosen else ""
