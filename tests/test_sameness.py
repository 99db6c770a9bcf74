"""The same seed gives the same bytes: in another process, and with another number of threads.

`python tests/benchmarks/sameness.py` shows it for every pass that learns, on more seeds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.sameness import COMMANDS, made


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_and_two_threads_make_the_same_file(seed: int, tmp_path: Path) -> None:
    name = ["synthesize", "prune", "quantize"][seed]  # one a seed: each is a process of seconds
    first, second = (made(name, seed, threads, tmp_path) for threads in (1, 2))
    assert first == second
    assert name in COMMANDS
