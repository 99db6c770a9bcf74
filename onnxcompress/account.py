"""What a pass did and what it left alone, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


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
