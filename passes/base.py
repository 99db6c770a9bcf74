"""The contract of a pass: a frozen dataclass whose fields are its options, for Python, CLI and recipes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from onnxcompress.account import Change, Figures, InputSource, Refusal, as_json
from onnxcompress.errors import ModelError, ResultRefused
from onnxcompress.evaluation.guard import NAMED, Floors, Guard, GuardMeasurements, Verdict, verdict
from onnxcompress.option_fields import check_limits
from onnxcompress.progress import Progress, silent

if TYPE_CHECKING:
    from onnxcompress.data.image_set import ImageSet
    from onnxcompress.model import Model
    from onnxcompress.optimize.calibration import InputRequest
    from onnxcompress.passes.judging import Watch
    from onnxcompress.runtime.block_latency import LatencyChange


CONVERTED = "converted from"
"""Beginning of the change that notes the conversion of an old operator set, or of functions."""

F_co = TypeVar("F_co", bound=Figures | None, covariant=True)
"""The figures of a pass; None stands for a pass that measures nothing, or that may refuse a whole model."""


@dataclass(frozen=True)
class PassResult(Generic[F_co]):
    """What a pass changed, refused and measured."""

    changes: Sequence[Change] = ()
    refusals: Sequence[Refusal] = ()
    measured: F_co = None  # type: ignore[assignment]  # the type of a pass says whether it may be left out
    """The figures that the pass measured."""
    shown: ImageSet | None = field(default=None, repr=False, compare=False)
    """A sample of the inputs that the pass learned from, to look at; not part of the JSON account."""
    guard: GuardMeasurements | None = None
    """How far the outputs are from what they were; None: nothing was changed, or nobody asked."""
    input_shape: Mapping[str, Sequence[int | str | None]] | None = None
    """Input -> shape that was assumed for it; None: the file leaves no size open but the batch."""
    latency: LatencyChange | None = None
    """Latency before and after, of a pass that is `timed`; None: it was not measured."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "changes", tuple(self.changes))
        object.__setattr__(self, "refusals", tuple(self.refusals))

    @property
    def modified(self) -> bool:
        """Whether the pass changed the model."""
        return bool(self.changes)

    @property
    def figures(self) -> Figures:
        """The figures that every pass may have; none of them is set where nothing was measured."""
        return Figures() if self.measured is None else self.measured

    @property
    def inputs(self) -> tuple[InputSource, ...]:
        """What the pass learned from."""
        return self.figures.inputs or ()

    def measured_json(self) -> dict[str, Any]:
        """Convert the figures to JSON values.

        Returns:
            The figures by name, the `input_shape` where one was assumed, the `latency` where it was timed.
        """
        more = {"input_shape": self.input_shape, "latency": self.latency}
        values: dict[str, Any] = as_json(self.figures)
        return values | {name: as_json(value) for name, value in more.items() if value is not None}

    def verdict(self, pass_: Pass, guard: Guard) -> Verdict | None:
        """Whether the result may be written.

        Args:
            pass_: The pass whose result this is.
            guard: The floors, where they are the user's.

        Returns:
            The verdict; None where nothing was measured.
        """
        if self.guard is None:
            return None
        worst = sorted(self.figures.layer_snr_db.items(), key=lambda item: item[1])[:NAMED]
        named = ", ".join(f"{name} ({db:.1f} dB)" for name, db in worst)
        advice: tuple[str, ...] = (f"the layers that lose most: {named}",) if named else ()
        hints = pass_.hints()
        advice += (f"try {' or '.join(hints)}",) if hints else ()
        return verdict(self.guard, guard.floors(pass_.floors), advice=advice, force=guard.force)


@dataclass(frozen=True)
class Pass(ABC):
    """A transformation of a model that changes nothing when it is applied a second time.

    Its fields are the options, each made by `option`. Some field names have a fixed meaning: `provider`
    and `provider_options` configure onnxruntime, `device` is where torch computes; a pipeline checks that
    they are available before its first pass runs. `images`, `preprocess`, `count` and `seed` are what it
    learns from: it is judged by others. `reference` is the model that it repairs its model towards.
    """

    name: ClassVar[str]
    """Name in kebab case; also the command and the recipe key."""

    figures: ClassVar[type[Figures]] = Figures
    """Class of the figures in the pass's results."""

    preserves_function: ClassVar[bool] = False
    """Whether the outputs stay the same except for rounding."""

    floors: ClassVar[Floors] = Floors()
    """What outputs keep at least, where the user does not say."""

    composite: ClassVar[bool] = False
    """Whether it only applies other passes, each of which is noted in the provenance itself."""

    timed: ClassVar[bool] = False
    """Whether a pipeline measures the latency before and after: of passes that are to make it faster."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Packages imported when the pass is applied; a pipeline looks for them before its first pass runs."""

    def check(self) -> None:
        """Check the options on their own, without a model.

        Raises:
            OptionError: Options are out of range or contradict each other.
        """
        check_limits(self)

    def is_repeatable(self, figures: Figures) -> bool:
        """Return whether another run would come to the same result: a cache keeps no other.

        Args:
            figures: The figures of a result.

        Returns:
            False where a target was missed: the next run is to try again.
        """
        return not figures.target_missed

    @abstractmethod
    def apply(self, model: Model, progress: Progress = silent) -> PassResult[Figures | None]:
        """Transform `model` in place.

        Args:
            model: The model to change.
            progress: Called with the stage, the steps done and the steps in all.

        Returns:
            The changes, the refusals with their reasons, and the figures that the pass measured.

        Raises:
            CompressError: The model cannot be handled.
        """

    def preview(self, model: Model, progress: Progress = silent) -> list[Refusal]:
        """List what `apply` would leave alone, by the checks that need none of its work.

        Args:
            model: The model; it stays as it is.
            progress: Called with the expected work, with no steps.

        Returns:
            What would be left alone, with the reasons.

        Raises:
            CompressError: `apply` would fail on this model with these options.
        """
        return []

    def hints(self) -> list[str]:
        """Suggest what to try where the outputs are too far from what they were.

        Returns:
            Options with their values, as on the command line.
        """
        return []

    def no_gain_on(self, provider: str, batch: int) -> str:
        """Say why the result is not expected to be faster, where that is known before the work.

        Args:
            provider: Short name of onnxruntime's execution provider.
            batch: Images in a run.

        Returns:
            One sentence; empty where it may be faster.
        """
        return ""

    def options(self) -> dict[str, Any]:
        """Collect the options as JSON values, for the provenance.

        Returns:
            Option name -> value.
        """
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def run(
    passes: Sequence[Pass], model: Model, progress: Progress = silent, *, guard: Guard | None = None
) -> list[PassResult[Figures | None]]:
    """Apply passes in order and note each that changed the model in its provenance.

    Args:
        passes: The passes, first to last.
        model: The model, changed in place.
        progress: Called with the stage, the steps done and the steps in all.
        guard: How each result is judged; None: it is not.

    Returns:
        What each pass did; with a guard `PassResult.guard` has what was measured.

    Raises:
        ModelError: A pass left an invalid model of a valid one. One that was invalid before, as files are
            that runtimes take and ONNX's checker does not, is not held against a pass.
        ResultRefused: The outputs are too far from what they were, and `guard` does not force it.
    """
    judge = Guard(verify=False) if guard is None else guard
    judge.check()
    watch = watch_over(passes, model) if judge.verify else None
    results = []
    for pass_ in passes:
        result = run_pass(pass_, model, progress, watch)
        refuse(result.verdict(pass_, judge))
        results.append(result)
    return results


def run_pass(
    pass_: Pass, model: Model, progress: Progress = silent, watch: Watch | None = None
) -> PassResult[Figures | None]:
    """Apply one pass, note it in the provenance if it changed something, and measure what the guard judges.

    Args:
        pass_: The pass.
        model: The model to change in place.
        progress: What to tell how far it is.
        watch: What runs the model before and after; None: nothing is measured.

    Returns:
        What the pass did. Nothing is judged yet: see `PassResult.verdict`.

    Raises:
        ModelError: The pass left an invalid model of a valid one.
        TypeError: The figures that the pass measured are not of the class that it names.
    """
    from onnxcompress.graph.validity import fault
    from onnxcompress.passes.several_inputs import applied

    valid = fault(model) is None
    digest = model.digest()
    before = None if watch is None else watch.before(model)
    result = _completed(applied(pass_, model, progress), pass_, model)
    model.assume({})
    if result.modified:
        model.touch()  # nothing that is compared or written rests on what a pass forgot to discard
    if result.modified and not pass_.composite:
        sources = result.figures.inputs
        noted = None if sources is None else [dataclasses.asdict(source) for source in sources]
        model.add_provenance(pass_.name, pass_.options(), digest, noted)
        if valid and (problem := fault(model)) is not None:
            raise ModelError(
                f"{model.name}: {pass_.name} made an invalid model of a valid one ({problem}); this is "
                "a defect of the pass: leave it out, and report it"
            )
    if watch is not None and before is not None and result.modified:
        progress("comparing the outputs", 0, 1)
        reference = getattr(pass_, "reference", None)
        measured = watch.measure(before, model, exact=pass_.preserves_function, reference=reference)
        result = replace(result, guard=measured)
        progress("comparing the outputs", 1, 1)
    return result


def _completed(result: PassResult[Figures | None], pass_: Pass, model: Model) -> PassResult[Figures | None]:
    """Add the sizes that were assumed, and a reason where nothing was changed and nothing refused."""
    if result.measured is not None and type(result.measured) is not pass_.figures:
        raise TypeError(
            f"pass {pass_.name}: it measured {type(result.measured).__name__}, and its class attribute "
            f"`figures` is {pass_.figures.__name__}"
        )
    refusals = result.refusals
    if not (result.modified or refusals or pass_.preserves_function or pass_.composite):
        refusals = [Refusal(model.name, f"it has nothing that {pass_.name} would change")]
    shapes = {name: tuple(shape) for name, shape in model.assumed.items()} or None
    return replace(result, refusals=refusals, input_shape=shapes)


def watch_over(passes: Sequence[Pass], model: Model, judged_by: InputRequest | None = None) -> Watch:
    """Prepare to run the model before and after passes, on inputs that none of them learned from.

    Args:
        passes: All passes that will be applied.
        model: The model before the first of them.
        judged_by: Images that are kept to judge by, and sizes of open inputs.

    Returns:
        The watch, for `run_pass`.
    """
    from onnxcompress.passes.judging import Watch
    from onnxcompress.passes.several_inputs import learns_from

    learned = [request for pass_ in passes if (request := learns_from(pass_)) is not None]
    exact = all(pass_.preserves_function for pass_ in passes)
    return Watch(model, learned, exact=exact, judged_by=judged_by)


def refuse(judged: Verdict | None, whose: str = "") -> None:
    """Raise ResultRefused where a result is not to be written.

    Args:
        judged: The verdict; None: nothing was measured.
        whose: Begins the reason where the result is that of one of several passes.

    Raises:
        ResultRefused: The verdict is a refusal.
    """
    if judged is not None and judged.status == "refused":
        raise ResultRefused(f"nothing is written: {whose}{judged.sentence}; --force writes it all the same")


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.item() if hasattr(value, "item") else str(value)  # of numpy; a path
