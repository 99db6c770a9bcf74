"""Records of what a pass changed and of what it refused to change."""

from __future__ import annotations

from dataclasses import dataclass


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
