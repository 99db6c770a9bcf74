"""The callback with which long computations report their progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Callback that gets the current stage, the steps done and the steps in all; it may be called often.

With no steps in all the text is an announcement."""


def silent(stage: str, done: int, total: int) -> None:
    """Ignore all progress; the default callback.

    Args:
        stage: What is being done.
        done: Steps done.
        total: Steps in all.
    """
