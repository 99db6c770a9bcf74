"""Records of what a pass changed, what it refused to change, what it learned from and what it measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """A change that a pass made at a node."""

    node: str
    what: str


@dataclass(frozen=True)
class Refusal:
    """A change that a pass refused: the node, the rule that forbids it, and what would make it possible."""

    node: str
    rule: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.node}: {self.rule}" + (f" ({self.remedy})" if self.remedy else "")


@dataclass(frozen=True)
class InputSource:
    """A source of the inputs that a pass learned from."""

    source: str
    """Kind of the inputs: images, distilled, procedural, drawn, ..."""
    count: int
    """Number of inputs."""
    seed: int
    why: str
    """Why this source was taken."""
    preprocess: str = ""
    """The preprocessing, as `Preprocess` writes it; empty where the inputs are no images."""
    preprocess_from: str = "option"
    """Origin of the preprocessing: option, model (its metadata) or default; empty without preprocessing."""


@dataclass(frozen=True)
class StageSeconds:
    """Time that the stages of a pass took, in seconds."""

    inputs: float
    """Time for gathering or making the inputs."""
    layers: float | None = None
    """Time for fitting the layers, where the pass fits them one after the other."""
    tuning: float | None = None
    """Time for tuning the layers together, where the pass does so."""


@dataclass(frozen=True)
class BeforeAfter:
    """A figure of the model before and after a pass."""

    before: float
    after: float


@dataclass(frozen=True)
class Figures:
    """The figures that a pass measured; each pass derives a frozen dataclass from it.

    A field's values are numbers, strings, tuples, mappings and dataclasses of these; its docstring says
    the unit where its name does not. JSON has the field under its own name, or under that of `json_name`. A
    field whose default is None is left out of the JSON where it is None. A cache restores the figures by
    their annotations: what these name is imported at run time. The fields mean the same for every pass.
    """

    inputs: tuple[InputSource, ...] | None = field(default=None, kw_only=True)
    """What the pass learned from; None: it learns from nothing."""
    seconds: StageSeconds | None = field(default=None, kw_only=True)
    """Time that its stages took."""
    output_snr_db: Mapping[str, float] | None = field(default=None, kw_only=True)
    """Output -> signal to noise ratio against the model before, in decibels, on the inputs learned from."""
    effort: str | None = field(default=None, kw_only=True)
    """The effort that was taken: fast, balanced or best; None: the pass has but one."""
    target_missed: str | None = field(default=None, kw_only=True)
    """By how much the result misses the target that the options name; None: there is none, or it is met."""

    @property
    def layer_snr_db(self) -> dict[str, float]:
        """Layer -> signal to noise ratio of its own output, in decibels; empty where it is not known."""
        return {}


def json_name(name: str) -> dict[str, str]:
    """Give a field of figures another name in JSON: the published name would be unclear in code.

    Args:
        name: The name in JSON.

    Returns:
        Metadata for `dataclasses.field`.
    """
    return {"json_name": name}


def as_json(value: Any) -> Any:
    """Convert figures to JSON values.

    Args:
        value: Figures, or one of the values that they may have.

    Returns:
        The value with dataclasses and mappings as dicts by JSON name, and tuples as lists.
    """
    if is_dataclass(value):
        own_first = sorted(fields(value), key=lambda f: bool(f.kw_only))
        known = [(f, getattr(value, f.name)) for f in own_first]
        return {
            f.metadata.get("json_name", f.name): as_json(v)
            for f, v in known
            if not (v is None and f.default is None)
        }
    if isinstance(value, Mapping):
        return {str(key): as_json(v) for key, v in value.items()}
    return [as_json(v) for v in value] if isinstance(value, tuple | list) else value
