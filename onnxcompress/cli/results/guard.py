"""Show the result of the guard: how much the outputs changed, and on which inputs."""

from __future__ import annotations

from rich.console import Console

from onnxcompress.evaluation.guard import GuardMeasurements, Verdict
from onnxcompress.passes.base import Pass


def show_guard(
    console: Console, pass_: Pass, measured: GuardMeasurements | None, judged: Verdict | None
) -> None:
    """Print a line about the outputs after a pass, and for a warning the remedies.

    Args:
        console: Where to print.
        pass_: The pass.
        measured: The guard's measurements of its result; None: there are none.
        judged: The verdict.
    """
    if measured is None or judged is None:
        return
    if pass_.preserves_function and measured.fidelity is not None and measured.fidelity.outputs:
        console.print(f"{measured.fidelity.furthest_text}, on {measured.inputs}", markup=False)
        if judged.status == "kept":
            return
    _show(console, measured, judged, "")


def show_whole(console: Console, measured: GuardMeasurements | None, judged: Verdict | None) -> None:
    """Print a line that compares the result of a chain with its input.

    Args:
        console: Where to print.
        measured: The guard's measurements; None: there are none, or those of a single pass are the same.
        judged: The verdict.
    """
    if measured is not None and judged is not None:
        _show(console, measured, judged, "all passes together: ")


def _show(console: Console, measured: GuardMeasurements, judged: Verdict, whose: str) -> None:
    on = f", on {measured.inputs}" if measured.inputs else ""
    same = None if measured.fidelity is None else measured.fidelity.agreement
    classes = "" if same is None else f", the same class for {100 * same:.0f} %"
    word = {"warned": "WARNING: ", "forced": "WARNING, written by --force: "}.get(judged.status, "")
    console.print(f"{word}{whose}{judged.text}{classes}{on}", markup=False)
    for text in judged.advice:
        console.print(f"  {text}", markup=False)
