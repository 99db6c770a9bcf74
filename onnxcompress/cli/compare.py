"""`onnxcompress compare`: two models side by side.

--json prints one object:

    a, b        {name, bytes, parameters, macs, timing, top1}; null where a value is unknown
    latency     {value, low, high}: median of b over median of a, with its 95 % interval
    precision   {within, asked, reached}: half that interval, relative, and the tolerance
    difference  {max_abs, max_rel, output, per_output} of the outputs
    agreement   share of `inputs` with the same top-1 class
    inputs      description of the inputs of difference, agreement and top1
    preprocess, preprocess_from    of images: the text, and option, model (its metadata), default,
                                   option-and-model or option-and-default
    gates       [{gate, limit, measured, passed, text, preprocess}], one for each limit that was given
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli import options, report_option
from onnxcompress.cli.gate_options import gate_options, take_gates
from onnxcompress.cli.sections import SectionedCommand
from onnxcompress.errors import OptionError, TargetMissed

if TYPE_CHECKING:
    from onnxcompress.data.image_set import ImageSet
    from onnxcompress.data.preprocessing_choice import PreprocessingChoice
    from onnxcompress.evaluation.compare import Comparison
    from onnxcompress.evaluation.gate_results import Verdict


@click.command(cls=SectionedCommand)
@click.argument("a", metavar="A", type=options.FILE)
@click.argument("b", metavar="B", type=options.FILE)
@options.images(required=False)
@options.runtime(batch=1)
@options.timing()
@options.seed()
@options.as_json()
@report_option.report()
@options.added(gate_options(judged=()))
def compare(
    a: str,
    b: str,
    images: str | None,
    preprocess: str | None,
    count: int | None,
    tolerance: float,
    seed: int,
    as_json: bool,
    report: str | None,
    **chosen: Any,
) -> None:
    """Compare model B with the reference A.

    Size, parameters, MACs, interleaved latency, difference of the outputs and top-1 agreement, on --images
    or on random inputs; with labels the accuracy of both, too.

    \b
    Example:
      onnxcompress compare net.onnx fast.onnx --images val/ --preprocess imagenet
      onnxcompress compare net.onnx fast.onnx --min-speedup 1.2 --max-size 5
    """
    from onnxcompress.cli.console import progress, show_verdicts, stdout
    from onnxcompress.data.image_set import load_images
    from onnxcompress.data.preprocessing_choice import choose
    from onnxcompress.evaluation import compare as measure
    from onnxcompress.evaluation.accuracy import preprocessing
    from onnxcompress.evaluation.gate_results import GateMeasurements, judge, summary
    from onnxcompress.evaluation.gates import Gates
    from onnxcompress.model.model_like import metadata_of

    if images is None and (preprocess is not None or count is not None):
        raise OptionError("--preprocess and --count need --images")
    gates = Gates(images=images, **take_gates(chosen))
    chosen = options.take_provider(chosen)
    gates.check(images="--images")
    choice = choose(preprocess, metadata_of(a), a)
    if images is not None:
        choice = preprocessing(a, preprocess, chosen["shapes"])
    draw: dict[str, Any] = {
        "preprocess": choice.preprocess,
        "count": count,
        "seed": seed,
        "labels": gates.max_drop is not None,
    }
    with progress(lines=not as_json) as show:
        loaded = None if images is None else load_images(images, progress=show, **draw)
        chosen |= {"tolerance": tolerance / 100, "seed": seed, "progress": show}
        found = measure.compare(a, b, images=loaded, **chosen)
    options.warn_placements([(s.name, s.timing.placement) for s in (found.a, found.b)])
    options.warn_clocks([found.a.timing])
    verdicts = judge(gates.limits, GateMeasurements.of(found, "" if loaded is None else str(choice)))
    timings = {side.name: side.timing for side in (found.a, found.b)}
    precision = options.precision_of(timings, tolerance if chosen["runs"] is None else None)
    preprocessed = dict.fromkeys(choice.as_dict()) if loaded is None else choice.as_dict()
    account = found.as_dict() | preprocessed
    account |= {"precision": precision, "gates": [dataclasses.asdict(v) for v in verdicts]}
    if as_json:
        options.print_json(account)
    else:
        _show(found, None if loaded is None else choice)
        stdout().print(options.precision_text(precision, True), markup=False)
        show_verdicts(stdout(), verdicts)
    _report(report, account, (a, b, images), report_option.Compared(found), loaded, verdicts)
    if missed := summary(verdicts):
        raise TargetMissed(missed)


def _report(
    path: str | None,
    account: dict[str, Any],
    files: tuple[str, str, str | None],
    compared: report_option.Compared,
    loaded: ImageSet | None,
    verdicts: Sequence[Verdict],
) -> None:
    if path is None:
        return
    from onnxcompress.report.collect import pictures

    shown = [] if loaded is None else [pictures(f"Images of {files[2]}", loaded)]
    roles = [(r, f) for r, f in zip(("reference", "model", "images"), files, strict=True) if f is not None]
    report_option.write_report(path, account, roles, compared=compared, pictures=shown, gates=verdicts)


def _show(found: Comparison, choice: PreprocessingChoice | None) -> None:
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
    title = f"{left.device}, batch {left.batch}, {left.runs} runs each"
    console.print(table(title, ["", a.name, b.name, "B / A"], rows))
    worst = found.difference
    console.print(
        f"largest output difference: {worst.max_abs:.2e} absolute, {worst.max_rel:.2e} relative "
        f"(output {worst.output!r})",
        markup=False,
    )
    if found.agreement is not None:
        console.print(f"top-1 agreement: {found.agreement:.2%} on {found.inputs}", markup=False)
    if choice is not None:
        console.print(f"images are {choice}", markup=False)


def _change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else "-"
