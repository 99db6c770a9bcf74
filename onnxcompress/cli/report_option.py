"""The option `--report OUT.html` of every command, and the function that writes the page.

A command passes on the object that --json prints, and the files that it read and wrote. For commands that
change a model both models are compared, which takes some seconds more.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.errors import CompressError, OptionError
from onnxcompress.formatting import counted

if TYPE_CHECKING:
    from onnxcompress.cli.job import Job, Outcome
    from onnxcompress.data.image_set import ImageSet
    from onnxcompress.evaluation.compare import Comparison
    from onnxcompress.evaluation.gate_results import Verdict
    from onnxcompress.pipeline import Run, Step
    from onnxcompress.report import Pictures

SECONDS = 4.0
"""Time for timing both models."""
IMAGES = 500
"""Largest number of images that both models are compared on."""


@dataclass(frozen=True)
class Compared:
    """A comparison of two models, or the reason why there is none."""

    comparison: Comparison | None = None
    on: str = ""
    """Description of the inputs that the outputs were compared on; empty: that in `comparison`."""
    learned_from: bool = False
    """Whether a pass learned from these inputs."""
    problem: str = ""
    """Why there is no comparison."""


def _checked(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Raise OptionError before the work for a page that could not be written after it."""
    if value is None:
        return None
    path = Path(value)
    if path.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"--report {value}: expected a name that ends in .html")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OptionError(f"--report {value}: name a file in an existing, writable folder")
    return value


_REPORT: dict[str, Any] = {
    "metavar": "OUT.html",
    "callback": _checked,
    "help": "Write a report of the run, with charts, to one HTML file.",
}


def report_option() -> click.Option:
    """Create the option --report, for a command that is built from a list of options.

    Returns:
        The option.
    """
    return click.Option(["--report"], **_REPORT)


def report() -> Callable[[Any], Any]:
    """Create the option --report.

    Returns:
        A decorator of commands.
    """
    return click.option("--report", **_REPORT)


def write_report(
    path: str | None,
    account: Mapping[str, Any],
    files: Sequence[tuple[str, str | os.PathLike[str]]],
    *,
    names: Mapping[str, str] | None = None,
    compared: Compared | None = None,
    samples: Mapping[str, Sequence[float]] | None = None,
    pictures: Sequence[Pictures] = (),
    run: Run | None = None,
    gates: Sequence[Verdict] = (),
) -> None:
    """Write the report of the running command, if one is asked for.

    Args:
        path: The page; None: no report.
        account: The object that --json prints.
        files: Pairs of role and path. Sizes of layers are shown for `input` or `reference`, and for
            `output` or `model` beside it.
        names: Names for people by role, where they are not the paths.
        compared: The comparison of both models, if there is one.
        samples: Milliseconds of each run, by model.
        pictures: Sample images.
        run: The passes that ran.
        gates: Verdicts of the gates.
    """
    if path is None:
        return
    from onnxcompress.model.model_like import as_model
    from onnxcompress.report import Material, tell, write_page
    from onnxcompress.report.collect import environment, file_facts, layer_sizes, now

    context = click.get_current_context()
    named = names or {}
    facts = [file_facts(role, Path(file), named.get(role)) for role, file in files if Path(file).is_file()]
    before = next((file for role, file in files if role in ("input", "reference")), None)
    after = next((file for role, file in files if role in ("output", "model")), None)
    layers = [] if before is None else layer_sizes(as_model(before), as_model(after) if after else None)
    compared = compared or Compared()
    found = compared.comparison
    if found is not None:
        samples = {s.name: s.timing.samples_ms for s in (found.a, found.b)}
    material = Material(
        command=str(context.info_name),
        account=account,
        steps=() if run is None else run.steps,
        guard=None if run is None else run.guard,
        verdict=None if run is None else run.verdict,
        latency=None if run is None else run.latency,
        gates=gates,
        argv=context.find_root().obj or sys.argv[1:],
        created=now(),
        environment=environment(),
        files=facts,
        comparison=None if found is None else found.as_dict(),
        compared_on=compared.on,
        learned_from=compared.learned_from,
        not_compared=compared.problem,
        samples=samples or {},
        layers=layers,
        pictures=pictures,
    )
    write_page(path, tell(material))


def write_job_report(job: Job, outcome: Outcome) -> None:
    """Write the report of a command that changed a model, after comparing both models.

    Args:
        job: The job.
        outcome: Its outcome.
    """
    if job.report is None:
        return
    if not job.quiet:
        click.echo("for the report: comparing the models before and after", err=True)
    files = outcome.files
    learned = _learned(outcome.run.steps, files.source)
    roles: list[tuple[str, str | os.PathLike[str]]] = [("input", files.source), ("output", files.target)]
    named = {"input": files.source_name, "output": files.target_name}
    read = [("recipe", job.recipe), ("gate images", job.gates.images)]
    for step in outcome.run.steps:
        read += [
            (f.name, getattr(step.pass_, f.name))
            for f in dataclasses.fields(step.pass_)
            if f.metadata.get("file")
        ]
    roles += [(role, path) for role, path in dict.fromkeys(read) if path]
    from onnxcompress.report.collect import pictures

    write_report(
        job.report,
        job.account(outcome),
        roles,
        names=named,
        compared=_compared(job, outcome, learned),
        pictures=[pictures(title, images) for title, images in learned],
        run=outcome.run,
        gates=outcome.verdicts,
    )
    if not (job.quiet or job.as_json):
        click.echo(f"report: {job.report}", err=files.to_stream)


def _compared(job: Job, outcome: Outcome, learned: Sequence[tuple[str, ImageSet]]) -> Compared:
    """Compare both models on the gates' images, else those that passes learned from, else random inputs."""
    images, on = None, ""
    if job.gates.images is not None:
        images = _load(job.gates.images, job.gates.preprocess, outcome.files.source, job.gates.input_shape)
        on = f"{counted(len(images), 'image')} that the gates judge by" if images else ""
    elif learned:
        first = learned[0][1].spread(IMAGES)
        images = dataclasses.replace(first, y=None)  # accuracy on calibration images would mislead
        on = f"{counted(len(images), 'image')} that it learned from"
    try:
        comparison = _compare(job, outcome, images)
    except CompressError as error:
        return Compared(problem=str(error))
    return Compared(comparison, on, learned_from=bool(learned) and job.gates.images is None)


def _compare(job: Job, outcome: Outcome, images: ImageSet | None) -> Comparison:
    from onnxcompress.evaluation.compare import compare
    from onnxcompress.pipeline.timing import options_for
    from onnxcompress.runtime.providers import Provider

    gates, default = job.gates, {"provider": Provider(), "threads": 0, "batch": 1}
    steps = [s.pass_ for s in outcome.run.steps]
    timed = next((p for p in steps if hasattr(p, "latency_batch") and not p.timed), None)
    runtime: dict[str, Any] = {"provider": gates.runs_on, "threads": gates.threads, "batch": gates.batch}
    if timed is None and job.timing is not None and runtime == default:
        how = next((o for p in steps if (o := options_for(p, job.timing))), job.timing)
        runtime = {"provider": how.runs_on, "threads": how.threads, "batch": how.latency_batch}
    if timed is not None and runtime == default:
        options = timed.options()
        where = Provider.of(options["provider"], options["provider_options"])
        runtime = {"provider": where, "threads": options["threads"], "batch": options["latency_batch"]}
    return compare(
        outcome.files.source,
        outcome.files.target,
        images=images,
        seconds=SECONDS,
        tolerance=None,
        shapes=gates.shapes,
        **runtime,
    )


def _learned(steps: Sequence[Step], source: Path) -> list[tuple[str, ImageSet]]:
    """Collect the images that passes learned from, each set once, with titles."""
    found: list[tuple[str, ImageSet]] = []
    files: set[tuple[Any, ...]] = set()
    for step in steps:
        options, shown = step.pass_.options(), step.result.shown
        keys = ("images", "preprocess", "count", "seed", "input_shape")
        path, text, count, seed, shape = (options.get(k) for k in keys)
        if path is not None:
            new = (path, text, count, seed) not in files
            files.add((path, text, count, seed))
            if new and (loaded := _load(path, text, source, shape, count, seed or 0)) is not None:
                found.append((f"Images of {path}", loaded))
        elif shown is not None:
            kind = ", ".join(source.source for source in step.result.inputs)
            found.append((f"What {step.pass_.name} made for itself: {kind}", shown))
    return found


def _load(
    path: str,
    preprocess: str | None,
    source: Path,
    input_shape: str | None = None,
    count: int | None = None,
    seed: int = 0,
) -> ImageSet | None:
    from onnxcompress.data.image_set import load_images
    from onnxcompress.evaluation.accuracy import preprocessing

    try:
        chosen = preprocessing(source, preprocess, input_shape).preprocess
        return load_images(path, preprocess=chosen, count=count, seed=seed)
    except CompressError:  # deleted since the pass ran, whose result came from the cache
        return None
