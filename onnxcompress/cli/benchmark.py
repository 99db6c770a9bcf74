"""`onnxcompress benchmark`: latency in onnxruntime, models interleaved run by run."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli import options, reporting

if TYPE_CHECKING:
    from onnxcompress.latency import Ratio, Timing


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=options.FILE)
@options.runtime(batch=1)
@options.timing()
@options.seed()
@options.as_json()
@reporting.report()
def benchmark(
    models: tuple[str, ...], tolerance: float, as_json: bool, report: str | None, **chosen: Any
) -> None:
    """Measure latency in onnxruntime.

    All models run once a round, in random order, so that drift hits all alike. The ratio of each to the
    first comes with a 95 % interval. The table says which provider ran the nodes.

    \b
    Example: onnxcompress benchmark net.onnx fast.onnx --batch 1 --threads 2
    """
    from onnxcompress import latency
    from onnxcompress.cli.console import progress
    from onnxcompress.sources import display_names

    names = display_names(models)
    with progress(lines=not as_json) as show:
        chosen |= {"tolerance": tolerance / 100, "progress": show}
        timings = latency.benchmark(dict(zip(names, models, strict=True)), **chosen)
    first = timings[names[0]]
    ratios = {name: latency.ratio(first, timings[name]) for name in names[1:]}
    options.warn_placements([(t.name, t.placement) for t in timings.values()])
    account = {
        "models": [t.as_dict() for t in timings.values()],
        "ratios_to_first": {name: asdict(one) for name, one in ratios.items()},
    }
    options.print_json(account) if as_json else _show(timings, ratios)
    samples = {name: one.samples_ms for name, one in timings.items()}
    reporting.write_report(report, account, [("model", m) for m in models], samples=samples)


def _show(timings: dict[str, Timing], ratios: dict[str, Ratio]) -> None:
    from onnxcompress.cli.console import stdout, table

    first = next(iter(timings.values()))
    columns = ["model", "median", "mean", "min", "p90", "p99", "images/s"]
    rows = []
    for name, one in timings.items():
        times = (one.median_ms, one.mean_ms, one.min_ms, one.p90_ms, one.p99_ms)
        row = [name, *(f"{ms:.3f}" for ms in times), f"{one.throughput:.1f}"]
        if ratios:
            row.append(ratio_text(ratios[name]) if name in ratios else "1")
        rows.append(row)
    if ratios:
        columns.append("ratio [95 %]")
    title = f"{first.provider}, batch {first.batch}, {first.runs} runs each, ms"
    console = stdout()
    console.print(table(title, columns, rows))
    for name, one in timings.items():
        ran = ", ".join(f"{p} {n}" for p, n in one.placement.nodes.items()) or "none"
        console.print(f"nodes of {name}: {ran}", markup=False)


def ratio_text(ratio: Ratio) -> str:
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
