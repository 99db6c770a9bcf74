"""Shared by all tests: one thread for each process (they run beside each other), the shipped files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import MODELS

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of the shipped networks and images."""
    return MODELS


@pytest.fixture(scope="session")
def more_threads() -> Callable[[], AbstractContextManager[None]]:
    """A context in which torch has one thread more."""
    import torch

    @contextmanager
    def context() -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return context


@pytest.fixture
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency from a few rounds, for tests of what is done with it."""
    from onnxcompress.runtime import latency

    original = latency.interleave

    @functools.wraps(original)
    def few(*args: Any, **options: Any) -> Any:
        return original(*args, **(options | {"runs": 4}))

    monkeypatch.setattr(latency, "interleave", few)
    monkeypatch.setattr(latency, "_warm", lambda timed, seconds: None)
