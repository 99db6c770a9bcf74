"""The facts that a report is made from: the account that --json prints, and what only a report needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class File:
    """A file that was read or written."""

    role: str
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LayerSize:
    """Bytes of the weights of a layer, before and after; None where the model does not have the layer."""

    name: str
    before: int | None
    after: int | None
    layer: bool = True
    """Whether it is one layer; otherwise all nodes of an operator that is not a layer."""


@dataclass(frozen=True)
class Pictures:
    """Sample images side by side in one PNG."""

    title: str
    text: str
    png: bytes


@dataclass(frozen=True)
class Material:
    """All facts that a report presents."""

    command: str
    account: Mapping[str, Any]
    """What --json prints."""
    argv: Sequence[str] = ()
    """The command line, without the program's name."""
    made: str = ""
    """When the report was made."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Machine and software: name -> version."""
    files: Sequence[File] = ()
    comparison: Mapping[str, Any] | None = None
    """`Comparison.as_dict()` of the models before and after."""
    compared_on: str = ""
    """Description of the inputs on which the outputs were compared."""
    learned_from: bool = False
    """Whether a pass learned from these inputs."""
    not_compared: str = ""
    """Why there is no comparison."""
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Model -> milliseconds of each run."""
    layers: Sequence[LayerSize] = ()
    pictures: Sequence[Pictures] = ()

    @property
    def steps(self) -> list[Mapping[str, Any]]:
        """The passes that ran, as `Step.as_dict` has them."""
        if "steps" in self.account:
            return list(self.account["steps"])
        return [self.account] if "pass" in self.account else []
