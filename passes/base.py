"""The contract of a pass: a frozen dataclass whose fields are its options, for Python, CLI and recipes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from onnxcompress.account import Change, Refusal
from onnxcompress.errors import ModelError
from onnxcompress.progress import Progress, silent

if TYPE_CHECKING:
    import onnx

    from onnxcompress.data.image_set import ImageSet
    from onnxcompress.model import Model


CONVERTED = "converted from opset"
"""How the change begins that says so of a model with an old operator set."""


@dataclass
class PassResult:
    """What a pass changed, refused and measured."""

    changes: list[Change] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    """Figures that the pass measured, by name; JSON values only."""
    shown: ImageSet | None = field(default=None, repr=False, compare=False)
    """A sample of the inputs that the pass learned from, to look at; not part of the JSON account."""

    @property
    def modified(self) -> bool:
        """Whether the pass changed the model."""
        return bool(self.changes)


@dataclass(frozen=True)
class Pass(ABC):
    """A transformation of a model that changes nothing when it is applied a second time.

    Its fields are the options, each made by `option`. Three field names have a fixed meaning: `provider`
    and `provider_options` configure onnxruntime, `device` is where torch computes. A pipeline checks that
    they are available before its first pass runs.
    """

    name: ClassVar[str]
    """Name in kebab case; also the command and the recipe key."""

    preserves_function: ClassVar[bool] = False
    """Whether the outputs stay the same except for rounding."""

    composite: ClassVar[bool] = False
    """Whether it only applies other passes, each of which is noted in the provenance itself."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Packages imported when the pass is applied; a pipeline looks for them before its first pass runs."""

    def check(self) -> None:
        """Check the options on their own, without a model.

        Raises:
            OptionError: Options are out of range or contradict each other.
        """
        return

    @abstractmethod
    def apply(self, model: Model, progress: Progress = silent) -> PassResult:
        """Transform `model` in place.

        Args:
            model: The model to change.
            progress: Called with the stage, the steps done and the steps in all.

        Returns:
            The changes, the refusals with their reasons, and the figures that the pass measured.

        Raises:
            CompressError: The model cannot be handled.
        """

    def preview(self, model: Model) -> list[Refusal]:
        """What `apply` would leave alone, by the checks that need none of its work; `model` stays as it is.

        Raises:
            CompressError: `apply` would fail on this model with these options.
        """
        return []

    def options(self) -> dict[str, Any]:
        """Collect the options as JSON values, for the provenance.

        Returns:
            Option name -> value.
        """
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def run(passes: Sequence[Pass], model: Model, progress: Progress = silent) -> list[PassResult]:
    """Apply passes in order and note each that changed the model in its provenance.

    Args:
        passes: The passes, first to last.
        model: The model, changed in place.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The result of each pass.

    Raises:
        ModelError: A pass made an invalid model of a valid one. A model that was invalid from the start, as
            are some that runtimes accept and ONNX's checker does not, is not held against a pass.
        CompressError: A pass cannot handle the model.
    """
    from onnxcompress.graph.validity import fault

    results = []
    valid = fault(model) is None
    for pass_ in passes:
        digest = model.digest()
        result = pass_.apply(model, progress)
        if model.assumed:
            result.measured["input_shape"] = {name: list(s) for name, s in model.assumed.items()}
            model.assume({})
        unchanged = not (result.modified or result.refusals)
        if unchanged and not (pass_.preserves_function or pass_.composite):
            result.refusals.append(Refusal(model.name, f"it has nothing that {pass_.name} would change"))
        if result.modified and not pass_.composite:
            model.add_provenance(pass_.name, pass_.options(), digest, result.measured.get("inputs"))
            if valid and (problem := fault(model)) is not None:
                raise ModelError(
                    f"{model.name}: {pass_.name} made an invalid model of a valid one ({problem}); this is "
                    "a defect of the pass: leave it out, and report it"
                )
        results.append(result)
    return results


def apply_to_proto(
    pass_: Pass, proto: onnx.ModelProto, progress: Progress = silent
) -> tuple[onnx.ModelProto, PassResult]:
    """Apply one pass to a ModelProto whose weights are in memory.

    Args:
        pass_: The pass.
        proto: The model; it is not changed.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The new model and the result of the pass.

    Raises:
        ModelError: Weights lie in external data, or the result has 2 GB or more.
        CompressError: The pass cannot handle the model.
    """
    from onnxcompress.model import Model

    model = Model.from_proto(proto, proto.graph.name or "model")
    (result,) = run([pass_], model, progress)
    return model.to_proto(), result


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value)
