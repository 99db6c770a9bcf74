"""Shared by all tests: one thread for each process (they run beside each other), the shipped files."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

MODELS = Path(__file__).resolve().parent.parent / "models"


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of the shipped networks and images."""
    return MODELS


@pytest.fixture
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency from a few rounds, for tests of what is done with it."""
    from onnxcompress import latency

    original = latency.interleave

    @functools.wraps(original)
    def few(*args: Any, **options: Any) -> Any:
        return original(*args, **(options | {"runs": 4}))

    monkeypatch.setattr(latency, "interleave", few)
    monkeypatch.setattr(latency, "_warm", lambda timed, seconds: None)
