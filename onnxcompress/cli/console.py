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

from onnxcompress import passing
from onnxcompress.cli import interrupts
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
def progress(*, lines: bool = True) -> Iterator[passing.Progress]:
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


def _plain_progress(console: Console) -> passing.Progress:
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
    elif one.name == "fp16":
        from onnxcompress.cli.fp16 import show_fp16

        show_fp16(console, result)
    else:
        kinds: dict[str, int] = {}
        for change in result.changes:
            kinds[change.what] = kinds.get(change.what, 0) + 1
        for what, count in kinds.items():
            console.print(f"{count} × {what}", markup=False)
        if not result.changes:
            console.print("nothing to change")
        for line in learned_from(result.measured.get("inputs", [])):
            console.print(line, markup=False)
    if verbose:
        for change in result.changes:
            console.print(f"  {change.node}: {change.what}", markup=False)
    show_refusals(console, result.refusals, all=verbose)
    _show_difference(console, result.measured.get("difference"))


def learned_from(inputs: Sequence[Mapping[str, Any]], verb: str = "learned") -> list[str]:
    """A line for each source of a pass's inputs (`inputs.source.Used`)."""
    from onnxcompress.inputs.preprocess import told

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
