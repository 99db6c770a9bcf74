"""Execute a job, for the commands of passes and for `run`: read, apply, compare, write, judge, report.

IN --load--> model --Pipeline.run--> model, judged by the guard --save--> OUT --gates--> account, exit code
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import click

from onnxcompress.account import Figures
from onnxcompress.cli.files import Files, opened, reader_may_leave
from onnxcompress.cli.job import Job, Outcome
from onnxcompress.cli.options import print_json
from onnxcompress.cli.report_option import write_job_report
from onnxcompress.errors import ModelError, OptionError, TargetMissed, require
from onnxcompress.evaluation.gate_results import judge, summary
from onnxcompress.evaluation.gates import Baseline
from onnxcompress.formatting import counted
from onnxcompress.optimize.intermediate_results import keeping
from onnxcompress.pipeline import Run
from onnxcompress.pipeline.timing import options_for
from onnxcompress.progress import Progress, silent
from onnxcompress.runtime.session import pick_provider

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcompress.model import Model
    from onnxcompress.optimize.calibration import InputRequest
    from onnxcompress.passes.base import Pass
    from onnxcompress.runtime.timing_options import TimingOptions


FEW = 32
"""Number of images from which on a result that was learned from them generalizes well."""

MEASURING = ("fp16",)
"""Passes that measure on images and learn nothing from them."""


def execute(job: Job) -> None:
    """Execute a job: apply the chain, write the result and report it.

    Args:
        job: The job.

    Raises:
        TargetMissed: The result is written, but misses a target or a gate.
        CompressError: The job cannot be done.
    """
    if job.quiet and job.verbose:
        raise OptionError("--quiet and --verbose: give one of them")
    job.chain.check()
    if job.timing is not None:
        job.timing.check()
        for pass_ in job.chain.passes:
            if how := options_for(pass_, job.timing):
                how.check()
    if job.guard.verify:
        require("comparing the outputs (or give --no-verify)", "onnxruntime")
    with opened(job.source, job.target, as_json=job.as_json) as files:
        model = _load(files)
        _hint(job)
        with _progress(job) as show:
            baseline = job.gates.prepare(files.source, show)
            outcome = None if job.dry_run else _work(job, files, model, baseline, show)
        if outcome is None:
            _preview(job, files, model)
            return
        with reader_may_leave():
            _tell(job, outcome)
        _warn_few(outcome.run)
        _warn_unchanged(outcome.run)
        files.send()
        write_job_report(job, outcome)
    steps = outcome.run.steps
    missed = [s.result.figures.target_missed for s in steps] + [summary(outcome.verdicts)]
    if any(missed):
        raise TargetMissed("; ".join(filter(None, missed)))


def _work(job: Job, files: Files, model: Model, baseline: Baseline, show: Progress) -> Outcome:
    """Apply the chain, write the result, and judge it by the gates."""
    from onnxcompress.model import save
    from onnxcompress.model.model_like import model_bytes

    with keeping(job.cache):
        run = job.chain.run(
            model,
            show,
            cache=job.cache,
            guard=job.guard,
            judged_by=_judged_by(job),
            timing=_seen_timing(job),
        )
    save(run.model, files.target)
    verdicts = judge(job.gates.limits, job.gates.measure(baseline, files.target, show))
    return Outcome(run, files, verdicts, (model_bytes(files.source), model_bytes(files.target)))


def _seen_timing(job: Job) -> TimingOptions | None:
    """Return how to time passes; None where nobody would see it."""
    return job.timing if job.as_json or job.report or not job.quiet else None


def _hint(job: Job) -> None:
    """Say before the work which passes will not make the network faster where it is to run."""
    if job.timing is None or job.quiet:
        return
    for pass_ in job.chain.passes:
        options = options_for(pass_, dataclasses.replace(job.timing, latency=True))
        if options is not None:
            chosen = pick_provider(options.runs_on) if job.timing.latency else options.runs_on
            if text := pass_.no_gain_on(chosen.name, options.latency_batch):
                click.echo(f"note: {pass_.name}: {text}", err=True)


def _load(files: Files) -> Model:
    from onnxcompress.model import load
    from onnxcompress.model.onnx_file import check_external, check_target

    check_target(files.source, files.target)
    model = load(files.source)
    check_external(model, files.target)
    if files.to_stream and model.external_data:
        raise ModelError(
            f"{files.source_name}: its weights are in external data, which a stream cannot carry; name a "
            "file for OUT"
        )
    if files.source_name != str(files.source):
        model.name = files.source_name
    return model


def _progress(job: Job) -> AbstractContextManager[Progress]:
    if job.quiet:
        return nullcontext(silent)
    from onnxcompress.cli.console import progress

    return progress(lines=not job.as_json)


def _tell(job: Job, found: Outcome) -> None:
    if job.as_json:
        print_json(job.account(found))
        return
    if job.quiet:
        return
    from onnxcompress.cli.console import show_verdicts, size
    from onnxcompress.cli.results.guard import show_guard, show_whole
    from onnxcompress.cli.results.show import show_result
    from onnxcompress.runtime.block_latency import latency_text

    console = _console(found.files)
    steps = found.run.steps
    for number, step in enumerate(steps, 1):
        if len(steps) > 1:
            took = f"{step.seconds:.1f} s" + (", kept from an earlier run" if step.cached else "")
            console.print(f"\n[bold]{number}. {step.pass_.name}[/] ({took})")
        elif step.cached:
            took = f"{step.seconds:.1f} s then; --no-cache computes it anew"
            console.print(f"the result is kept from an earlier run ({took})", markup=False)
        show_result(console, step.pass_, step.result, verbose=job.verbose)
        if step.result.latency is not None:
            console.print(latency_text(step.result.latency), markup=False)
        show_guard(console, step.pass_, step.result.guard, step.verdict)
    show_whole(console, found.run.guard, found.run.verdict)
    if found.run.latency is not None:
        console.print(f"all passes together: {latency_text(found.run.latency)}", markup=False)
    show_verdicts(console, found.verdicts)
    for text in dict.fromkeys(verdict.preprocess for verdict in found.verdicts if verdict.preprocess):
        console.print(f"images of the gates are {text}", markup=False)
    before, after = found.bytes
    files = found.files
    console.print(
        f"{files.source_name} → {files.target_name}: {size(before)} → {size(after)}", markup=False
    )


def _judged_by(job: Job) -> InputRequest:
    """Return the images that results are judged by, as far as the gates name some."""
    from onnxcompress.optimize.calibration import InputRequest

    gates = job.gates
    return InputRequest(gates.images, gates.preprocess, input_shape=job.input_shape)


def _preview(job: Job, files: Files, model: Model) -> None:
    """Show what would be done, and which results are in the cache already."""
    chain = job.chain.keeping_aside(job.guard)
    judged_by = _judged_by(job) if job.guard.verify else None
    known = 0 if job.cache is None else chain.cached(model, job.cache, judged_by)
    previews = chain.previews(model)
    steps = [
        {
            "pass": pass_.name,
            "options": pass_.options(),
            "cached": at < known,
            "refusals": [dataclasses.asdict(refusal) for refusal in previews[at].refusals],
            "work": None if at < known else previews[at].work or None,
        }
        for at, pass_ in enumerate(chain.passes)
    ]
    if job.as_json:
        print_json({"dry_run": True, "steps": steps, "gates": job.gates.limits})
        return
    from onnxcompress.cli.console import show_refusals

    console = _console(files)
    console.print(f"{files.source_name} → {files.target_name}, nothing is run or written", markup=False)
    for number, (pass_, step) in enumerate(zip(chain.passes, steps, strict=True), 1):
        note = "  (kept from an earlier run)" if step["cached"] else ""
        console.print(f"{number}. {pass_.name}{_chosen(pass_)}{note}", markup=False)
        preview = previews[number - 1]
        if step["work"]:
            console.print(f"   {step['work']}", markup=False)
        show_refusals(console, preview.refusals, "would be left alone", all=job.verbose)
    for name, limit in job.gates.limits.items():
        console.print(f"gate --{name.replace('_', '-')} {limit:g}", markup=False)


def _chosen(pass_: Pass) -> str:
    """Format the options that differ from their defaults as on a command line."""
    words = []
    for f in dataclasses.fields(pass_):
        value = getattr(pass_, f.name)
        if value != f.default:
            flag = " --" + f.name.replace("_", "-")
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            words.append(flag if value is True else f"{flag} {text}")
    return "".join(words)


def _console(files: Files) -> Console:
    from onnxcompress.cli.console import stderr, stdout

    return stderr() if files.to_stream else stdout()


def _warn_few(run: Run) -> None:
    """Warn on stderr of passes that learned from few images, and so fit other images worse."""
    for step in run.steps:
        count = sum(source.count for source in step.result.inputs)
        learned = not step.pass_.preserves_function and step.pass_.name not in MEASURING
        measured = step.result.measured
        given = (getattr(step.pass_, name, None) for name in ("synthetic", "images"))
        if measured is not None and measured.effort is not None:  # its counts are enough for what it does
            learned &= any(given)
        if learned and step.result.modified and 0 < count < FEW:
            click.echo(
                f"warning: {step.pass_.name} learned from {counted(count, 'image')} and fits them "
                f"better than others: give it {FEW} or more (--synthetic, or more --images)",
                err=True,
            )


def _warn_unchanged(run: Run) -> None:
    """Warn on stderr of passes that were to change numbers and did not, with the first reason."""
    for step in run.steps:
        pass_, result = step.pass_, step.result
        refused_whole = result.measured is None and pass_.figures is not Figures
        if pass_.preserves_function or pass_.composite or (result.modified and not refused_whole):
            continue
        first, more = result.refusals[0], len(result.refusals) - 1
        also = f" (and {more} more, with -v)" if more else ""
        click.echo(f"warning: {pass_.name} did not change the network: {first}{also}", err=True)
