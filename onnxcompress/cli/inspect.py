"""`onnxcompress inspect`: show a model, which of its blocks can be dropped, and which channels be cut."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli import options, report_option
from onnxcompress.cli.options import FILE, as_json, print_json
from onnxcompress.cli.sections import SectionedCommand
from onnxcompress.cli.timing_options import timing_of, timing_options
from onnxcompress.errors import ModelError
from onnxcompress.formatting import counted

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcompress.evaluation.inspection import Inspection
    from onnxcompress.graph.blocks import Discovery
    from onnxcompress.graph.channel_groups.cut_tracer import CutGroups
    from onnxcompress.model import Model
    from onnxcompress.runtime.timing_options import TimingOptions

NO_BLOCK = "no layers lie between two tensors of one shape through which all data goes"
NO_LAYER = "no Conv, ConvTranspose, Gemm or MatMul outside of bodies reads data with a constant weight"
"""Why there is none, where not even a near miss is."""


@click.command(cls=SectionedCommand)
@click.argument("model", type=FILE)
@click.option("--statistics", is_flag=True, help="Also list the statistics of each tensor.")
@options.input_shape()
@options.added(timing_options())
@as_json()
@report_option.report()
def inspect(
    model: str, input_shape: str | None, statistics: bool, as_json: bool, report: str | None, **chosen: Any
) -> None:
    """Show a model: inputs, size, operators, each block that can be dropped, and channels that can be cut.

    With --report the network is drawn as the chain of its blocks, each as wide as its share of the latency.

    \b
    Example:
      onnxcompress inspect net.onnx
      onnxcompress inspect net.onnx --report net.html --provider cuda
    """
    from onnxcompress.evaluation.inspection import inspect_model
    from onnxcompress.model import load
    from onnxcompress.model.model_like import model_bytes
    from onnxcompress.optimize.calibration import InputRequest, assume_sizes

    loaded = load(model)
    if input_shape is not None or _is_handled(loaded):
        assume_sizes(loaded, InputRequest(input_shape=input_shape))
    found = inspect_model(loaded, model, model_bytes(model))
    facts = found.as_dict() | _chain(loaded, found, timing_of(chosen), measured=report is not None)
    report_option.write_report(report, facts, [("input", model)])
    if as_json:
        print_json(facts | {"statistics": _statistics(loaded)})
        return
    from onnxcompress.cli.console import stdout

    console = stdout()
    _show_facts(console, facts)
    _show_blocks(console, found, facts)
    _show_channels(console, found.channel_groups, facts)
    if statistics:
        _show_statistics(console, loaded, facts)
    console.print(f"try next: {_next(model, loaded, found)}", markup=False)


def _chain(model: Model, found: Inspection, timing: TimingOptions, *, measured: bool) -> dict[str, Any]:
    """Share out the latency over the blocks, or the work where latency is not to be measured."""
    from onnxcompress.evaluation.inspection import chain_shares
    from onnxcompress.runtime.stopwatch import Stopwatch

    clock = None
    if measured and timing.latency:
        timing.check()
        clock = Stopwatch(timing.runs_on, timing.latency_batch, timing.threads)
    if clock is not None and found.blocks:
        click.echo("for the report: measuring the latency of its blocks", err=True)
    return chain_shares(model, found, clock).as_dict(found.chain)


def _is_handled(model: Model) -> bool:
    """Return whether all inputs have types that can be fed; less is shown of other models."""
    from onnxcompress.model.model_like import input_specs

    try:
        return bool(input_specs(model))
    except ModelError:
        return False


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
        "features": (facts["feature"] and f"{facts['feature']}: fine-tuning keeps them as they were")
        or "no spatial tensor that all data passes through: name one with drop-blocks --feature",
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
    return f"{number(macs)} MACs per image"


def _norms(facts: dict[str, Any]) -> str:
    norms, recorded = facts["batch_norms"], facts["recorded_tensors"]
    if recorded:
        return f"{counted(norms, 'node')}; statistics of {counted(recorded, 'tensor')} in the file's record"
    if norms:
        return f"{counted(norms, 'node')}, no statistics recorded yet (fold-bn records them)"
    return "none, and no statistics recorded: `onnxcompress calibrate` estimates them"


def _show_blocks(console: Console, found: Discovery | Inspection, facts: dict[str, Any]) -> None:
    from onnxcompress.cli.console import show_refusals, table

    rows = [
        [
            block.name,
            block.kind,
            "×".join(str(d) for d in block.shape[1:]),
            *_amounts(block.parameters, block.macs, facts),
        ]
        for block in found.blocks
    ]
    columns = ["block", "kind", "shape", "parameters", "of all", "MACs", "of all"]
    if rows:
        console.print(table(f"{counted(len(rows), 'block')} that can be dropped", columns, rows, left=2))
    elif found.near_misses:
        console.print("no block can be dropped")
    else:
        console.print(f"no block can be dropped: {NO_BLOCK}")
    show_refusals(console, list(found.near_misses), title="nearly a block, but not droppable")


def _show_channels(console: Console, channels: CutGroups, facts: dict[str, Any]) -> None:
    from onnxcompress.cli.console import show_refusals, table

    rows = [
        [group.name, str(group.width), *_amounts(group.parameters, group.macs, facts)]
        for group in channels.free
    ]
    columns = ["group", "channels", "parameters", "of all", "MACs", "of all"]
    if rows:
        console.print(table(f"{counted(len(rows), 'group')} of channels that can be cut", columns, rows))
    elif channels.refusals:
        console.print("no channels can be cut")
    else:
        console.print(f"no channels can be cut: {NO_LAYER}")
    show_refusals(console, list(channels.refusals), title="groups of channels that stay")


def _next(path: str, model: Model, found: Inspection) -> str:
    """Write the command that makes most of what was found."""
    from onnxcompress.graph.topology import Topology

    if {"QuantizeLinear", "DequantizeLinear"} & {*found.operators}:
        return "the float model that this one was quantized from: it can be changed and quantized again"
    name = "NET.onnx" if path == "-" else shlex.quote(path)
    known = set() if found.feature is None else model.analysis(Topology).made_of(found.feature)
    if any(block.exit in known for block in found.blocks):
        command = "onnxcompress drop-blocks {} OUT.onnx --images FOLDER --latency-reduction 20"
    elif found.channel_groups.free:
        command = "onnxcompress drop-channels {} OUT.onnx --images FOLDER --latency-reduction 20"
    else:
        command = "onnxcompress quantize {} OUT.onnx --images FOLDER"
    return f"{command.format(name)}   (also without images)"


def _amounts(parameters: int, macs: int, facts: dict[str, Any]) -> list[str]:
    """Write parameters and MACs, each with its share of the network's."""
    from onnxcompress.cli.console import number

    total_macs, total = facts["macs"] or 0, facts["parameters"] or 1
    of_macs = f"{100 * macs / total_macs:.1f} %" if total_macs else "?"
    return [number(parameters), f"{100 * parameters / total:.1f} %", number(macs), of_macs]


def _statistics(model: Model) -> dict[str, Any]:
    """Collect the statistics of tensors in order; `where`: the `graph`'s BatchNorm or the `record`."""
    from onnxcompress.statistics.record import graph_statistics, known_statistics

    graph, known = graph_statistics(model), known_statistics(model)
    tensors = [*model.graph.inputs, *(t for node in model.graph.nodes for t in node.outputs)]
    order = [t.name for t in tensors if t.name in known]
    return {
        name: {
            "source": known[name].source,
            "where": "graph" if name in graph and not known[name].estimated else "record",
            "mean": known[name].mean.tolist(),
            "std": known[name].std.tolist(),
            "dead": known[name].dead,
        }
        for name in order
    }


def _show_statistics(console: Console, model: Model, facts: dict[str, Any]) -> None:
    from onnxcompress.cli.console import table

    rows = [
        [name, "in graph" if s["where"] == "graph" else s["source"], str(len(s["mean"])),
         _range(s["mean"]), _range(s["std"]), str(len(s["dead"]) or "")]
        for name, s in _statistics(model).items()
    ]  # fmt: skip
    columns = ["tensor", "known from", "channels", "mean", "std", "dead"]
    if rows:
        title = f"Statistics of {counted(len(rows), 'tensor')}"
        title += " (in graph: a BatchNorm is there; else as recorded)"
        console.print(table(title, columns, rows, left=2))
    for line in _advice(len(rows), facts):
        console.print(line, markup=False)


def _range(values: list[float]) -> str:
    return f"{min(values):.3g} … {max(values):.3g}" if values else "none"


def _advice(known: int, facts: dict[str, Any]) -> list[str]:
    """Advise how to get statistics that are missing."""
    gone, norms = facts["recorded_tensors_gone"], facts["batch_norms"]
    lines = []
    if gone:
        lines.append(f"{gone} recorded tensors are no longer in the graph; their entries are not used")
    if not known and norms:
        lines.append(f"none of {norms} BatchNorms can be read: `onnxcompress fold-bn` shows why")
    if not known:
        lines += [
            "no statistics are known; there are two ways to get them:",
            "  onnxcompress.export(torch_model, example, path) in Python exports with BatchNorm kept",
            "  onnxcompress calibrate IN OUT estimates them, from --images or from images that it makes",
        ]
    elif norms and not facts["recorded_tensors"]:
        lines.append("BatchNorm knows them; `onnxcompress fold-bn` folds it and keeps them in the file")
    return lines
