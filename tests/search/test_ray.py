"""Sweeps on a Ray cluster of three nodes of this machine: results as here, and none lost with a node."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from onnxcompress.cli.main import main
from onnxcompress.errors import ModelError, RuntimeUnavailable
from onnxcompress.evaluation.gates import Gates
from onnxcompress.pipeline.cache_keys import model_file_digest
from onnxcompress.search.plan import Plan, read_plan
from onnxcompress.search.ray_workers import LATENCY, Part, RayWorkers, carry_out, files_of, placed
from onnxcompress.search.results import Results
from onnxcompress.search.sweep import sweep
from onnxcompress.search.trial import time_result
from onnxcompress.search.workers import InProcess

ray = pytest.importorskip("ray")

NET = "resnet20-fashion.onnx"


def plan_of(folder: Path, models: Path, runs: int, seconds: float = 0) -> Plan:
    shutil.copy(models / NET, folder / NET)
    text = "variables: {seed: 0}\npasses:\n  - fold-bn\n  - fp16: {seed: '${seed}'}"
    (folder / "half.yaml").write_text(text)
    text = f"models: [{NET}]\nrecipes: [half.yaml]\nvariables: {{seed: {list(range(runs))}}}"
    (folder / "plan.yaml").write_text(f"{text}\nlatency_seconds: {seconds:g}")
    return read_plan(folder / "plan.yaml")


def test_a_task_names_its_files(tmp_path: Path, models: Path) -> None:
    trial = plan_of(tmp_path, models, 1).trials[0]
    assert files_of((trial, "no-such-file")) == [str(tmp_path / NET)]


def test_a_file_is_where_it_was_or_a_copy_of_its_content(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxcompress.model.tensor_storage import file_digest

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    content = (models / NET).read_bytes()
    parts = [Part(NET, file_digest(models / NET), content)]
    assert placed(str(models / NET), parts, lambda ref: b"") == str(models / NET)
    (tmp_path / NET).write_bytes(b"another file of this name")
    copy = Path(placed(str(tmp_path / NET), parts, lambda ref: ref))
    assert copy.name == NET
    assert copy.read_bytes() == content
    monkeypatch.setattr(ray, "get", lambda ref: ref)
    call: partial[list[str]] = partial(files_of, (str(tmp_path / "gone" / NET), 3))
    assert carry_out(call, {str(tmp_path / "gone" / NET): parts}) == [str(copy)]


@pytest.mark.parametrize("gone", ["all", "weights"])
def test_a_model_is_sent_with_its_external_data(
    gone: str, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside other weights of the same name, too: the ONNX files of two such models can be equal."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    folder = tmp_path / "sent"
    (folder / "parts").mkdir(parents=True)
    onnx.save(onnx.load(models / NET), folder / NET, save_as_external_data=True, location="parts/w.bin")
    sender = object.__new__(RayWorkers)  # without a cluster
    sender._ray, sender._sent = SimpleNamespace(put=bytes), {}
    parts, whole = sender._send(str(folder / NET)), model_file_digest(folder / NET)
    assert [part.place for part in parts] == [NET, "parts/w.bin"]
    if gone == "all":
        shutil.rmtree(folder)
    else:
        (folder / "parts/w.bin").write_bytes(bytes((folder / "parts/w.bin").stat().st_size))
    copy = placed(str(folder / NET), parts, lambda ref: ref)
    assert copy != str(folder / NET)
    assert model_file_digest(Path(copy)) == whole


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that is reserved for latency, and two nodes with a CPU each."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "resources": {LATENCY: 1}, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture
def workers(cluster: Any) -> Iterator[RayWorkers]:
    opened = RayWorkers(cluster.address)
    yield opened
    opened.close()


@pytest.mark.slow
def test_latency_is_timed_on_the_reserved_node(workers: RayWorkers, models: Path) -> None:
    assert workers.jobs == 2
    assert workers.run_alone(partial(reserved)) == 1
    with pytest.raises(ModelError):
        workers.run_alone(partial(time_result, str(models / NET), __file__, Gates(), 1.0))


def reserved() -> float:
    """Amount of the resource that the task has."""
    return float(ray.get_runtime_context().get_assigned_resources()[LATENCY])


@pytest.mark.slow
def test_the_command_runs_on_a_cluster(cluster: Any, tmp_path: Path, models: Path) -> None:
    plan_of(tmp_path, models, 1, seconds=0.5)
    call = ["sweep", str(tmp_path / "plan.yaml"), str(tmp_path / "t.jsonl"), "--cache", "none"]
    assert main([*call, "--ray", cluster.address, "--task-cpus", "0.5", "--quiet"]) == 0
    row = json.loads((tmp_path / "t.jsonl").read_text())
    assert row["status"] == "done"
    assert row["ratio"] > 0
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_killed_node_costs_no_result(
    cluster: Any, workers: RayWorkers, tmp_path: Path, models: Path
) -> None:
    plan = plan_of(tmp_path, models, 6, seconds=0.5)
    local = sweep(plan, Results(tmp_path / "local"), InProcess())
    nodes = list(cluster.nodes)

    def kill(rows: list[dict[str, Any]]) -> None:
        if nodes and any(row["status"] == "done" for row in rows):
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            nodes.clear()

    rows = sweep(plan, Results(tmp_path / "cluster"), workers, report=kill)
    assert nodes == []
    assert [row["status"] for row in rows] == ["done"] * 6
    assert [row["sha256"] for row in rows] == [row["sha256"] for row in local]
    assert all(row["ratio"] > 0 for row in rows)


def test_without_a_cluster_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**options: Any) -> None:
        raise ConnectionError("nobody\nthere")

    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(RuntimeUnavailable, match="--ray auto: no cluster answers"):
        RayWorkers("auto")
