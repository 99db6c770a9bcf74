"""Less of what takes time, for tests of something else.

`python tests/helpers/brief.py COMMAND ...` is `onnxcompress COMMAND ...` with less of it, as a process.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import pytest

COMMAND = [sys.executable, __file__]
"""Starts such a process."""


def few_rounds(patch: pytest.MonkeyPatch, rounds: int = 4) -> None:
    """Take latency from a few rounds, not from those of some seconds."""
    from onnxcompress.runtime import bootstrap, latency

    original = latency.interleave

    @functools.wraps(original)
    def few(*args: Any, **options: Any) -> Any:
        return original(*args, **(options | {"runs": rounds}))

    patch.setattr(latency, "interleave", few)
    patch.setattr(latency, "_warm", lambda timed, seconds: None)
    patch.setattr(bootstrap, "RESAMPLES", 100)


LITTLE = {
    "reconstruction.feature_inputs.COUNT": 64,
    "reconstruction.feature_inputs.STEPS": 4,
    "reconstruction.gptq.RATIOS": 3,
    "reconstruction.gptq.SWEEPS": 2,
    "reconstruction.prune.TRIAL_STEPS": 3,
    "reconstruction.prune.TRIAL_REFITS": 2,
    "reconstruction.prune.PROBES": 4,
    "reconstruction.ridge.LADDER": (0.04, 0.64),
    "synthesis.distillation.STEPS": 4,
    "synthesis.distillation.MORE_STEPS": 4,
}
"""Constants of `optimize`: less to learn from, for fewer steps, and fewer values tried on each layer."""


def little_learning(patch: pytest.MonkeyPatch, *, inputs: int = 64, steps: int = 1) -> None:
    """Learn little, in tests that do not judge what is learned.

    Args:
        patch: What takes the constants back.
        inputs: Inputs made for the deep layers.
        steps: Steps of the adapters that blocks are scored by.
    """
    from onnxcompress.optimize.block_drop.recoverability import Scorer
    from onnxcompress.optimize.block_drop.selection import choose
    from onnxcompress.optimize.reconstruction.global_tuning import finetune_sparse

    for name, value in (LITTLE | {"reconstruction.feature_inputs.COUNT": inputs}).items():
        patch.setattr(f"onnxcompress.optimize.{name}", value)
    functions: tuple[tuple[Any, int], ...] = (
        (choose, steps),
        (Scorer.__init__, steps),
        (finetune_sparse, 8),
    )
    for function, count in functions:
        patch.setitem(function.__kwdefaults__, "steps", count)


def run(calls: Sequence[Sequence[str]]) -> int:
    """Run command lines one after the other in this process; returns the last exit code."""
    from onnxcompress.cli.main import main
    from onnxcompress.runtime.cores import prepare_threads

    prepare_threads()
    patch, code = pytest.MonkeyPatch(), 0
    few_rounds(patch)
    little_learning(patch, inputs=272, steps=4)  # more inputs than are optimized together
    for argv in calls:
        code = main(argv)
        if code not in (0, 3):
            break
    return code


if __name__ == "__main__":
    sys.exit(run([sys.argv[1:]]))
