"""Shared by all tests: one thread for each process (they run beside each other), the shipped files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

MODELS = Path(__file__).resolve().parent.parent / "models"


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of the shipped networks and images."""
    return MODELS
