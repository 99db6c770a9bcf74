"""What a person sees: tables and progress by rich, plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from onnxcompress.account import Refusal
from onnxcompress.cli import interrupts
from onnxcompress.evaluation.gate_results import Verdict
from onnxcompress.formatting import number as number
from onnxcompress.formatting import size as size
from onnxcompress.progress import Progress as ReportProgress

SHOWN = 12
"""Refusals that are listed one by one; the rest is counted."""


class _Safe(Console):
    """Text of files, such as names of nodes, cannot command the terminal."""

    def render_str(self, text: str, **how: Any) -> Text:
        kept = (c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
        return super().render_str("".join(kept), **how)


def stdout() -> Console:
    return _console(stderr=False)


def stderr() -> Console:
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    """Where there is no terminal, lines are not broken: what reads them looks for whole ones."""
    console = _Safe(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console = _Safe(stderr=stderr, highlight=False, soft_wrap=True, width=max(console.width, 120))
    return console


@contextmanager
def progress(*, lines: bool = True) -> Iterator[ReportProgress]:
    """Progress bars with time left on standard error; where that is no terminal a line for each stage, or
    without `lines` nothing. Bars are drawn once a second, so that they stay out of what is timed."""
    console = stderr()
    if not console.is_terminal or console.no_color:
        yield _plain_progress(console) if lines else lambda *_: interrupts.check()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=1) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            interrupts.check()
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _plain_progress(console: Console) -> ReportProgress:
    seen: dict[str, float] = {}

    def report(stage: str, done: int, total: int) -> None:
        interrupts.check()
        start = seen.setdefault(stage, time.monotonic())
        if done >= total:
            console.print(f"{stage}: {total} in {time.monotonic() - start:.1f} s", markup=False)
            seen.pop(stage)

    return report


def table(title: str, columns: list[str], rows: list[list[str]], *, left: int = 1) -> Table:
    """A table whose first `left` columns are text, the others numbers; its rules are for terminals."""
    console = stdout()
    box = HEAVY_HEAD if console.is_terminal and not console.no_color else None
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=box)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


def show_refusals(
    console: Console, refusals: list[Refusal], title: str = "left alone", *, all: bool = False
) -> None:
    """What was not done, where and why: the first ones listed, the rest counted."""
    if not refusals:
        return
    console.print(f"[bold]{title}[/]: {len(refusals)}")
    shown = refusals if all else refusals[:SHOWN]
    for refusal in shown:
        console.print(f"  {refusal}", markup=False)
    if len(refusals) > len(shown):
        console.print(f"  … and {len(refusals) - len(shown)} more (all with -v or --json)")


def learned_from(inputs: Sequence[Mapping[str, Any]], verb: str = "learned") -> list[str]:
    """A line for each source of a pass's inputs (`optimize.calibration.Used`)."""
    from onnxcompress.data.preprocess import told

    return [
        f"{verb} from {used['count']} {used['source']} ({used['why']})"
        + (f", {told(used['preprocess'], used['preprocess_from'])}" if used["preprocess"] else "")
        for used in inputs
    ]


def show_verdicts(console: Console, verdicts: list[Verdict]) -> None:
    """A line for each gate."""
    for one in verdicts:
        word = "kept" if one.passed else "MISSED"
        console.print(f"gate --{one.gate.replace('_', '-')} {word}: {one.text}", markup=False)
