"""Output for people: tables and progress bars by rich, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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

from onnxcompress.account import InputSource, Refusal
from onnxcompress.cli import interrupts
from onnxcompress.evaluation.gate_results import Verdict
from onnxcompress.formatting import number as number
from onnxcompress.formatting import size as size
from onnxcompress.progress import Progress as ReportProgress

SHOWN = 12
"""Number of refusals that are listed; the rest is counted."""


class _Safe(Console):
    """A console to which text from files, such as names of nodes, cannot send control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        kept = (c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
        return super().render_str("".join(kept), **options)


def stdout() -> Console:
    """Create a console for standard output.

    Returns:
        The console.
    """
    return _console(stderr=False)


def stderr() -> Console:
    """Create a console for standard error.

    Returns:
        The console.
    """
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    """Create a console; without a terminal it does not wrap lines, because programs read them whole."""
    console = _Safe(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console = _Safe(stderr=stderr, highlight=False, soft_wrap=True, width=max(console.width, 120))
    return console


@contextmanager
def progress(*, lines: bool = True) -> Iterator[ReportProgress]:
    """Show progress on standard error: bars with the time left, or without a terminal a line per stage.

    Bars are drawn once a second, so that they do not disturb what is timed.

    Args:
        lines: Whether to print the lines where there is no terminal.

    Yields:
        The function to call with the stage, the steps done and the steps in all.
    """
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
            if not total:
                bars.console.print(stage, markup=False)
                return
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _plain_progress(console: Console) -> ReportProgress:
    starts: dict[str, float] = {}

    def report(stage: str, done: int, total: int) -> None:
        interrupts.check()
        if not total:
            console.print(stage, markup=False)
            return
        start = starts.setdefault(stage, time.monotonic())
        if done >= total:
            console.print(f"{stage}: {total} in {time.monotonic() - start:.1f} s", markup=False)
            starts.pop(stage)

    return report


def table(title: str, columns: list[str], rows: list[list[str]], *, left: int = 1) -> Table:
    """Create a table; it has rules on terminals only.

    Args:
        title: Title above the table.
        columns: Titles of the columns.
        rows: Cells by row.
        left: Number of leading columns with text; the others are numbers.

    Returns:
        The table.
    """
    console = stdout()
    box = HEAVY_HEAD if console.is_terminal and not console.no_color else None
    grid = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=box)
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(escape(cell) for cell in row))
    return grid


def show_refusals(
    console: Console, refusals: Sequence[Refusal], title: str = "left alone", *, all: bool = False
) -> None:
    """List what was left unchanged, where and why; from the 13th on, refusals are counted.

    Args:
        console: Where to print.
        refusals: The refusals.
        title: Title of the list.
        all: List all of them.
    """
    if not refusals:
        return
    console.print(f"[bold]{title}[/]: {len(refusals)}")
    shown = refusals if all else refusals[:SHOWN]
    for refusal in shown:
        console.print(f"  {refusal}", markup=False)
    if len(refusals) > len(shown):
        console.print(f"  … and {len(refusals) - len(shown)} more (all with -v or --json)")


def learned_from(inputs: Sequence[InputSource], verb: str = "learned") -> list[str]:
    """Describe the sources of a pass's inputs.

    Args:
        inputs: The sources.
        verb: What the pass did with them.

    Returns:
        A line for each source.
    """
    from onnxcompress.data.preprocessing_choice import preprocess_text

    return [
        f"{verb} from {source.count} {source.source} ({source.why})"
        + (f", {preprocess_text(source.preprocess, source.preprocess_from)}" if source.preprocess else "")
        for source in inputs
    ]


def show_verdicts(console: Console, verdicts: list[Verdict]) -> None:
    """Print a line for each gate.

    Args:
        console: Where to print.
        verdicts: Verdicts of the gates.
    """
    for verdict in verdicts:
        word = "kept" if verdict.passed else "MISSED"
        console.print(f"gate --{verdict.gate.replace('_', '-')} {word}: {verdict.text}", markup=False)
