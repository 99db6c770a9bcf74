"""`onnxcompress benchmark`: latency in onnxruntime, models interleaved run by run.

--json prints one object:

    models           [Timing without its samples], for each batch all models
    ratios_to_first  {name: {value, low, high}}, to the first model at the same batch
    precision        [{batch, within, asked, reached}]: half the widest interval of the ratios, relative

With several batches a name is `net.onnx, batch 8`.
"""

from __future__ import annotations

from dataclasses import asdict
from math import isnan
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli import options, report_option

if TYPE_CHECKING:
    from onnxcompress.runtime.latency import Ratio, Timing

Timings = dict[str, "Timing"]


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=options.FILE)
@options.runtime(batch=1, several=True)
@options.timing()
@options.seed()
@options.as_json()
@report_option.report()
def benchmark(models: tuple[str, ...], as_json: bool, report: str | None, **chosen: Any) -> None:
    """Measure latency in onnxruntime.

    All models run once a round, in random order, so that drift hits all alike. The ratio of each to the
    first comes with a 95 % interval. The table says which provider ran the nodes, and on a GPU its clocks.

    \b
    Example:
      onnxcompress benchmark net.onnx fast.onnx --batch 1 --threads 2
      onnxcompress benchmark net.onnx --batch 1,8,64 --provider cuda --provider-options tf32=off
    """
    from onnxcompress.cli.console import progress

    chosen = options.take_provider(chosen)
    batches, asked = chosen.pop("batch"), chosen["runs"] is None
    with progress(lines=not as_json) as show:
        found = [_timed(models, batch, progress=show, **chosen) for batch in batches]
    account = _account(batches, found, chosen["tolerance"] if asked else None)
    if as_json:
        options.print_json(account)
    else:
        _show(found, account)
    options.warn_placements([(t.name, t.placement) for t in found[0].values()])
    options.warn_clocks([next(iter(one.values())) for one in found])
    timings = [t for one in found for t in one.values()]
    names = [m["name"] for m in account["models"]]
    samples = {name: one.samples_ms for name, one in zip(names, timings, strict=True)}
    report_option.write_report(report, account, [("model", m) for m in models], samples=samples)


def _timed(models: tuple[str, ...], batch: int, *, tolerance: float, **chosen: Any) -> Timings:
    from onnxcompress.model.model_like import display_names
    from onnxcompress.runtime import latency

    named = dict(zip(display_names(models), models, strict=True))
    return latency.benchmark(named, batch=batch, tolerance=tolerance / 100, **chosen)


def _account(batches: tuple[int, ...], found: list[Timings], asked: float | None) -> dict[str, Any]:
    """Build the object that --json prints; `asked`: the tolerance in percent, or None."""
    from onnxcompress.runtime import latency

    several = len(batches) > 1
    models: list[dict[str, Any]] = []
    ratios: dict[str, dict[str, float]] = {}
    precision: list[dict[str, Any]] = []
    for batch, timings in zip(batches, found, strict=True):
        first = next(iter(timings.values()))
        for at, (name, one) in enumerate(timings.items()):
            shown = f"{name}, batch {batch}" if several else name
            models.append(one.as_dict() | {"name": shown})
            if at:
                ratios[shown] = asdict(latency.ratio(first, one))
        precision.append({"batch": batch} | options.precision_of(timings, asked))
    return {"models": models, "ratios_to_first": ratios, "precision": precision}


def _show(found: list[Timings], account: dict[str, Any]) -> None:
    from onnxcompress.cli.console import stdout, table
    from onnxcompress.runtime.latency import Ratio
    from onnxcompress.runtime.providers import described

    models, ratios = account["models"], account["ratios_to_first"]
    columns = ["model", "median", "mean", "min", "p90", "p99", "images/s"]
    rows = []
    for one in models:
        times = (one[key] for key in ("median_ms", "mean_ms", "min_ms", "p90_ms", "p99_ms"))
        row = [
            one["name"],
            *(f"{ms:.3f}" if ms >= 0.1 else f"{ms:#.3g}" for ms in times),
            f"{one['throughput']:.1f}",
        ]
        if ratios:
            row.append(ratio_text(Ratio(**ratios[one["name"]])) if one["name"] in ratios else "1")
        rows.append(row)
    if ratios:
        columns.append("ratio [95 %]")
    first = models[0]
    runs = " / ".join(str(next(iter(one.values())).runs) for one in found)
    batch = f", batch {first['batch']}" if len(found) == 1 else ""
    title = f"{described(first['provider'], first['settings'])}{batch}, {runs} runs each, ms"
    console = stdout()
    console.print(table(title, columns, rows))
    for one in account["precision"]:
        where = f"batch {one['batch']}: " if len(found) > 1 else ""
        console.print(where + options.precision_text(one, bool(ratios)), markup=False)
    for name, timing in found[0].items():
        ran = ", ".join(f"{p} {n}" for p, n in timing.placement.nodes.items()) or "none"
        console.print(f"nodes of {name}: {ran}", markup=False)


def ratio_text(ratio: Ratio) -> str:
    """Format a ratio with its interval.

    Args:
        ratio: The ratio.

    Returns:
        Such as `0.812 [0.805, 0.820]`, `0.812 [?]` of a single round.
    """
    if isnan(ratio.low):
        return f"{ratio.value:.3f} [?]"
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
