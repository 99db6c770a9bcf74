"""Apply the passes of a chain step by step, and take results from the cache where it has them.

model --look-up--> cached result, or run_pass --> model --> entry in the cache
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcompress.account import Figures
from onnxcompress.evaluation.guard import GuardMeasurements, Verdict, as_dict, difference
from onnxcompress.passes.base import Pass, PassResult, run_pass
from onnxcompress.progress import Progress

if TYPE_CHECKING:
    from onnxcompress.model import Model
    from onnxcompress.optimize.calibration import InputRequest
    from onnxcompress.passes.judging import Watch
    from onnxcompress.pipeline.cache import Cache, Entry


@dataclass(frozen=True)
class Step:
    """The record of one pass that ran in a chain."""

    pass_: Pass
    result: PassResult[Figures | None]
    seconds: float
    """Time that the pass took when it ran."""
    cached: bool = False
    """Whether the result came from the cache."""
    verdict: Verdict | None = None
    """The guard's verdict on this pass; None: nothing was changed, or nothing compared."""

    def as_dict(self) -> dict[str, Any]:
        """Convert the step to JSON values.

        Returns:
            The keys pass, options, changes, refusals, measured, seconds, cached and guard.
        """
        guard, compared = self.result.guard, {}
        if guard is not None and self.pass_.preserves_function:
            compared = {"difference": difference(guard)}
        return {
            "pass": self.pass_.name,
            "options": self.pass_.options(),
            "changes": [dataclasses.asdict(c) for c in self.result.changes],
            "refusals": [dataclasses.asdict(r) for r in self.result.refusals],
            "measured": self.result.measured_json() | compared,
            "seconds": self.seconds,
            "cached": self.cached,
            "guard": guard_account(guard, self.verdict),
        }


def guard_account(measured: GuardMeasurements | None, verdict: Verdict | None) -> dict[str, Any] | None:
    """Convert the guard's measurements and verdict to JSON values.

    Args:
        measured: The measurements; None: there are none.
        verdict: The verdict on them.

    Returns:
        The keys of `evaluation.guard.as_dict`; None where nothing was measured.
    """
    return None if measured is None or verdict is None else as_dict(measured, verdict)


class Chain:
    """The model between two passes. Only the last of several cached results is ever loaded."""

    def __init__(
        self,
        model: Model,
        cache: Cache | None,
        watch: Watch | None = None,
        judged_by: InputRequest | None = None,
    ) -> None:
        self._given = model
        self._watch = watch
        self._judges = ""
        self._own: Model | None = None
        self._last: Entry | None = None
        self._cache = cache
        if cache is not None:
            from onnxcompress.pipeline.cache_keys import content_digest, model_digest

            self._digest = model_digest(model)
            if judged_by is not None and judged_by.images:
                self._judges = f"{content_digest(Path(judged_by.images))} {judged_by.preprocess}"

    def model(self) -> Model:
        """Return the current model, which may be changed.

        Returns:
            A copy of the given model, or the last result of the cache.
        """
        if self._own is None:
            name = self._given.name
            self._own = self._given.copy() if self._last is None else self._last.load(name)
        return self._own

    def known(self, pass_: Pass) -> Entry | None:
        """Look up the result of applying a pass now; if there is one, it becomes the current model.

        Args:
            pass_: The pass.

        Returns:
            The cache's entry, or None.
        """
        if self._cache is None:
            return None
        from onnxcompress.pipeline.cache_keys import step_key

        entry = self._cache.find(step_key(self._digest, pass_, self._judges), pass_.figures)
        if entry is not None:
            self._last, self._own = entry, None
            if entry.result.modified:
                self._digest = entry.digest
        return entry

    def step(self, pass_: Pass, progress: Progress) -> Step:
        """Apply a pass to the current model, or take its result from the cache.

        Args:
            pass_: The pass.
            progress: Called with the stage, the steps done and the steps in all.

        Returns:
            The step.
        """
        entry = self.known(pass_)
        if entry is not None:
            return Step(pass_, entry.result, entry.seconds, cached=True)
        key = self._key(pass_)
        model = self.model()
        start = time.monotonic()
        result = run_pass(pass_, model, progress, self._watch)
        seconds = time.monotonic() - start
        if self._cache is not None:
            self._store(key, pass_, model, result, seconds)
        return Step(pass_, result, seconds)

    def _key(self, pass_: Pass) -> str:
        if self._cache is None:
            return ""
        from onnxcompress.pipeline.cache_keys import step_key

        return step_key(self._digest, pass_, self._judges)

    def _store(
        self, key: str, pass_: Pass, model: Model, result: PassResult[Figures | None], seconds: float
    ) -> None:
        from onnxcompress.pipeline.cache_keys import writes_files

        assert self._cache is not None
        if writes_files(pass_):  # the next run has this file before it starts
            key = self._key(pass_)
        if result.modified:
            digest = self._digest = model.digest()
            model.input_digest = lambda: digest
        if pass_.is_repeatable(result.figures):
            self._cache.store(key, model, result, seconds)


def named_progress(progress: Progress, pass_: Pass, count: int) -> Progress:
    """Prefix the stages with the name of the pass, where there are several passes.

    Args:
        progress: The chain's progress.
        pass_: The pass.
        count: Number of passes in the chain.

    Returns:
        The progress for this pass.
    """
    if count == 1:
        return progress
    return lambda stage, done, total: progress(f"{pass_.name}: {stage}", done, total)
