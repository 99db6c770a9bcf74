"""The same seed gives the same bytes in another process with another number of threads.

`python tests/benchmarks/sameness.py` shows every pass that learns, on more seeds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.sameness import made

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "seed", "threads"),
    [
        ("synthesize", 0, (1, 2)),
        ("prune", 1, (1, 2)),
        ("quantize", 2, (1, 2)),
        ("drop-blocks", 3, (1, 2)),
        ("correct-bias", 4, (1, 2)),
    ],
)
def test_another_process_makes_the_same_file(
    name: str, seed: int, threads: tuple[int, int], tmp_path: Path
) -> None:
    first, second = (made(name, seed, count, tmp_path) for count in threads)
    assert first == second
