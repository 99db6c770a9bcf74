"""Results as runs of an MLflow experiment, on the server or in the folder that MLFLOW_TRACKING_URI names.

A result is one run: what made it as parameters, its figures as metrics, its model card as an artifact. A
result that was logged before is known by its name and hash, and is not logged twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnxcompress.errors import RuntimeUnavailable, one_line, require
from onnxcompress.search.results import FIGURES
from onnxcompress.search.trial import Row

RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
"""MLflow's variable; by its own default it waits four minutes for a server that is not there."""
RESULT = "onnxcompress.result"
"""Tag by which a result is found again."""


class Tracker:
    """Logs results to an experiment."""

    def __init__(self, experiment: str) -> None:
        """Look for the experiment: a server that does not answer is an error before the work.

        Args:
            experiment: Its name; it is created with the first result.

        Raises:
            RuntimeUnavailable: MLflow is not installed, or what it writes to cannot be used.
        """
        require("--mlflow", "mlflow")
        os.environ.setdefault(RETRIES, "2")
        from mlflow import MlflowClient

        self._name = experiment
        with self._errors():
            self._client = MlflowClient()
            known = self._client.get_experiment_by_name(experiment)
        self._id: str | None = known and known.experiment_id

    def log(self, rows: Sequence[Row]) -> None:
        """Log results that have a file, each once.

        Args:
            rows: Figures of results, with what made them.

        Raises:
            RuntimeUnavailable: What MLflow writes to cannot be used.
        """
        made = [row for row in rows if row.get("output")]
        with self._errors():
            if made and self._id is None:
                self._id = self._client.create_experiment(self._name)
            for row in made:
                self._log(row, str(self._id))

    def _log(self, row: Row, experiment: str) -> None:
        from mlflow.entities import Metric, Param

        output, client = Path(row["output"]), self._client
        tag = f"{output.stem} {row['sha256']}"
        if client.search_runs([experiment], f"tags.`{RESULT}` = '{tag}'", max_results=1):
            return
        now = int(1000 * time.time())
        metrics = [Metric(name, float(row[name]), now, 0) for name in row if _is_number(row[name])]
        words = [name for name in row if not _is_number(row[name]) and row[name] not in (None, "", [])]
        params = [Param(name, str(row[name])) for name in words if name not in FIGURES or name == "device"]
        run = client.create_run(experiment, run_name=output.stem, tags={RESULT: tag}).info.run_id
        client.log_batch(run, metrics=metrics, params=params)
        card = output.with_suffix(".md")
        if card.exists():
            client.log_artifact(run, str(card))
        client.set_terminated(run)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            raise RuntimeUnavailable(f"--mlflow {self._name}: {one_line(error)}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
