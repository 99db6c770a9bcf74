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


@dataclass
class PassResult:
    """What a pass did to the model it was given."""

    changes: list[Change] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    """Figures that the pass measured, by name; JSON values only."""
    shown: ImageSet | None = field(default=None, repr=False, compare=False)
    """Some of what it learned from, to be looked at; no account has it."""

    @property
    def modified(self) -> bool:
        return bool(self.changes)


@dataclass(frozen=True)
class Pass(ABC):
    """A change of a model. Applied a second time it changes nothing.

    Fields are the options, each made by `option`. Three names have a meaning of their own: `provider`
    and `provider_options` are onnxruntime's, `device` is where torch computes; a chain asks for them before
    its first pass runs.
    """

    name: ClassVar[str]
    """In kebab case; also the command and the recipe key."""

    preserves_function: ClassVar[bool] = False
    """Whether the outputs stay what they were, but for rounding."""

    composite: ClassVar[bool] = False
    """Whether it only applies other passes, which note themselves in the provenance."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Packages that it imports when it is applied, for a chain to look for before its first pass runs."""

    def check(self) -> None:
        """Raise OptionError where options are out of range or contradict each other; looks at no model."""
        return

    @abstractmethod
    def apply(self, model: Model, progress: Progress = silent) -> PassResult:
        """Change `model` in place. Raises CompressError where the model cannot be handled."""

    def options(self) -> dict[str, Any]:
        """The options as JSON values, for the provenance."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def run(passes: Sequence[Pass], model: Model, progress: Progress = silent) -> list[PassResult]:
    """Apply passes in order, noting each that changed something in the model's provenance.

    Raises ModelError where a pass leaves an invalid model of a valid one. One that was invalid before, as
    files are that runtimes take and ONNX's checker does not, is not held against a pass.
    """
    from onnxcompress.graph.validity import fault

    results = []
    valid = fault(model) is None
    for one in passes:
        digest = model.digest()
        result = one.apply(model, progress)
        if result.modified and not one.composite:
            model.add_provenance(one.name, one.options(), digest, result.measured.get("inputs"))
            if valid and (found := fault(model)) is not None:
                raise ModelError(
                    f"{model.name}: {one.name} made an invalid model of a valid one ({found}); that is a "
                    "defect of the pass: leave it out, and report it"
                )
        results.append(result)
    return results


def apply_to_proto(
    one: Pass, proto: onnx.ModelProto, progress: Progress = silent
) -> tuple[onnx.ModelProto, PassResult]:
    """Apply a pass to a ModelProto with its weights in memory; returns a new one and what was done.

    Raises ModelError where weights lie in external data, or the result has 2 GB and more.
    """
    from onnxcompress.model import Model

    model = Model.from_proto(proto, proto.graph.name or "model")
    (result,) = run([one], model, progress)
    return model.to_proto(), result


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value)
