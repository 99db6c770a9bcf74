"""The contract of a pass: a frozen dataclass whose fields are its options, for Python, CLI and recipes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from onnxcompress.errors import ModelError

if TYPE_CHECKING:
    import onnx

    from onnxcompress.inputs.images import ImageSet
    from onnxcompress.model import Model


@dataclass(frozen=True)
class Change:
    """One thing that a pass did."""

    node: str
    what: str


@dataclass(frozen=True)
class Refusal:
    """One thing that a pass left alone: where, which rule forbids it, what would make it possible."""

    node: str
    rule: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.node}: {self.rule}" + (f" ({self.remedy})" if self.remedy else "")


Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all); it may be called often."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress of someone who does not look."""


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


PROVIDER_HELP = (
    "Of onnxruntime: cpu, cuda, tensorrt, or another by its name, such as openvino; auto: cuda where it "
    "works, else cpu."
)
PROVIDER_OPTIONS_HELP = (
    "How it runs. cuda: tf32=on|off, cudnn_search=exhaustive|heuristic|default, nhwc, memory (MB); "
    "tensorrt: fp16, cache (folder), workspace (MB); both: device, cuda_graph."
)


def provider_options_option() -> Any:
    """The field `provider_options` of whatever has a field `provider`."""
    return option((), PROVIDER_OPTIONS_HELP, metavar="NAME=VALUE,…")


def option(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    file: Literal["read", "kept"] | None = None,
) -> Any:
    """A field of a pass that is an option. `help` states the unit where there is one.

    `file`: it names a file or folder. "read": it must be there; "kept": read if it is there, else written.
    """
    return field(default=default, metadata={"help": help, "metavar": metavar, "file": file})


def is_required(one: dataclasses.Field[Any]) -> bool:
    """Whether an option must be given."""
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING


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
    from onnxcompress.validity import fault

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
