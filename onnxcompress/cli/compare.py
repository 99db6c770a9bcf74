"""`onnxcompress compare`: two models side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli import options
from onnxcompress.errors import OptionError

if TYPE_CHECKING:
    from onnxcompress.compare import Comparison


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@options.images(required=False)
@options.runtime(batch=1)
@options.timing()
@options.seed()
@options.as_json()
def compare(
    a: str,
    b: str,
    images: str | None,
    preprocess: str | None,
    count: int | None,
    tolerance: float,
    seed: int,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Compare model B with the reference A.

    Size, parameters, MACs, interleaved latency, difference of the outputs and top-1 agreement, on --images
    or on random inputs; with labels the accuracy of both, too.

    \b
    Example: onnxcompress compare net.onnx fast.onnx --images val/ --preprocess imagenet
    """
    from onnxcompress import compare as measure

    if images is None and (preprocess is not None or count is not None):
        raise OptionError("--preprocess and --count need --images")
    loaded = options.read_images(images, preprocess, count, seed) if images is not None else None
    found = measure.compare(a, b, images=loaded, tolerance=tolerance / 100, seed=seed, **chosen)
    options.warn_placements([(s.name, s.timing.placement) for s in (found.a, found.b)])
    if as_json:
        options.print_json(found.as_dict())
    else:
        _show(found)


def _show(found: Comparison) -> None:
    from onnxcompress.cli.benchmark import ratio_text
    from onnxcompress.cli.console import number, size, stdout, table

    a, b = found.a, found.b
    rows = [
        ["size", size(a.bytes), size(b.bytes), _change(a.bytes, b.bytes)],
        ["parameters", number(a.parameters), number(b.parameters), _change(a.parameters, b.parameters)],
    ]
    if a.macs is not None and b.macs is not None:
        rows.append(["MACs", number(a.macs), number(b.macs), _change(a.macs, b.macs)])
    left, right = a.timing, b.timing
    medians = f"{left.median_ms:.3f} ms", f"{right.median_ms:.3f} ms"
    rows.append(["median latency", *medians, f"× {ratio_text(found.latency)}"])
    if a.top1 is not None and b.top1 is not None:
        points = 100 * (b.top1 - a.top1)
        rows.append(["top-1", f"{a.top1:.2%}", f"{b.top1:.2%}", f"{points:+.2f} points"])
    console = stdout()
    title = f"{left.provider}, batch {left.batch}, {left.runs} runs each"
    console.print(table(title, ["", a.name, b.name, "B / A"], rows))
    worst = found.difference
    console.print(
        f"largest output difference: {worst.max_abs:.2e} absolute, {worst.max_rel:.2e} relative "
        f"(output {worst.output!r})",
        markup=False,
    )
    if found.agreement is not None:
        console.print(f"top-1 agreement: {found.agreement:.2%} on {found.inputs}", markup=False)


def _change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else "-"
