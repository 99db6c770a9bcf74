"""Results as runs of MLflow: what is logged, once, and what is said where it cannot be."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from onnxcompress.cli.main import main
from onnxcompress.errors import RuntimeUnavailable
from onnxcompress.search.tracking import RETRIES, Tracker


class Refused(Exception):
    """Stands for an error of MLflow."""


class Server:
    """Stands for MLflow: keeps runs by their tags."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.broken = False

    def get_experiment_by_name(self, name: str) -> Any:
        if self.broken:
            raise Refused("no\nanswer")
        found = self.experiments.get(name)
        return found and SimpleNamespace(experiment_id=found)

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = f"{len(self.experiments)}"
        return self.experiments[name]

    def search_runs(self, experiments: list[str], where: str, max_results: int) -> list[str]:
        return [key for key, run in self.runs.items() if where.endswith(f"'{run['tag']}'")]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        key = f"run {len(self.runs)}"
        self.runs[key] = {"experiment": experiment, "name": run_name, "tag": "".join(tags.values())}
        return SimpleNamespace(info=SimpleNamespace(run_id=key))

    def log_batch(self, run: str, metrics: Sequence[Any], params: Sequence[Any]) -> None:
        self.runs[run] |= {"metrics": {m[0]: m[1] for m in metrics}, "params": dict(params)}

    def log_artifact(self, run: str, file: str) -> None:
        self.runs[run]["card"] = Path(file).read_text()

    def set_terminated(self, run: str) -> None:
        self.runs[run]["ended"] = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """MLflow, without the package."""
    made = Server()
    parts: dict[str, dict[str, Any]] = {
        "mlflow": {"MlflowClient": lambda: made, "__spec__": SimpleNamespace()},
        "mlflow.entities": {"Metric": lambda *values: values, "Param": lambda *values: values},
        "mlflow.exceptions": {"MlflowException": Refused},
    }
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_a_result_is_logged_once_with_what_made_it_its_figures_and_its_card(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "a.md").write_text("# a")
    row: dict[str, Any] = {
        "model": "net.onnx",
        "blocks": "2",
        "status": "done",
        "output": str(tmp_path / "a.onnx"),
    }
    row |= {"sha256": "12ab", "bytes": 10, "ratio": 0.5, "picked": True, "device": "cpu", "dropped": []}
    failed = {"model": "net.onnx", "blocks": "3", "status": "failed", "error": "no"}
    for _ in range(2):  # a sweep that goes on
        Tracker("first").log([row, failed])
    assert server.runs == {
        "run 0": {
            "experiment": "0",
            "name": "a",
            "tag": "a 12ab",
            "metrics": {"bytes": 10.0, "ratio": 0.5},
            "params": {"model": "net.onnx", "blocks": "2", "picked": "True", "device": "cpu"},
            "card": "# a",
            "ended": True,
        }
    }
    Tracker("first").log([row | {"sha256": "34cd"}])
    assert len(server.runs) == 2
    assert server.experiments == {"first": "0"}


def test_a_server_that_does_not_answer_is_one_line(server: Server) -> None:
    server.broken = True
    with pytest.raises(RuntimeUnavailable, match="--mlflow first: no answer"):
        Tracker("first")


@pytest.mark.parametrize(("given", "used"), [(None, "2"), ("5", "5")])
def test_a_server_that_is_not_there_is_asked_for_seconds(
    given: str | None, used: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By MLflow's own default four minutes; a user's own number of attempts stays."""
    monkeypatch.setenv(RETRIES, given or "")
    if given is None:
        monkeypatch.delenv(RETRIES)
    Tracker("first")
    assert os.environ[RETRIES] == used


def test_without_a_result_no_experiment_is_created(server: Server) -> None:
    """As with --dry-run, which checks and changes nothing."""
    Tracker("first").log([{"model": "net.onnx", "status": "failed", "error": "no"}])
    assert not server.experiments


@pytest.mark.parametrize("command", ["search", "sweep"])
def test_without_mlflow_nothing_is_begun(
    command: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "mlflow" else find(name)
    )
    plan = tmp_path / "plan.yaml"
    net = models / "resnet20-fashion.onnx"
    (tmp_path / "fold.yaml").write_text("passes: [fold-bn]")
    plan.write_text(f"models: [{net}]\nrecipes: [fold.yaml]")
    call = {
        "search": [str(net), "--out", str(tmp_path / "o")],
        "sweep": [str(plan), str(tmp_path / "t.csv")],
    }
    assert main([command, *call[command], "--mlflow", "first"]) == 1
    assert "--mlflow needs mlflow, which is not installed here" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "t.csv").exists()
