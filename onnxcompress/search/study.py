"""The sampler's side of a search: Optuna proposes points, and is told what came of them.

Everything is kept in one file as it happens. A search that was killed finds there which trials are told
and which were on their way; these are carried out first. The sampler is seeded anew for each trial from the
search's seed and the trial's number, and trials are proposed in batches that begin at multiples of the
number of jobs: so a resumed search proposes what an undisturbed one does.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxcompress.errors import require
from onnxcompress.evaluation.gates import Gates
from onnxcompress.search.aim import aimed, wanted_ratio
from onnxcompress.search.space import Candidate, Extent, first_points, parameters, suggest
from onnxcompress.search.trial import Row

OBJECTIVES = ("ratio", "loss", "size")
"""Latency over the original's, loss (see `front.loss_of`), size over the original's: all to be small."""
RANDOM_TRIALS = 10
"""Trials, the first points among them, before the sampler goes by what it was told."""
VIOLATIONS = "violations"


@dataclass(frozen=True)
class Told:
    """A finished trial of the sampler."""

    candidate: Candidate
    row: Row
    """Its figures, with the objectives."""


class Study:
    """The trials of a search, in a file."""

    def __init__(self, file: Path, seed: int, extent: Extent, gates: Gates | None = None) -> None:
        """Open a study, or begin it.

        Args:
            file: The file that keeps it.
            seed: Random seed.
            extent: How far the network can be cut.
            gates: Limits; where they ask for speed, every second trial aims at it.

        Raises:
            RuntimeUnavailable: Optuna is not installed.
        """
        require("search", "optuna")
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._seed, self._extent, self._gates = seed, extent, gates or Gates()
        self._open: dict[int, optuna.Trial] = {}
        _cut_to_whole_lines(file)
        self._study = optuna.create_study(
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(file.resolve()))),
            study_name="search",
            directions=["minimize"] * len(OBJECTIVES),
            load_if_exists=True,
        )
        for point in first_points(extent):
            self._study.enqueue_trial(point, skip_if_exists=True)

    @property
    def spent(self) -> float:
        """Seconds that earlier runs of the search took."""
        return float(self._study.user_attrs.get("spent", 0.0))

    @spent.setter
    def spent(self, seconds: float) -> None:
        self._study.set_user_attr("spent", seconds)

    def count(self) -> int:
        """Count the trials that are told.

        Returns:
            Their number, failed ones included.
        """
        return sum(trial.state.is_finished() for trial in self._study.trials)

    def batch(self, jobs: int, most: int) -> list[tuple[int, Candidate]]:
        """Propose trials: those that a killed search left, and others to fill up the batch.

        Args:
            jobs: Trials that are carried out at a time.
            most: Trials of the whole search; none beyond it is proposed.

        Returns:
            Number and point of each.
        """
        import optuna

        state = optuna.trial.TrialState.RUNNING
        left = [trial for trial in self._study.trials if trial.state == state]
        batch = [self._point(trial.number, optuna.Trial(self._study, trial._trial_id)) for trial in left]
        while len(batch) < jobs:
            number = self.count() + len(batch)
            if number >= most or (batch and number % jobs == 0):
                break
            self._study.sampler = self._sampler(number)
            if number % 2 == 0:
                self._aim([candidate for _, candidate in batch])
            batch.append(self._point(number, self._study.ask()))
        return batch

    def _aim(self, proposed: Sequence[Candidate]) -> None:
        """Let the next trial be one that is expected to be just fast enough, if there is a new one."""
        import optuna

        told = self.told()
        wanted = wanted_ratio(self._gates, [one.row for one in told])
        waiting = any(t.state == optuna.trial.TrialState.WAITING for t in self._study.trials)
        if wanted is None or waiting:
            return
        known = {one.candidate: float(one.row["ratio"]) for one in told}
        tried = {*known, *proposed}
        new = (one for one in aimed(known, wanted, self._extent) if one not in tried)
        for candidate in new:
            if self._enqueue(parameters(candidate, self._extent)):
                return

    def _enqueue(self, point: dict[str, Any]) -> bool:
        """Put a point before those of the sampler, unless it was tried (a failed one, too)."""
        count = len(self._study.trials)
        self._study.enqueue_trial(point, skip_if_exists=True)
        return len(self._study.trials) > count

    def tell(self, number: int, row: Row, violations: Sequence[float]) -> None:
        """Tell what came of a trial.

        Args:
            number: Its number.
            row: Its figures, with the objectives; with `error` where it failed.
            violations: How far limits are missed, above 0 where they are.
        """
        import optuna

        trial = self._open.pop(number)
        trial.set_user_attr("row", row)
        trial.set_user_attr(VIOLATIONS, list(violations))
        if "error" in row:
            self._study.tell(number, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(number, [float(row[name]) for name in OBJECTIVES])

    def told(self) -> list[Told]:
        """List the trials that were carried out.

        Returns:
            Points and figures, in the order of their numbers; failed trials are left out.
        """
        import optuna

        state = optuna.trial.TrialState.COMPLETE
        return [
            Told(suggest(optuna.trial.FixedTrial(t.params), self._extent), t.user_attrs["row"])
            for t in self._study.trials
            if t.state == state
        ]

    def failures(self) -> list[str]:
        """List why trials failed.

        Returns:
            A message for each that did.
        """
        rows = [trial.user_attrs.get("row", {}) for trial in self._study.trials]
        return [row["error"] for row in rows if "error" in row]

    def _point(self, number: int, trial: Any) -> tuple[int, Candidate]:
        self._study.sampler = self._sampler(number)
        self._open[number] = trial
        return number, suggest(trial, self._extent)

    def _sampler(self, number: int) -> Any:
        import optuna

        with warnings.catch_warnings():  # constraints are marked as experimental
            warnings.simplefilter("ignore")
            return optuna.samplers.TPESampler(
                seed=self._seed * 1_000_003 + number,
                n_startup_trials=RANDOM_TRIALS,
                multivariate=True,
                group=True,
                constraints_func=lambda trial: trial.user_attrs.get(VIOLATIONS, ()),
            )


def _cut_to_whole_lines(file: Path) -> None:
    """Take away an incomplete last line: the disk was full, or the machine went down."""
    if file.is_file() and (content := file.read_bytes()) and not content.endswith(b"\n"):
        file.write_bytes(content[: content.rfind(b"\n") + 1])
