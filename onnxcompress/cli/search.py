"""`onnxcompress search`: find the best models under limits.

--json prints one object:

    model, out, limits
    picked      name of the point that keeps all limits and is to be taken, or null
    loss        what the loss is
    front       [{candidate, output, recipe, picked, limits_kept, loss, size, and the figures of `sweep`}]
    dominated   the same of repaired results that others beat
    proxies     [{candidate, ratio, loss, size}] of what was looked at
    failures    messages of candidates that could not be made

and with --dry-run {dry_run, model, blocks, first, limits}.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli.cache import cache_options, chosen_cache
from onnxcompress.cli.gate_options import gate_options, gates_of
from onnxcompress.cli.options import FILE, PREPROCESS_HELP, print_json
from onnxcompress.cli.sections import SectionedCommand
from onnxcompress.cli.timing_options import timing_options
from onnxcompress.cli.worker_options import WHERE, tracking_option, worker_options, workers
from onnxcompress.errors import TargetMissed, require
from onnxcompress.formatting import counted
from onnxcompress.option_fields import INPUT_SHAPE_HELP, INPUT_SHAPE_METAVAR, parse_duration

if TYPE_CHECKING:
    from onnxcompress.search.question import Search
    from onnxcompress.search.search import Front

_LEARNING = ("images", "preprocess", "count", "inputs", "input_shape")


def _search(model: str, out: str, cache: str | None, no_cache: bool, **options: Any) -> None:
    """Find the best models under limits: blocks, channels, bits, zeros, half precision, and their order.

    \b
    Many candidates are made by closed forms on few inputs; those on the front of latency, loss and size are
    repaired in full, and timed together. OUT gets:
      front/NAME.onnx, .yaml, .md   each model of the front, the recipe that remakes it, its model card
      front.csv, search.html        all figures, and a page with the front
      work/                         what a search that was killed goes on with
    Of the models that keep all limits one is marked: the fastest, or that of the least loss where speed or
    size is limited. Exit code 3: none keeps them. It needs Optuna: pip install "onnxcompress[search]".

    \b
    Example:
      onnxcompress search models/resnet20-fashion.onnx --out best --images models/fashion-tiny.npz \\
          --gate-images models/fashion-test2k.npz --min-speedup 1.5 --max-drop 1 --time 30m
    """
    from onnxcompress.cli.console import progress
    from onnxcompress.progress import silent
    from onnxcompress.runtime.session import check_provider
    from onnxcompress.search.outcome import front_rows, write_outcome
    from onnxcompress.search.search import search
    from onnxcompress.search.tracking import Tracker

    experiment = options.pop("mlflow")
    dry_run, as_json, quiet = (options.pop(name) for name in ("dry_run", "as_json", "quiet"))
    where = {name: options.pop(name) for name in WHERE}
    asked = _asked(model, out, options)
    require("search", "optuna")
    if where["ray"] is None:  # a cluster may have what this machine lacks
        check_provider(asked.gates.runs_on)
    tracker = None if experiment is None else Tracker(experiment)
    if dry_run:
        _preview(asked, as_json=as_json)
        return
    kept = chosen_cache(cache, no_cache)
    with workers(**where) as chosen, progress(lines=not as_json) as show:
        front = search(
            asked,
            chosen,
            cache=None if kept is None else str(kept.folder),
            progress=silent if quiet else show,
        )
    rows = front_rows(front, asked.gates)
    write_outcome(front, rows, asked)
    if as_json:
        print_json(_account(front, rows, asked))
    elif not quiet:
        _show(front, asked)
    if tracker is not None:
        tracker.log(rows)
    if front.picked is None and asked.gates.limits:
        from onnxcompress.search.page import none_keeps

        raise TargetMissed(none_keeps(asked.gates))


def _asked(model: str, out: str, options: dict[str, Any]) -> Search:
    from onnxcompress.evaluation.gates import Gates
    from onnxcompress.search.question import Search

    gates = gates_of(options, Gates(preprocess=options["preprocess"]))
    inputs = {name: options[name] for name in _LEARNING if options[name] is not None}
    names = ("trials", "repairs", "effort", "seed", "latency_seconds")
    return Search(
        model,
        Path(out),
        gates,
        inputs,
        seconds=options["time"],
        **{name: options[name] for name in names},
    )


def _preview(asked: Search, *, as_json: bool) -> None:
    from onnxcompress.model import load
    from onnxcompress.search.question import check_folder
    from onnxcompress.search.space import extent_for, first_points

    asked.check()
    check_folder(asked)
    extent = extent_for(load(asked.model), asked.gates, asked.inputs)
    first, blocks = first_points(extent), extent.blocks
    account = {"dry_run": True, "model": asked.model, "blocks": blocks, "first": first}
    if as_json:
        print_json(account | {"limits": asked.gates.limits})
        return
    click.echo(
        f"{asked.model}: {counted(blocks, 'block')} to drop; up to {asked.trials} candidates, the first:"
    )
    for point in first[: asked.trials]:
        click.echo("  " + ", ".join(f"{name} {value}" for name, value in point.items()))
    for name, limit in asked.gates.limits.items():
        click.echo(f"limit --{name.replace('_', '-')} {limit:g}")


def _account(front: Front, rows: list[dict[str, Any]], asked: Search) -> dict[str, Any]:
    from onnxcompress.search.front import loss_name

    proxies = [
        {"candidate": one.candidate.name, **{name: one.row[name] for name in ("ratio", "loss", "size")}}
        for one in front.proxies
    ]
    return {
        "model": asked.model,
        "out": str(asked.folder),
        "limits": asked.gates.limits,
        "picked": None if front.picked is None else front.found[front.picked].trial.name,
        "loss": loss_name(front.found[0].row),
        "front": rows,
        "dominated": [{**found.trial.labels, **found.row} for found in front.dominated],
        "proxies": proxies,
        "failures": list(front.failures),
    }


def _show(front: Front, asked: Search) -> None:
    from onnxcompress.cli import console
    from onnxcompress.search.front import loss_name
    from onnxcompress.search.page import COLUMNS, front_cells

    out = console.stdout()
    cells = [front_cells(found, asked.gates) for found in front.found]
    out.print(console.table("Pareto front", list(COLUMNS), cells))
    row = front.found[0].row
    out.print(f"loss: {loss_name(row)}; timed on {row['device']}", markup=False)
    if front.picked is not None:
        output = front.found[front.picked].row["output"]
        out.print(f"take {output}: it keeps all limits", markup=False)
    out.print(f"{asked.folder / 'search.html'} has the page, front.csv all figures", markup=False)


def _duration(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    return None if value is None else parse_duration("time", value)


search = SectionedCommand(
    "search",
    callback=_search,
    help=_search.__doc__,
    params=[
        click.Argument(["model"], metavar="MODEL", type=FILE),
        click.Option(["--out"], metavar="DIR", type=FILE, required=True, help="Folder of the outcome."),
        click.Option(
            ["--images"], type=FILE, metavar="DIR|NPZ", help="Images to learn from; labels are not used."
        ),
        click.Option(["--preprocess"], metavar="TEXT", help=PREPROCESS_HELP),
        click.Option(
            ["--count"], type=click.IntRange(1), help="Use this many of --images, drawn at random."
        ),
        click.Option(
            ["--inputs"],
            type=click.Choice(("auto", "images", "distilled", "procedural", "layerwise")),
            help="What passes learn from, as for `quantize`.",
        ),
        click.Option(["--input-shape"], metavar=INPUT_SHAPE_METAVAR, help=INPUT_SHAPE_HELP),
        click.Option(
            ["--trials"],
            type=click.IntRange(1),
            default=40,
            show_default=True,
            help="Candidates to look at.",
        ),
        click.Option(
            ["--repairs"],
            type=click.IntRange(1),
            default=6,
            show_default=True,
            help="Candidates of the front that are repaired in full.",
        ),
        click.Option(
            ["--time"],
            metavar="DURATION",
            callback=_duration,
            help="End after this, such as 30m; with it another run may find another front.",
        ),
        click.Option(
            ["--effort"],
            type=click.Choice(("auto", "fast", "balanced", "best")),
            default="auto",
            show_default=True,
            help="Effort of the full repair.",
        ),
        click.Option(
            ["--latency-seconds"],
            type=click.FloatRange(0, min_open=True),
            default=2.0,
            show_default=True,
            help="Time for the latency of a candidate's structure; five times that for each of the front.",
        ),
        *timing_options(without=("latency",)),
        *worker_options(),
        tracking_option(),
        click.Option(["--seed"], type=click.IntRange(0), default=0, show_default=True, help="Random seed."),
        *cache_options(),
        click.Option(["--dry-run"], is_flag=True, help="Check everything, show where it begins, and stop."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object, nothing else."),
        click.Option(["--quiet", "-q"], is_flag=True, help="Print nothing but errors and notes."),
        *gate_options(judged=("images",)),
    ],
)
