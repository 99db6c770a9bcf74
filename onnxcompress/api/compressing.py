"""A call for each pass, and one for a recipe."""

from __future__ import annotations

import dataclasses
import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcompress.api.models import model_of
from onnxcompress.api.results import Compressed, shown
from onnxcompress.evaluation.gate_results import judge
from onnxcompress.evaluation.gates import Gates
from onnxcompress.evaluation.guard import Guard
from onnxcompress.model import Model, save
from onnxcompress.model.onnx_file import check_external, check_target
from onnxcompress.option_fields import is_required
from onnxcompress.passes import load_pass
from onnxcompress.passes.base import Pass
from onnxcompress.pipeline import Pipeline, Run
from onnxcompress.pipeline.cache import Cache
from onnxcompress.progress import Progress, silent
from onnxcompress.report.run_data import File, Material
from onnxcompress.runtime.timing_options import TimingOptions

if TYPE_CHECKING:
    from onnxcompress.evaluation.gate_results import Verdict

ABOUT = {
    "model": "A path, a ModelProto or its bytes, a `Model`, or an `onnx_ir.Model`; it is not changed.",
    "out": "Where the result is written, completely or not at all; None: nowhere.",
    "guard": "How the result is judged before it is written; None: it is not.",
    "timing": "How latency is measured before and after passes that are to gain time; None: it is not.",
    "cache": "Where results are kept and looked up; None: nowhere.",
    "progress": "Called with the stage, the steps done and the steps in all.",
}
"""What all calls that compress have in common, and what the docstring says of it."""


def pass_function(name: str) -> Callable[..., Compressed[Any]]:
    """Make the function of a pass.

    Args:
        name: Name of the pass, in kebab case.

    Returns:
        A function of a model and the pass's options.
    """
    cls = load_pass(name)

    def function(
        model: Any,
        out: str | os.PathLike[str] | None = None,
        *,
        guard: Guard | None = Guard(),  # noqa: B008  it is frozen
        timing: TimingOptions | None = TimingOptions(),  # noqa: B008
        cache: Cache | None = None,
        progress: Progress = silent,
        **options: Any,
    ) -> Compressed[Any]:
        chain = Pipeline([cls(**_plain(cls, options))])
        return _compressed(chain, model, out, guard, timing, cache, progress)

    function.__name__ = function.__qualname__ = name.replace("-", "_")
    function.__module__ = "onnxcompress"
    function.__doc__ = _docstring(cls)
    function.__signature__ = _signature(cls, inspect.signature(function))  # type: ignore[attr-defined]
    return function


def run(
    recipe: str | os.PathLike[str],
    model: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    variables: Mapping[str, str] | None = None,
    cache: Cache | None = None,
    progress: Progress = silent,
) -> Compressed[Any]:
    """Apply the passes of a recipe, which also says how the result is judged and timed.

    Args:
        recipe: The recipe file.
        model: A path, a ModelProto or its bytes, a `Model`, or an `onnx_ir.Model`; it is not changed.
        out: Where the result is written, completely or not at all; None: nowhere.
        variables: Values of its variables, as given with -D.
        cache: Where results are kept and looked up; None: nowhere.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The compressed model. A gate that is missed raises nothing: see `Compressed.gates`.

    Raises:
        OptionError: Something in the recipe is wrong; the message names the line.
        ResultRefused: Outputs differ too much from those before; nothing is written.
        CompressError: A pass cannot handle the model.
    """
    from onnxcompress.pipeline.recipe import read_recipe

    read = read_recipe(recipe, variables)
    chain = Pipeline(read.passes)
    return _compressed(chain, model, out, read.guard, read.timing, cache, progress, read.gates)


def _compressed(
    chain: Pipeline,
    model: Any,
    out: str | os.PathLike[str] | None,
    guard: Guard | None,
    timing: TimingOptions | None,
    cache: Cache | None,
    progress: Progress,
    gates: Gates | None = None,
) -> Compressed[Any]:
    from onnxcompress.optimize.intermediate_results import keeping

    before = model_of(model)
    if out is not None:
        _check_out(model, before, Path(out))
    limits = gates or Gates()
    limits.check()
    baseline = limits.prepare(before, progress)
    with keeping(cache) if cache is not None else nullcontext():
        done = chain.run(before, progress, cache=cache, guard=guard, timing=timing)
    if out is not None:
        save(done.model, out)
    verdicts = judge(limits.limits, limits.measure(baseline, done.model, progress))
    last = done.steps[-1].result
    values = {
        "model": done.model,
        "steps": tuple(done.steps),
        "measured": last.measured,
        "guard": done.guard or last.guard,
        "verdict": done.verdict or done.steps[-1].verdict,
        "latency": done.latency or last.latency or getattr(last.measured, "latency", None),
        "gates": tuple(verdicts),
    }
    return shown(Compressed, values, _material(chain, before, done, verdicts))


def _check_out(model: Any, before: Model, out: Path) -> None:
    """Refuse a file before the work that could not be written after it. Raises ModelError."""
    from_file = isinstance(model, str | os.PathLike)  # a model in memory has no file that it could replace
    check_target(Path(model) if from_file else None, out)
    check_external(before, out)


def _material(chain: Pipeline, before: Model, done: Run, verdicts: Sequence[Verdict]) -> Material:
    from onnxcompress.report.collect import layer_sizes, pictures

    return Material(
        command="run" if len(chain.passes) > 1 else chain.passes[0].name,
        account={"provenance": done.model.provenance()},
        steps=done.steps,
        guard=done.guard,
        verdict=done.verdict,
        latency=done.latency,
        gates=verdicts,
        files=(File("model", before.name, 0, ""),),
        layers=layer_sizes(before, done.model),
        pictures=[
            pictures(f"What {step.pass_.name} made for itself", step.result.shown)
            for step in done.steps
            if step.result.shown is not None
        ],
    )


def _plain(cls: type[Pass], options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert paths to texts and lists to tuples, as the pass's fields hold them."""
    hints = typing.get_type_hints(cls)

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        is_tuple = typing.get_origin(hints.get(name)) is tuple
        return tuple(value) if is_tuple and not isinstance(value, str) else value

    return {name: plain(name, value) for name, value in options.items()}


def _signature(cls: type[Pass], plain: inspect.Signature) -> inspect.Signature:
    """Put the pass's options in place of `**options`."""
    common = list(plain.parameters.values())[:-1]
    options = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if is_required(f) else f.default,
            annotation=f.type,
        )
        for f in dataclasses.fields(cls)
    ]
    return plain.replace(parameters=[*common[:2], *options, *common[2:]])


def _docstring(cls: type[Pass]) -> str:
    """The pass's own text without its examples for the command line, and a line for each argument."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("\n\n\b")[0]
    options = {f.name: f.metadata.get("help", "") for f in dataclasses.fields(cls)}
    common = dict(ABOUT)
    first = {name: common.pop(name) for name in ("model", "out")}
    lines = [f"    {name}: {about}" for name, about in (first | options | common).items()]
    rest = (
        "Returns:\n    The compressed model.\n\nRaises:\n"
        "    ResultRefused: Outputs differ too much from those before; nothing is written.\n"
        "    CompressError: An option is wrong, or the pass cannot handle the model."
    )
    return f"{text}\n\nArgs:\n" + "\n".join(lines) + f"\n\n{rest}"
