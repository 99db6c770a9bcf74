"""What a report is made from: the account that --json prints, and what only a report needs beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class File:
    """One that was read or written."""

    role: str
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LayerSize:
    """Bytes of what a node reads from the file, before and after; None: there is no such node."""

    name: str
    before: int | None
    after: int | None
    layer: bool = True
    """Or all nodes of an operator that is none."""


@dataclass(frozen=True)
class Pictures:
    """Images that were used, side by side in one PNG."""

    title: str
    text: str
    png: bytes


@dataclass(frozen=True)
class Material:
    """All that a report tells."""

    command: str
    account: Mapping[str, Any]
    """What --json prints."""
    argv: Sequence[str] = ()
    """The command line, without the program's name."""
    made: str = ""
    """When."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What computed: name -> version."""
    files: Sequence[File] = ()
    comparison: Mapping[str, Any] | None = None
    """`Comparison.as_dict()` of the models before and after."""
    compared_on: str = ""
    """What the outputs were compared on, for a person."""
    learned_from: bool = False
    """Whether that is what a pass learned from."""
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
