"""Latencies that a search measures, each once: of structures, and of the results on its front.

A structure is a graph without the values of its weights: how well weights are repaired changes no latency.
What was measured lies in the search's folder, and with it the clock: where the machine was too busy for the
wall's once, all that follows is measured by the processor's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from onnxcompress.errors import CompressError, InputError, OptionError, RuntimeUnavailable
from onnxcompress.evaluation.gates import Gates
from onnxcompress.runtime.clocks import Clock
from onnxcompress.search.results import write_bytes
from onnxcompress.search.trial import Row, structure, time_result, time_together
from onnxcompress.search.workers import Workers

STRUCTURES, CONTENDERS, FRONT = "latencies.json", "contenders-latency.json", "front-latency.json"
UNUSABLE = (InputError, OptionError, RuntimeUnavailable)
"""Errors that every candidate would meet."""


@dataclass(frozen=True)
class Latencies:
    """Measures results of a search against its model, and keeps what was measured."""

    folder: Path
    model: str
    gates: Gates
    """How results are measured."""
    seconds: float
    """Time for a structure; each of those timed together gets twice as long, or five times on the front."""

    def of_structure(self, file: Path, workers: Workers) -> Row:
        """Measure a result, unless another of its structure was measured.

        Args:
            file: The result.
            workers: Where it is timed.

        Returns:
            As `trial.time_together` for one result; with `error` alone where onnxruntime refuses it.

        Raises:
            CompressError: Every candidate would meet the same error.
        """
        known, key = self._structures(), structure(file)
        if key not in known:
            call = partial(time_result, self.model, str(file), self.gates, self.seconds, self._clock())
            try:
                known[key] = workers.run_alone(call)
            except UNUSABLE:
                raise
            except CompressError as error:
                return {"error": f"latency: {error}"}
            _write(self.folder / STRUCTURES, known)
        return known[key]

    def of_contenders(self, files: Mapping[str, Path], workers: Workers) -> Mapping[str, Row]:
        """Measure proxies that may or may not be fast enough run by run, unless that was done.

        Alone, one after the other, two structures can be out by a tenth of each other on some machines.

        Args:
            files: Paths of the proxies by SHA-256; a search that has ended holds none of them any more.
            workers: Where they are timed.

        Returns:
            As `trial.time_together`, by SHA-256, of those that were measured so.

        Raises:
            CompressError: onnxruntime refuses a model.
        """
        known = _read(self.folder / CONTENDERS)
        there = {sha: str(file) for sha, file in files.items() if file.exists()}
        if len(there) > 1 and there.keys() - known.keys():
            known |= self._together(there, 2 * self.seconds, workers)
            _write(self.folder / CONTENDERS, known)
        return known

    def of_front(
        self, files: Mapping[str, str], hashes: Mapping[str, str], workers: Workers
    ) -> Mapping[str, Row]:
        """Measure results run by run, unless that was done.

        Args:
            files: Paths of the results by name.
            hashes: SHA-256 of the results by name.
            workers: Where they are timed.

        Returns:
            As `trial.time_together`.

        Raises:
            CompressError: onnxruntime refuses a model.
        """
        known = _read(self.folder / FRONT)
        if known.get("files") != hashes:
            known = {"files": hashes, "rows": self._together(files, 5 * self.seconds, workers)}
            _write(self.folder / FRONT, known)
        rows: Mapping[str, Row] = known["rows"]
        return rows

    def _together(self, files: Mapping[str, str], seconds: float, workers: Workers) -> dict[str, Row]:
        """Time results with the model, for so many seconds each."""
        limit = seconds * (len(files) + 1)
        return workers.run_alone(
            partial(time_together, self.model, files, self.gates, limit, self._clock())
        )

    def _structures(self) -> dict[str, Row]:
        return _read(self.folder / STRUCTURES)

    def _clock(self) -> Clock:
        """The clock to begin with: where the wall's was too noisy once, it is not tried again."""
        clocks = {row.get("clock") for row in self._structures().values()}
        return "processor" if "processor" in clocks else "wall"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, values: object) -> None:
    write_bytes(path, json.dumps(values, indent=2).encode())
