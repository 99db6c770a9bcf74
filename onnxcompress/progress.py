"""How long work reports how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all); it may be called often."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress of someone who does not look."""
