"""What a person sees: tables and progress by rich, plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from onnxcompress import passing
from onnxcompress.units import number as number
from onnxcompress.units import size as size
from onnxcompress.verdicts import Verdict

SHOWN = 12
"""Refusals that are listed one by one; the rest is counted."""


class _Safe(Console):
    """Text of files, such as names of nodes, cannot command the terminal."""

    def render_str(self, text: str, **how: Any) -> Text:
        kept = (c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
        return super().render_str("".join(kept), **how)


def stdout() -> Console:
    console = _Safe(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    return console


def stderr() -> Console:
    return _Safe(stderr=True, highlight=False)


@contextmanager
def progress() -> Iterator[passing.Progress]:
    """Progress bars with time left on standard error; a line a stage where it is no terminal."""
    console = stderr()
    if not console.is_terminal or console.no_color:
        yield _plain_progress(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


class _TimeLeft(ProgressColumn):
    """Of work that ends by the clock: `total` is its seconds."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        return Text(f"at most about {max(task.total - (task.elapsed or 0), 0):.0f} s left")


@contextmanager
def waiting(what: str, seconds: float | None = None) -> Iterator[None]:
    """Time gone and, of work that ends after `seconds`, time left, on a terminal; once a second, so that
    it stays out of what is timed."""
    console = stderr()
    if not console.is_terminal or console.no_color:
        yield
        return
    columns = (TextColumn("{task.description}"), TimeElapsedColumn(), _TimeLeft())
    with Progress(*columns, console=console, transient=True, refresh_per_second=1) as bars:
        bars.add_task(what, total=seconds)
        yield


def _plain_progress(console: Console) -> passing.Progress:
    seen: dict[str, float] = {}

    def report(stage: str, done: int, total: int) -> None:
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
    console: Console, refusals: list[passing.Refusal], title: str = "left alone", *, all: bool = False
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


def show_result(
    console: Console, one: passing.Pass, result: passing.PassResult, *, verbose: bool = False
) -> None:
    """The account of one pass; verbose: each change, and all that was left alone."""
    if one.name == "drop-blocks":
        from onnxcompress.cli.drop_blocks import show_drop_blocks

        show_drop_blocks(console, result)
    elif one.name == "calibrate":
        from onnxcompress.cli.calibrate import show_calibrate

        show_calibrate(console, result)
    elif one.name == "quantize":
        from onnxcompress.cli.quantize import show_quantize

        show_quantize(console, result)
    else:
        kinds: dict[str, int] = {}
        for change in result.changes:
            kinds[change.what] = kinds.get(change.what, 0) + 1
        for what, count in kinds.items():
            console.print(f"{count} × {what}", markup=False)
        if not result.changes:
            console.print("nothing to change")
    if verbose:
        for change in result.changes:
            console.print(f"  {change.node}: {change.what}", markup=False)
    show_refusals(console, result.refusals, all=verbose)
    _show_difference(console, result.measured.get("difference"))


def show_verdicts(console: Console, verdicts: list[Verdict]) -> None:
    """A line for each gate."""
    for one in verdicts:
        word = "kept" if one.passed else "MISSED"
        console.print(f"gate --{one.gate.replace('_', '-')} {word}: {one.text}", markup=False)


def _show_difference(console: Console, found: dict[str, Any] | None) -> None:
    if found is None:
        return
    if "skipped" in found:
        console.print(f"outputs not compared: {found['skipped']}", markup=False)
        return
    console.print(
        f"largest output difference on random input: {found['max_abs']:.2e} absolute, "
        f"{found['max_rel']:.2e} relative (output {found['output']!r})",
        markup=False,
    )
