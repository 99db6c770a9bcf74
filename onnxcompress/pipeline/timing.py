"""The latency before and after the passes of a chain that are to make a network faster.

    model --pass--> model', both timed in turn, run by run --> LatencyChange

It is measured after the pass and is no part of its cached result: it belongs to the machine, not to
the file.
`drop-blocks`, which chooses by latency, measures its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from onnxcompress.account import Figures
from onnxcompress.errors import CompressError, CompressWarning
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.progress import Progress
from onnxcompress.runtime.timing_options import RuntimeOptions, TimingOptions

if TYPE_CHECKING:
    from onnxcompress.model import Model
    from onnxcompress.pipeline.chain import Step
    from onnxcompress.runtime.block_latency import LatencyChange

SECONDS, WARM_UP = 2.0, 0.5
"""Seconds at most for timing both models, and for running them warm."""
TOLERANCE = 0.01
"""Half width of the ratio's 95 % interval at which the measurement ends early."""


def options_for(pass_: Pass, given: TimingOptions | None) -> TimingOptions | None:
    """Return how a pass is to be timed.

    Args:
        pass_: The pass; where it has options of the same names, such as a provider, they count.
        given: How passes are timed; None: they are not.

    Returns:
        The options; None where it is not to be timed.
    """
    if given is None or not given.latency or not pass_.timed:
        return None
    defaults = {f.name: f.default for f in fields(RuntimeOptions) if hasattr(pass_, f.name)}
    own = {name: getattr(pass_, name) for name in defaults}
    if own.get("provider", "auto") == "auto":
        own = {name: value for name, value in own.items() if value != defaults[name]}
    return replace(given, **own)


def timed(
    result: PassResult[Figures | None],
    before: Model,
    after: Model,
    options: TimingOptions | None,
    progress: Progress,
) -> PassResult[Figures | None]:
    """Add the latency before and after to the result of a pass.

    Args:
        result: The result.
        before: The model before the pass; it is not changed.
        after: The model after it; it is not changed.
        options: How to measure; None: not at all.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The result, with `latency` where the pass changed the model and both can be timed.
    """
    if options is None or not result.modified:
        return result
    return replace(result, latency=change(before, after, options, result.input_shape or {}, progress))


def whole_change(
    steps: Sequence[Step], given: Model, made: Model, options: TimingOptions | None, progress: Progress
) -> LatencyChange | None:
    """Time the result of a chain against its input, where several of its passes were to make it faster.

    Args:
        steps: What ran.
        given: The chain's input.
        made: Its result.
        options: How to measure; None: not at all.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The latencies; None where one step alone was timed, or none.
    """
    results = [step.result for step in steps if step.result.modified]
    faster = [r for r in results if r.latency or getattr(r.figures, "latency", None)]
    if options is None or not options.latency or len(faster) < 2:
        return None
    return change(given, made, options, faster[0].input_shape or {}, progress)


def change(
    before: Model,
    after: Model,
    options: TimingOptions,
    sizes: Mapping[str, Sequence[int | str | None]],
    progress: Progress,
) -> LatencyChange | None:
    """Measure the latencies of two models against each other.

    Args:
        before: The first model.
        after: The second model.
        options: How to measure.
        sizes: Shapes of inputs whose sizes the file leaves open, by name.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The latencies; None, with a warning, where they cannot be measured: the result is not lost for that.
    """
    from onnxcompress.optimize.executor.open_batch import timed_batch
    from onnxcompress.runtime.stopwatch import Stopwatch

    progress("measuring the latency before and after", 0, 1)
    first, second = before.copy(), after.copy()
    shapes: dict[str, Any] = {name: tuple(shape) for name, shape in sizes.items()}
    try:
        first.assume(shapes)
        second.assume(shapes)
        batch = timed_batch(before, options.latency_batch)
        stopwatch = Stopwatch(options.runs_on, batch, options.threads, warm_up=WARM_UP, tolerance=TOLERANCE)
        return stopwatch.compare(first, second, SECONDS)
    except CompressError as error:
        warnings.warn(f"the latency was not measured: {error}", CompressWarning, stacklevel=2)
        return None
    finally:
        progress("measuring the latency before and after", 1, 1)


def check_where_it_runs(
    passes: Sequence[Pass], steps: Sequence[Step], made: Model, given: TimingOptions | None
) -> None:
    """Compare what a chain's result gives on each provider that it was timed on with what the CPU's gives.

    Args:
        passes: The passes; those that choose by latency have a provider of their own.
        steps: What ran.
        made: The result.
        given: How passes are timed; None: they are not.
    """
    changed = [at for at, step in enumerate(steps) if step.result.modified]
    timed_on = [options_for(passes[at], given) or passes[at] for at in changed]
    asked = {options.runs_on for options in timed_on if isinstance(options, RuntimeOptions)}
    if not asked:
        return
    from onnxcompress.evaluation.provider_outputs import check_outputs
    from onnxcompress.runtime.session import pick_provider

    others = [provider for provider in map(pick_provider, asked) if provider.name != "cpu"]
    if not others:
        return
    sizes = next((step.result.input_shape for step in steps if step.result.input_shape), {})
    own = made.copy()
    with suppress(CompressError):  # inputs that cannot be drawn say nothing of the outputs
        own.assume({name: tuple(shape) for name, shape in sizes.items()})
        for provider in others:
            check_outputs(own, provider)
