"""The outcome of a search as a page: the front as a chart and a table, and what was looked at."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from onnxcompress.evaluation.gates import Gates
from onnxcompress.formatting import counted, decimal, milliseconds, percent, size
from onnxcompress.report.charts import Point, Scatter
from onnxcompress.report.elements import Code, Fold, Plot, Prose, Section, Story, Table, Tile
from onnxcompress.search.front import loss_name
from onnxcompress.search.search import Found, Front
from onnxcompress.search.trial import Row, verdicts

COLUMNS = ("point", "latency", "speedup", "95 % interval", "loss", "size", "misses")


def front_page(front: Front, model: str, gates: Gates) -> Story:
    """Build the content of a search's page.

    Args:
        front: The outcome.
        model: Path of the model.
        gates: The limits.

    Returns:
        The title, the outcome and the sections, ready to render.
    """
    rows = [found.row for found in front.found]
    table = Table(
        "The front, the fastest first",
        COLUMNS,
        [front_cells(found, gates) for found in front.found],
        marked=frozenset() if front.picked is None else frozenset([front.picked]),
    )
    sections = [
        Section("front", "Pareto front", [_chart(front), table, *_notes(front)]),
        Section("repeat", "Make one of them again", [Code("\n".join(_commands(front, model)))]),
        Section("proxies", "What was looked at", [_proxies(front)]),
    ]
    return Story(
        title=f"{Path(model).name}: {counted(len(front.found), 'best model')}",
        subtitle="onnxcompress search",
        missed=[] if front.picked is not None or not gates.limits else [none_keeps(gates)],
        lead=_lead(front, rows),
        tiles=_tiles(rows[front.picked]) if front.picked is not None else [],
        sections=sections,
    )


def none_keeps(gates: Gates) -> str:
    """Say that no result keeps the limits.

    Args:
        gates: The limits.

    Returns:
        A sentence without its full stop.
    """
    limits = " ".join(f"--{name.replace('_', '-')} {limit:g}" for name, limit in gates.limits.items())
    return f"no result keeps all limits: {limits}"


def front_cells(found: Found, gates: Gates) -> list[str]:
    """Format a point of the front as a row of `COLUMNS`.

    Args:
        found: The point.
        gates: The limits.

    Returns:
        The cells.
    """
    row = found.row
    missed = [verdict.gate for verdict in verdicts(row, gates) if not verdict.passed]
    misses = ", ".join(missed) or "nothing"
    return [
        found.trial.name,
        milliseconds(row["latency_ms"]),
        f"{1 / row['ratio']:.2f}×",
        f"{1 / row['ratio_high']:.2f} to {1 / row['ratio_low']:.2f}",
        decimal(row["loss"]),
        size(row["bytes"]),
        misses if gates.limits else "",
    ]


def _chart(front: Front) -> Plot:
    points = [
        Point(
            name=found.trial.name,
            x=found.row["latency_ms"],
            low=found.row["latency_ms"] * found.row["ratio_low"] / found.row["ratio"],
            high=found.row["latency_ms"] * found.row["ratio_high"] / found.row["ratio"],
            y=found.row["loss"],
            picked=at == front.picked,
        )
        for at, found in enumerate(front.found)
    ]
    loss = loss_name(front.found[0].row)
    chart = Scatter(
        points, "median latency, ms", f"loss: {loss}", "keeps the limits, chosen", "on the front"
    )
    first, *others = map(_in_words, front.found)
    finding = f"From {first} to {others[-1]}." if others else f"{first}."
    return Plot("Latency against loss", finding, chart)


def _in_words(found: Found) -> str:
    speed, loss = f"{1 / found.row['ratio']:.2f}", decimal(found.row["loss"])
    return f"{found.trial.name} ({speed} times as fast, loss {loss})"


def _notes(front: Front) -> list[Prose]:
    row = front.found[0].row
    texts = [f"Loss is {loss_name(row)}; all were timed together, on {row['device']}."]
    others = ", ".join(found.trial.name for found in front.dominated)
    texts += [f"Repaired, and beaten: {others}."] if others else []
    return [Prose(text, "quiet") for text in texts]


def _commands(front: Front, model: str) -> Sequence[str]:
    for_all = []
    for found in front.found:
        recipe = Path(found.row["output"]).with_suffix(".yaml")
        words = ("onnxcompress", "run", str(recipe), model, f"{found.trial.name}.onnx")
        for_all.append(shlex.join(words))
    return for_all


def _proxies(front: Front) -> Fold:
    rows = [
        [
            one.candidate.name,
            f"{1 / one.row['ratio']:.2f}×",
            decimal(one.row["loss"]),
            percent(one.row["size"], 0),
        ]
        for one in sorted(front.proxies, key=lambda one: one.row["ratio"])
    ]
    table = Table("Before repair", ["candidate", "speedup", "loss", "size"], rows)
    failed = [Prose(f"Not made: {text}.", "quiet") for text in dict.fromkeys(front.failures)]
    count = counted(len(rows), "candidate")
    return Fold(f"{count}, by closed forms on few inputs", [table, *failed])


def _lead(front: Front, rows: Sequence[Row]) -> list[str]:
    if front.picked is None:
        count = counted(len(rows), "model")
        return [f"{count} that no other one beats in latency, loss and size at once."]
    name, row = front.found[front.picked].trial.name, rows[front.picked]
    return [f"{name} keeps all limits: {1 / row['ratio']:.2f} times as fast, loss {decimal(row['loss'])}."]


def _tiles(row: Row) -> list[Tile]:
    interval = f"{1 / row['ratio_high']:.2f} to {1 / row['ratio_low']:.2f}, 95 % interval"
    tiles = [Tile("speed", f"{1 / row['ratio']:.2f}×", interval)]
    if row.get("top1") is not None:
        tiles.append(
            Tile("top-1 accuracy", percent(row["top1"], 1), f"was {percent(row['top1_before'], 1)}")
        )
    return [*tiles, Tile("file", size(row["bytes"]), f"was {size(row['bytes_before'])}")]
