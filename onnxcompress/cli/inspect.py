"""`onnxcompress inspect`: what a model is, and which of its blocks can be dropped."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli.options import as_json, print_json
from onnxcompress.errors import ModelError

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcompress.blocks import Discovery
    from onnxcompress.model import Model


@click.command()
@click.argument("model")
@click.option("--statistics", is_flag=True, help="List the recorded channel statistics, too.")
@as_json()
def inspect(model: str, statistics: bool, as_json: bool) -> None:
    """Show a model: inputs, size, operators, and each block that can be dropped.

    \b
    Example:
      onnxcompress inspect net.onnx
    """
    from onnxcompress.blocks import find_blocks
    from onnxcompress.model import load

    loaded = load(model)
    found = find_blocks(loaded)
    facts = _facts(loaded, Path(model))
    if as_json:
        print_json(facts | {"statistics": _statistics(loaded)} | dataclasses.asdict(found))
        return
    from onnxcompress.cli.console import stdout

    console = stdout()
    _show_facts(console, facts)
    _show_blocks(console, found, facts)
    if statistics:
        _show_statistics(console, loaded)


def _facts(model: Model, path: Path) -> dict[str, Any]:
    from onnxcompress.macs import count_macs, count_parameters
    from onnxcompress.sources import model_bytes
    from onnxcompress.statistics import read_record
    from onnxcompress.topology import Topology

    shapes = model.shapes()
    feature = Topology(model).feature()
    try:
        macs: int | None = count_macs(model)
    except ModelError:  # an open image size, or an operator of another domain
        macs = None
    return {
        "model": str(path),
        "bytes": model_bytes(path),
        "producer": model.producer,
        "ir_version": model.ir_version,
        "opset": model.opset,
        "inputs": {t.name: list(shapes.get(t.name, ())) for t in model.graph.inputs},
        "outputs": {t.name: list(shapes.get(t.name, ())) for t in model.graph.outputs},
        "parameters": count_parameters(model),
        "macs": macs,
        "operators": dict(Counter(n.op for n in model.graph.nodes).most_common()),
        "batch_norms": sum(n.op == "BatchNormalization" for n in model.graph.nodes),
        "recorded_tensors": len(read_record(model)),
        "feature": None if feature is None else feature.name,
        "provenance": model.provenance(),
    }


def _show_facts(console: Console, facts: dict[str, Any]) -> None:
    from rich.table import Table

    from onnxcompress.cli.console import number, size

    def shapes(tensors: dict[str, list[Any]]) -> str:
        return ", ".join(
            f"{n} {'×'.join('?' if d is None else str(d) for d in s)}" for n, s in tensors.items()
        )

    operators = ", ".join(f"{op} {count}" for op, count in facts["operators"].items())
    rows = {
        "size": f"{size(facts['bytes'])}, {number(facts['parameters'])} parameters",
        "work": _work(facts["macs"]),
        "inputs": shapes(facts["inputs"]),
        "outputs": shapes(facts["outputs"]),
        "format": f"opset {facts['opset']}, IR {facts['ir_version']}, by {facts['producer'] or 'unknown'}",
        "operators": operators,
        "BatchNorm": _norms(facts),
        "features": facts["feature"] or "no spatial tensor that all goes through: name one with --feature",
        "made by": " → ".join(e["pass"] for e in facts["provenance"]) or "no pass of onnxcompress",
    }  # fmt: skip
    grid = Table(
        title=facts["model"], title_justify="left", title_style="bold", show_header=False, box=None
    )
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in rows.items():
        grid.add_row(key, value)
    console.print(grid)
    console.print()


def _work(macs: int | None) -> str:
    from onnxcompress.cli.console import number

    if macs is None:
        return "unknown: not all shapes are known (is the image size open?)"
    return f"{number(macs)} MACs an image"


def _norms(facts: dict[str, Any]) -> str:
    norms, recorded = facts["batch_norms"], facts["recorded_tensors"]
    if recorded:
        return f"{norms} nodes; statistics of {recorded} tensors are recorded in the file"
    if norms:
        return f"{norms} nodes, no statistics recorded yet (fold-bn records them)"
    return "none, and no statistics recorded: data-free passes will have to estimate them"


def _show_blocks(console: Console, found: Discovery, facts: dict[str, Any]) -> None:
    from onnxcompress.cli.console import number, show_refusals, table

    total_macs, total = facts["macs"] or 0, facts["parameters"] or 1
    rows = [
        [
            block.name,
            block.kind,
            "×".join(str(d) for d in block.shape[1:]),
            number(block.parameters),
            f"{100 * block.parameters / total:.1f} %",
            number(block.macs),
            f"{100 * block.macs / total_macs:.1f} %" if total_macs else "?",
        ]
        for block in found.blocks
    ]
    columns = ["block", "kind", "shape", "parameters", "of all", "MACs", "of all"]
    if rows:
        console.print(table(f"{len(rows)} blocks that can be dropped", columns, rows, left=2))
    else:
        console.print("no block can be dropped")
    show_refusals(console, list(found.near_misses), title="nearly a block, but not droppable")


def _statistics(model: Model) -> dict[str, Any]:
    from onnxcompress.statistics import read_record

    return {
        name: {"source": s.source, "mean": s.mean.tolist(), "std": s.std.tolist()}
        for name, s in read_record(model).items()
    }


def _show_statistics(console: Console, model: Model) -> None:
    from onnxcompress.cli.console import table
    from onnxcompress.statistics import read_record

    rows = [
        [name, s.source, str(len(s.mean)), f"{s.mean.min():.3g} … {s.mean.max():.3g}",
         f"{s.std.min():.3g} … {s.std.max():.3g}"]
        for name, s in read_record(model).items()
    ]  # fmt: skip
    if not rows:
        console.print("no statistics are recorded")
        return
    console.print(
        table("Recorded statistics", ["tensor", "source", "channels", "mean", "std"], rows, left=2)
    )
