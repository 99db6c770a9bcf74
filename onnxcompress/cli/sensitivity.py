"""`onnxcompress sensitivity`: measure each layer's cost in output error, as a table, JSON and a plot."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli import options, report_option
from onnxcompress.cli.cache import cache_options, chosen_cache
from onnxcompress.errors import ModelError, OptionError, RuntimeUnavailable
from onnxcompress.formatting import counted
from onnxcompress.graph.query import read_inputs
from onnxcompress.optimize.calibration import SOURCES, InputRequest

if TYPE_CHECKING:
    from onnxcompress.sensitivity.analysis import Sensitivity
    from onnxcompress.sensitivity.float_layers import FloatLayers
    from onnxcompress.sensitivity.rows import Row

IMAGES = 96
"""The default of `onnxcompress.sensitivity.analysis`, repeated so that the help need not import it."""
PLOTS = (".png", ".svg", ".pdf")


def _numbers(kind: type[int] | type[float]) -> Any:
    def read(context: click.Context, parameter: click.Parameter, text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",") if part.strip()]
        except ValueError as error:
            word = "whole numbers" if kind is int else "numbers"
            raise OptionError(
                f"{parameter.opts[0]} {text!r}: expected {word} with commas between"
            ) from error

    return read


@click.command()
@click.argument("source", metavar="MODEL", type=options.FILE)
@click.option(
    "--weight-bits",
    default="8,4",
    show_default=True,
    metavar="BITS,…",
    callback=_numbers(int),
    help="Bits of weights to try, each 2 to 8; '' for none.",
)
@click.option(
    "--activation-bits",
    default="8",
    show_default=True,
    metavar="BITS,…",
    callback=_numbers(int),
    help="Bits of layer inputs to try, each 2 to 8; '' for none.",
)
@click.option(
    "--sparsity",
    default="",
    metavar="SHARE,…",
    callback=_numbers(float),
    help="Shares of weights to set to zero, smallest magnitudes first; each between 0 and 1.",
)
@options.images(required=False)
@click.option(
    "--inputs",
    type=click.Choice(SOURCES),
    default="auto",
    show_default=True,
    help="Inputs to measure on; auto: --images if given, else layerwise if the file has BatchNorm or its "
    "recorded statistics, else procedural.",
)
@click.option(
    "--synthetic",
    type=click.IntRange(1),
    default=IMAGES,
    show_default=True,
    help="Number of images to make.",
)
@options.input_shape()
@click.option(
    "--per-channel/--no-per-channel",
    default=True,
    show_default=True,
    help="Use a scale for each output channel of a weight, or one per tensor.",
)
@click.option(
    "--reconstruct/--no-reconstruct",
    default=True,
    show_default=True,
    help="Choose roundings that keep the layer's output, instead of the nearest.",
)
@click.option(
    "--stretch/--no-stretch",
    default=True,
    show_default=True,
    help="Give channels between layers equal ranges first, as quantize does.",
)
@click.option(
    "--copy-shared", is_flag=True, help="Measure layers that share a weight, too, as quantize does with it."
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of layers measured at once; 0: one per core. The result does not depend on it.",
)
@click.option(
    "--max-loss",
    type=float,
    metavar="ERROR",
    help="Print only the fewest layers that must stay as they are for the others' errors to add up to no "
    "more than this (0.01: 20 dB), for `quantize --exclude @FILE`; of several bits the first ones count.",
)
@click.option("--plot", metavar="OUT.png|svg|pdf", help="Draw the result; needs matplotlib.")
@options.seed()
@options.as_json()
@report_option.report()
def sensitivity(
    source: str,
    images: str | None,
    preprocess: str | None,
    count: int | None,
    inputs: str,
    synthetic: int,
    seed: int,
    plot: str | None,
    max_loss: float | None,
    as_json: bool,
    report: str | None,
    cache: str | None,
    no_cache: bool,
    **chosen: Any,
) -> None:
    """Measure what each layer costs in output error, quantized or pruned alone.

    The error is the squared error of the network's outputs, divided by their variance. 96 real images are
    used unless --count is given. A third of the inputs is used to measure, the others to learn from.

    \b
    Example:
      onnxcompress sensitivity net.onnx --weight-bits 8,4 --sparsity 0.5 --plot layers.png
      onnxcompress sensitivity net.onnx --weight-bits 2,4,8 --json > layers.json
      onnxcompress quantize net.onnx out.onnx --bits-budget 4.5 --sensitivity layers.json
      onnxcompress sensitivity net.onnx --max-loss 0.002 > float.txt
      onnxcompress quantize net.onnx out.onnx --exclude @float.txt
    """
    from onnxcompress.model import load

    kept = chosen_cache(cache, no_cache)
    target = None if plot is None else _target(Path(source), plot)
    model = load(source)
    from onnxcompress.cli.console import progress
    from onnxcompress.optimize.intermediate_results import keeping
    from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
    from onnxcompress.passes.opsets import without_functions
    from onnxcompress.passes.several_inputs import pack
    from onnxcompress.sensitivity import analysis as core
    from onnxcompress.sensitivity.float_layers import check_allowed, float_layers

    if max_loss is not None:
        check_allowed(max_loss)
    request = InputRequest(
        images, preprocess, count, inputs, synthetic, seed, input_shape=chosen["input_shape"]
    )
    start = time.perf_counter()
    canonical = without_functions(model).copy()
    if len(read_inputs(canonical)) > 1:
        canonical, request = pack(canonical, request).model, replace(request, input_shape=None)
    fold_and_canonicalize(canonical, chosen["copy_shared"])
    with progress(lines=not as_json) as show, keeping(kept):
        found = core.sensitivity(
            canonical,
            request,
            chosen["weight_bits"],
            chosen["activation_bits"],
            chosen["sparsity"],
            per_channel=chosen["per_channel"],
            reconstruct=chosen["reconstruct"],
            stretch=chosen["stretch"],
            workers=chosen["workers"],
            progress=show,
        )
    seconds = time.perf_counter() - start
    if target is not None:
        from onnxcompress.cli.results.sensitivity_plot import write_plot

        write_plot(target, found.rows, Path(source).name)
    used = {name: chosen[name] for name in ("per_channel", "reconstruct", "stretch", "copy_shared")}
    facts = {"model": source, "seed": seed, "options": used, "seconds": seconds}
    chosen_layers = None if max_loss is None else float_layers(found.rows, max_loss)
    exclude = None if chosen_layers is None else list(chosen_layers.names)
    account = {**facts, **core.account(found, model.digest()), "exclude": exclude}
    if as_json:
        options.print_json(account)
    elif chosen_layers is not None:
        _list(chosen_layers, max_loss or 0.0)
    else:
        _show(found, seconds, target)
    report_option.write_report(report, account, [("model", source)])


sensitivity.params[-2:-2] = cache_options()


def _list(found: FloatLayers, allowed: float) -> None:
    """Print the layers to exclude, one a line, below comments."""
    click.echo(
        f"# all layers changed: error {found.whole:.3g}; without these {found.left:.3g} <= {allowed:g}"
    )
    for name in found.names:
        click.echo(name)


def _target(source: Path, text: str) -> Path:
    """Check where to draw. Raises OptionError for a wrong name, RuntimeUnavailable without matplotlib."""
    from importlib.util import find_spec

    from onnxcompress.model.onnx_file import check_target

    target = Path(text)
    if target.suffix.lower() not in PLOTS:
        raise OptionError(f"--plot {text!r}: expected a name that ends in {', '.join(PLOTS)}")
    if find_spec("matplotlib") is None:
        raise RuntimeUnavailable("--plot needs matplotlib, which is not installed: pip install matplotlib")
    try:
        check_target(source, target)
    except ModelError as error:
        raise OptionError(f"--plot {error}") from error
    return target


def _show(found: Sensitivity, seconds: float, plot: Path | None) -> None:
    """Print a row for each layer, the most costly first."""
    from onnxcompress.cli.console import number, show_refusals, stdout, table
    from onnxcompress.cli.results.sensitivity_plot import title

    layers: dict[str, list[Row]] = {}
    for row in found.rows:
        layers.setdefault(row.weight, []).append(row)
    ranked = sorted(layers.values(), key=lambda rows: -max(row.error for row in rows))
    first = ranked[0]
    columns = ["layer", "weights", *(title(row) for row in first)]
    cells = [[rows[0].layer, number(rows[0].parameters), *(_cell(row) for row in rows)] for rows in ranked]
    changed = "" if first[0].changed is None else ", and share of other top-1 classes"
    console = stdout()
    console.print(
        table(
            f"Output error of {counted(len(ranked), 'layer')}, each changed alone{changed}", columns, cells
        )
    )
    for used in found.inputs:
        console.print(f"measured on {used.count} {used.source} ({used.why})", markup=False)
    console.print(f"took {seconds:.1f} s" + ("" if plot is None else f"; drawn: {plot}"), markup=False)
    show_refusals(console, found.refusals)


def _cell(row: Row) -> str:
    return f"{row.error:.2e}" + ("" if row.changed is None else f"  {100 * row.changed:.0f} %")
