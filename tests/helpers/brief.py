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


def few_feature_inputs(patch: pytest.MonkeyPatch, count: int = 64, steps: int = 4) -> None:
    """Synthesize `count` inputs for the deep layers, not 2048, in fewer steps."""
    from onnxcompress.optimize.reconstruction import feature_inputs

    patch.setattr(feature_inputs, "COUNT", count)
    patch.setattr(feature_inputs, "STEPS", steps)


FEWER = {
    "gptq.RATIOS": 3,
    "gptq.SWEEPS": 2,
    "prune.TRIAL_STEPS": 3,
    "prune.TRIAL_REFITS": 2,
    "prune.PROBES": 4,
}
"""Constants of `optimize.reconstruction`."""


def few_layer_trials(patch: pytest.MonkeyPatch) -> None:
    """Try fewer values on each layer that is pruned or rounded."""
    for name, count in FEWER.items():
        patch.setattr(f"onnxcompress.optimize.reconstruction.{name}", count)


def few_adapter_steps(patch: pytest.MonkeyPatch, steps: int = 1) -> None:
    """Score each block by adapters that are trained for fewer steps."""
    from onnxcompress.optimize.block_drop.recoverability import Scorer
    from onnxcompress.optimize.block_drop.selection import choose

    functions: tuple[Any, ...] = (choose, Scorer.__init__)
    for function in functions:
        patch.setitem(function.__kwdefaults__, "steps", steps)


def few_tuning_steps(patch: pytest.MonkeyPatch, steps: int = 8) -> None:
    """Tune the weights of a sparse network together for fewer steps."""
    from onnxcompress.optimize.reconstruction.global_tuning import finetune_sparse

    function: Any = finetune_sparse
    patch.setitem(function.__kwdefaults__, "steps", steps)


def run(calls: Sequence[Sequence[str]]) -> int:
    """Run command lines one after the other in this process; returns the last exit code."""
    from onnxcompress.cli.main import main
    from onnxcompress.runtime.cores import prepare_threads

    prepare_threads()
    patch, code = pytest.MonkeyPatch(), 0
    few_rounds(patch)
    few_feature_inputs(patch, 320)  # more than are optimized together
    few_layer_trials(patch)
    few_adapter_steps(patch, 4)
    few_tuning_steps(patch)
    for argv in calls:
        code = main(argv)
        if code not in (0, 3):
            break
    return code


if __name__ == "__main__":
    sys.exit(run([sys.argv[1:]]))
