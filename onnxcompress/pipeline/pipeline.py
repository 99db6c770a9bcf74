"""Chains of passes, built in Python or from a recipe, with a cache from which they resume.

    model --pass 1--> --pass 2--> …      before each pass a look-up in the cache, after it an entry

A Pipeline is itself a pass: it can be used wherever a pass can, and a chain inside a chain is flattened.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from onnxcompress.account import Figures, Refusal
from onnxcompress.errors import CompressError, InputError, RuntimeUnavailable, require
from onnxcompress.evaluation.guard import Floors, Guard, GuardMeasurements, Verdict, verdict
from onnxcompress.passes.base import Pass, PassResult, refuse, watch_over
from onnxcompress.passes.base import run as run_passes
from onnxcompress.passes.several_inputs import previewed
from onnxcompress.pipeline.chain import Chain, Step, named_progress
from onnxcompress.pipeline.timing import check_where_it_runs, options_for, timed, whole_change
from onnxcompress.progress import Progress, silent

if TYPE_CHECKING:
    from onnxcompress.model import Model
    from onnxcompress.optimize.calibration import InputRequest
    from onnxcompress.passes.judging import Watch
    from onnxcompress.pipeline.cache import Cache
    from onnxcompress.runtime.block_latency import LatencyChange
    from onnxcompress.runtime.timing_options import TimingOptions


@dataclass
class Run:
    """The result of a chain, with the steps that led to it."""

    model: Model
    steps: list[Step] = field(default_factory=list)
    guard: GuardMeasurements | None = None
    """Comparison of the result with the chain's input; None where a step has the same comparison."""
    verdict: Verdict | None = None
    """The guard's verdict on that comparison."""
    latency: LatencyChange | None = None
    """Latency of the chain's input and of its result; None: not measured, or one step alone was timed."""


@dataclass(frozen=True)
class Preview:
    """What is known of a pass before its work."""

    refusals: tuple[Refusal, ...] = ()
    """What it would leave alone."""
    work: str = ""
    """The effort and the expected time; empty for a pass that does not learn, and where it is not known."""


@dataclass(frozen=True)
class PipelineFigures(Figures):
    """The figures of a chain that is applied as one pass."""

    passes: tuple[str, ...]
    """Names of its passes, in order."""
    measured: tuple[Figures | None, ...]
    """What each of them measured."""


@dataclass(frozen=True, init=False)
class Pipeline(Pass):
    """Passes applied in order, each noted in the model's provenance."""

    name: ClassVar[str] = "pipeline"
    figures: ClassVar[type[Figures]] = PipelineFigures
    composite: ClassVar[bool] = True

    passes: tuple[Pass, ...] = ()

    def __init__(self, passes: Iterable[Pass] = ()) -> None:
        flat = [p for pass_ in passes for p in (pass_.passes if isinstance(pass_, Pipeline) else (pass_,))]
        object.__setattr__(self, "passes", tuple(flat))

    @classmethod
    def from_recipe(
        cls, path: str | os.PathLike[str], variables: Mapping[str, str] | None = None
    ) -> Pipeline:
        """Read the passes of a recipe file.

        Args:
            path: The recipe.
            variables: Values of its variables, as given with -D.

        Returns:
            The chain.

        Raises:
            OptionError: Something in the recipe is wrong; the message names the line.
            RuntimeUnavailable: The package of a pass cannot be imported.
        """
        from onnxcompress.pipeline.recipe import read_recipe

        return cls(read_recipe(path, variables).passes)

    def to_recipe(self, folder: str | os.PathLike[str] = ".") -> str:
        """Write the chain as a recipe from which `from_recipe` makes an equal chain.

        Args:
            folder: The folder that the recipe will lie in; paths in the recipe are relative to it.

        Returns:
            The text of the recipe.
        """
        from onnxcompress.pipeline.recipe import Recipe, write_recipe

        return write_recipe(Recipe(self.passes), folder)

    def check(self) -> None:
        """Check everything that can fail before the first pass runs; see `check_ready`.

        Raises:
            CompressError: As `check_ready`; the message names the pass.
        """
        for at, pass_ in enumerate(self.passes):
            with self._placed(at):
                check_ready(pass_)

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[PipelineFigures]:
        """Apply all passes to `model` in place.

        Args:
            model: The model to change.
            progress: Called with the stage, the steps done and the steps in all.

        Returns:
            All changes and refusals, and the figures of each pass.

        Raises:
            CompressError: As `check` and the passes.
        """
        self.check()
        results = run_passes(self.passes, model, progress)
        return PassResult(
            [c for r in results for c in r.changes],
            [c for r in results for c in r.refusals],
            PipelineFigures(tuple(p.name for p in self.passes), tuple(r.measured for r in results)),
        )

    def run(
        self,
        model: Model,
        progress: Progress = silent,
        *,
        cache: Cache | None = None,
        guard: Guard | None = None,
        judged_by: InputRequest | None = None,
        timing: TimingOptions | None = None,
    ) -> Run:
        """Apply all passes to a copy of `model`.

        Args:
            model: The model; it is not changed.
            progress: Called with the pass and its stage, the steps done and the steps in all.
            cache: Where results are looked up, and new ones stored.
            guard: Judges the result of each pass and of the whole chain; None: nothing is judged.
            judged_by: Images that are kept to judge by.
            timing: How the latency before and after is measured; None: it is not.

        Returns:
            The new model, and one step for each pass.

        Raises:
            CompressError: As `check` and the passes; the message names the pass.
            ResultRefused: Outputs differ too much from those before.
        """
        self.check()
        judge = Guard(verify=False) if guard is None else guard
        judge.check()
        passes = self.keeping_aside(judge).passes
        watch = watch_over(passes, model, judged_by) if judge.verify else None
        chain = Chain(model, cache, watch, judged_by if judge.verify else None)
        steps = []
        for at, pass_ in enumerate(passes):
            with self._placed(at):
                clock = options_for(pass_, timing)
                before = None if clock is None else chain.model().copy()
                show = named_progress(progress, pass_, len(passes))
                step = chain.step(pass_, show)
                judged = step.result.verdict(pass_, judge) if judge.verify else None
                refuse(judged)
                if before is not None:
                    timed_result = timed(step.result, before, chain.model(), clock, show)
                    step = dataclasses.replace(step, result=timed_result)
                steps.append(dataclasses.replace(step, verdict=judged))
        run = Run(chain.model(), steps)
        run.latency = whole_change(steps, model, run.model, timing, progress)
        check_where_it_runs(passes, steps, run.model, timing)
        if watch is not None:
            _judge_whole(run, watch, judge)
        return run

    def keeping_aside(self, guard: Guard) -> Pipeline:
        """Leave some of the images of each pass out, for the guard to judge by.

        Args:
            guard: The guard; where it compares nothing, no image is left out.

        Returns:
            The chain, with `count` set where a pass has many images and no `count`.
        """
        return Pipeline(_keeping_aside(pass_) if guard.verify else pass_ for pass_ in self.passes)

    def cached(self, model: Model, cache: Cache, judged_by: InputRequest | None = None) -> int:
        """Count the first passes whose results are in the cache.

        Args:
            model: The model that the chain would be applied to.
            cache: The cache.
            judged_by: Images that are kept to judge by.

        Returns:
            The number of passes, from the first on, that need not run.
        """
        chain = Chain(model, cache, judged_by=judged_by)
        for index, pass_ in enumerate(self.passes):
            if chain.known(pass_) is None:
                return index
        return len(self.passes)

    def previews(self, model: Model) -> list[Preview]:
        """List what each pass would leave unchanged, and its expected time; `model` is not modified.

        Quick passes are applied to a copy, which the passes after them look at. The result of a slower pass
        is not known before it runs, and so neither is what the passes after it would leave unchanged.

        Args:
            model: The model that the chain would be applied to.

        Returns:
            What is known of each pass; nothing of passes after a slow one.

        Raises:
            CompressError: A pass cannot be applied at all; the message names it.
        """
        state, previews = model.copy(), list[Preview]()
        for at, pass_ in enumerate(self.passes):
            with self._placed(at):
                previews.append(_preview(pass_, state))
                if not pass_.preserves_function or pass_.needs:
                    break
                pass_.apply(state)
        return previews + [Preview()] * (len(self.passes) - len(previews))

    @contextmanager
    def _placed(self, at: int) -> Iterator[None]:
        """Prefix errors with the position and name of the pass, where there are several."""
        try:
            yield
        except CompressError as error:
            if len(self.passes) == 1:
                raise
            where = f"pass {at + 1} of {len(self.passes)}, {self.passes[at].name}"
            raise type(error)(f"{where}: {error}") from error


def _preview(pass_: Pass, model: Model) -> Preview:
    work: list[str] = []
    refusals = previewed(pass_, model, lambda text, done, total: work.append(text))
    return Preview(tuple(refusals), "; ".join(work))


def _keeping_aside(pass_: Pass) -> Pass:
    images, count = getattr(pass_, "images", None), getattr(pass_, "count", 0)
    if images is None or count is not None or pass_.preserves_function:
        return pass_
    from onnxcompress.optimize.unseen_inputs import kept_aside

    return dataclasses.replace(pass_, count=kept_aside(images))  # type: ignore[call-arg]


def _judge_whole(run: Run, watch: Watch, guard: Guard) -> None:
    """Judge the chain's result against its input, unless one pass alone changed it and was judged."""
    changed = [step for step in run.steps if step.result.modified]
    if not changed or (len(changed) == 1 and changed[0].result.guard is not None):
        return
    least = min(step.pass_.floors.refuse_db for step in changed)
    own = Floors(min(step.pass_.floors.warn_db for step in changed), least)
    run.guard = watch.whole(run.model)
    run.verdict = verdict(run.guard, guard.floors(own), force=guard.force)
    refuse(run.verdict, "all passes together: ")


def check_ready(pass_: Pass) -> None:
    """Check that a pass can start, whatever the model.

    Args:
        pass_: The pass.

    Raises:
        OptionError: Options contradict each other.
        InputError: A file that an option names does not exist, or `images` names none.
        RuntimeUnavailable: A package is not installed, or onnxruntime's provider or torch's device cannot
            start.
    """
    pass_.check()
    require(pass_.name, *pass_.needs)
    for f in dataclasses.fields(pass_):
        path = getattr(pass_, f.name)
        if f.metadata.get("file") == "read" and path and not Path(path).exists():
            flag = "--" + f.name.replace("_", "-")
            raise InputError(f"{flag} {path}: no such file or folder")
        if f.name == "images" and path:
            from onnxcompress.data.image_set import image_count

            image_count(path)
    options = pass_.options()
    if options.get("provider", "auto") not in ("auto", "cpu"):
        from onnxcompress.runtime.providers import Provider
        from onnxcompress.runtime.session import check_provider

        check_provider(Provider.of(options["provider"], options.get("provider_options", ())))
    if getattr(pass_, "device", "auto") not in ("auto", "cpu"):
        try:
            from onnxcompress.optimize.device import pick_device
        except ImportError as error:
            raise RuntimeUnavailable(f"torch cannot be imported ({error})") from error
        pick_device(pass_.device)  # type: ignore[attr-defined]
