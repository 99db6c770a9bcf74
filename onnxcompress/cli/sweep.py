"""`onnxcompress sweep`: run recipes on models, with all values of their variables, into one table.

--json prints one object:

    plan, table
    counts      {done, missed, failed, waiting}; `waiting` with --dry-run alone
    rows        [{model, recipe, the variables, status, error, missed, notes, output, sha256, bytes_before,
                bytes, noise, inputs, agreement, top1_before, top1, latency_before_ms, latency_ms, ratio,
                ratio_low, ratio_high, device, clock, seconds}]
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli.cache import cache_options, chosen_cache
from onnxcompress.cli.options import FILE, print_json
from onnxcompress.cli.worker_options import tracking_option, worker_options, workers
from onnxcompress.errors import CompressError, OptionError, TargetMissed, printable

if TYPE_CHECKING:
    from onnxcompress.search.plan import Plan
    from onnxcompress.search.trial import Row


def _sweep(
    plan: str,
    table: str,
    models: str | None,
    mlflow: str | None,
    cache: str | None,
    no_cache: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **where: Any,
) -> None:
    """Run recipes on models, with all values of their variables.

    \b
    A plan is a YAML file; its paths are relative to it:
      models: [a.onnx, b.onnx: {preprocess: imagenet}]
      recipes: [small.yaml, fast.yaml]
      variables: {blocks: [1, 2], bits: [8, 4]}   # a recipe takes those that it has
      gates: {images: test.npz, min_agreement: 90}
      latency_seconds: 10                         # for each result; 0: not measured

    TABLE ends in .csv, .jsonl or .parquet. What is done is not done again: a sweep that was killed, or
    whose plan was changed, goes on. Runs that fail are listed, and tried again the next time; the exit
    code is 1 where some failed, else 3 where some missed a limit.

    \b
    Example:
      onnxcompress sweep models/sweep.yaml results.csv
    """
    from onnxcompress.cli.console import progress
    from onnxcompress.progress import silent
    from onnxcompress.search.plan import read_plan
    from onnxcompress.search.results import FIGURES, Results, check_table, write_table
    from onnxcompress.search.sweep import preview, sweep
    from onnxcompress.search.tracking import Tracker

    tracker = None if mlflow is None else Tracker(mlflow)
    target = Path(table)
    check_table(target)
    read, folder = read_plan(plan), Path(models) if models is not None else target.with_suffix("")
    columns = ["model", "recipe", *read.variables, *FIGURES]
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--models {folder}: not a folder")
    rows = preview(read, Results(folder) if folder.is_dir() else None)
    if not dry_run:
        kept = chosen_cache(cache, no_cache)
        with workers(**where) as chosen, progress(lines=not as_json) as show:
            rows = sweep(
                read,
                Results(folder),
                chosen,
                cache=None if kept is None else str(kept.folder),
                report=lambda rows: write_table(target, columns, rows),
                progress=silent if quiet else show,
            )
    _tell(plan, table, read, rows, as_json=as_json, quiet=quiet)
    if not dry_run:
        if tracker is not None:
            tracker.log(rows)
        _end(rows)


def _tell(plan: str, table: str, read: Plan, rows: list[Row], *, as_json: bool, quiet: bool) -> None:
    counts = Counter(row["status"] for row in rows)
    if as_json:
        print_json({"plan": plan, "table": table, "counts": dict(counts), "rows": rows})
        return
    if quiet:
        return
    from onnxcompress.cli import console

    names = [*read.variables, "status", "size", "agreement", "top-1", "speedup"]
    cells = [
        [
            Path(row["model"]).name,
            Path(row["recipe"]).name,
            *(str(row.get(n, "")) for n in read.variables),
            *figures(row),
        ]
        for row in rows
    ]
    out = console.stdout()
    out.print(console.table("Runs", ["model", "recipe", *names], cells, left=3 + len(read.variables)))
    for row in rows:
        for kind in ("error", "missed"):
            if row.get(kind):
                out.print(
                    f"{kind}: {Path(row['model']).name}, {Path(row['recipe']).name}: {row[kind]}",
                    markup=False,
                )
    out.print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())), markup=False)


def figures(row: Row) -> list[str]:
    """Format the figures of a run for a table.

    Args:
        row: The run's row.

    Returns:
        Status, size, agreement, top-1 accuracy and speedup; empty where it was not measured.
    """
    from onnxcompress.formatting import percent, size

    def shown(name: str, form: Any) -> str:
        return form(row[name]) if row.get(name) is not None else ""

    speedup = shown("ratio", lambda ratio: f"{1 / ratio:.2f}×")
    measured = [shown("bytes", size), shown("agreement", percent), shown("top1", percent), speedup]
    return [row["status"], *measured]


def _end(rows: list[Row]) -> None:
    """Raise what sets the exit code."""
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        first = printable(failed[0]["error"])
        raise CompressError(f"{len(failed)} of {len(rows)} runs failed, the first: {first}")
    missed = [row for row in rows if row["status"] == "missed"]
    if missed:
        raise TargetMissed(f"{len(missed)} of {len(rows)} results missed a limit: {missed[0]['missed']}")


sweep = click.Command(
    "sweep",
    callback=_sweep,
    help=_sweep.__doc__,
    params=[
        click.Argument(["plan"], metavar="PLAN.yaml", type=FILE),
        click.Argument(["table"], metavar="TABLE", type=FILE),
        click.Option(
            ["--models"],
            metavar="DIR",
            type=FILE,
            help="Folder of the results.  [default: TABLE without its suffix]",
        ),
        *worker_options(),
        tracking_option(),
        *cache_options(),
        click.Option(["--dry-run"], is_flag=True, help="Check the plan, list its runs, and stop."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object, nothing else."),
        click.Option(["--quiet", "-q"], is_flag=True, help="Print nothing but errors and notes."),
    ],
)
