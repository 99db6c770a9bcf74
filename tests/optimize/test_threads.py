"""Threads: as many as cores are to be had, none that spins while it waits, none within another's job."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import onnx
import pytest

from onnxcompress.runtime import cores
from onnxcompress.runtime.cores import available_cores, prepare_threads
from onnxcompress.runtime.session import session

torch = pytest.importorskip("torch")

from onnxcompress.optimize.deterministic_threads import in_turn, one_thread_each, run_jobs, worker_count  # noqa: E402

More = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the system says of an idle machine of eight cores, without limits."""
    (tmp_path / "loadavg").write_text("0.10 0.50 0.90 1/300 4711\n")
    (tmp_path / "cgroup").write_text("0::/\n")
    monkeypatch.setattr(cores, "LOAD", tmp_path / "loadavg")
    monkeypatch.setattr(cores, "PROCESS_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(cores, "_affinity", lambda: 8)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_an_idle_machine_is_all_ours(machine: Path) -> None:
    assert available_cores() == 8


def test_cores_outside_the_affinity_are_not_ours(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_affinity", lambda: 3)
    assert available_cores() == 3


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ("3.2 1.0 1.0 4/300 9", 5),  # busy for a minute, and now
        ("3.2 1.0 1.0 1/300 9", 8),  # what kept it busy has ended
        ("0.0 1.0 1.0 7/300 9", 8),  # a moment's work
        ("40.0 1.0 1.0 50/300 9", 1),
        ("nonsense", 8),
    ],
)
def test_cores_that_others_keep_busy_are_left_to_them(load: str, expected: int, machine: Path) -> None:
    (machine / "loadavg").write_text(load)
    assert available_cores() == expected


@pytest.mark.parametrize("folder", ["groups/ours/inner", "groups/ours", "groups"])
def test_a_quota_of_version_2_counts_wherever_it_lies_above(folder: str, machine: Path) -> None:
    (machine / "cgroup").write_text("0::/ours/inner\n")
    write(machine / "groups/cpu.max", "max 100000\n")
    write(machine / folder / "cpu.max", "250000 100000\n")
    assert available_cores() == 2


@pytest.mark.parametrize(("inner", "outer"), [(6, 3), (3, 6)])
def test_of_several_quotas_the_least_counts(inner: int, outer: int, machine: Path) -> None:
    (machine / "cgroup").write_text("0::/ours/inner\n")
    for folder, number in (("groups/ours/inner", inner), ("groups/ours", outer)):
        write(machine / folder / "cpu.max", f"{number}00000 100000\n")
    assert available_cores() == 3


@pytest.mark.parametrize(("quota", "expected"), [("150000", 1), ("400000", 4), ("-1", 8)])
def test_a_quota_of_version_1_counts(quota: str, expected: int, machine: Path) -> None:
    (machine / "cgroup").write_text("5:memory:/other\n4:cpu,cpuacct:/docker/abc\n")
    write(machine / "groups/cpu/cpu.cfs_quota_us", quota)  # inside a container it is the root
    write(machine / "groups/cpu/cpu.cfs_period_us", "100000")
    assert available_cores() == expected


def test_a_users_own_number_of_threads_wins(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    environment = {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "ACTIVE"}
    prepare_threads(environment)
    assert (environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]) == ("5", "ACTIVE")
    environment = {}
    prepare_threads(environment)
    assert (environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]) == ("8", "PASSIVE")


def test_once_torch_is_loaded_the_environment_stays() -> None:
    environment: dict[str, str] = {}
    prepare_threads(environment)
    assert environment == {}


def test_the_command_line_prepares_threads_and_an_import_does_not() -> None:
    code = (
        "import os; before = dict(os.environ)\n"
        "import onnxcompress, onnxcompress.cli.main\n"
        "assert dict(os.environ) == before\n"
        "onnxcompress.cli.main.main(['--version'])\n"
        "print(os.environ['GOMP_SPINCOUNT'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"


def test_jobs_run_beside_each_other_each_with_one_thread_of_torch(more_threads: More) -> None:
    both = threading.Barrier(2)

    def job(index: int) -> tuple[int, int]:
        both.wait(timeout=60)
        return index, torch.get_num_threads()

    with more_threads():
        before = torch.get_num_threads()
        assert list(in_turn(job, 4)) == [(index, 1) for index in range(4)]
        assert torch.get_num_threads() == before


def test_a_job_starts_no_jobs_on_other_threads(more_threads: More) -> None:
    def outer(_: int) -> set[int]:
        return {threading.get_ident(), *in_turn(lambda _: threading.get_ident(), 3)}

    with more_threads(), one_thread_each():
        assert all(len(threads) == 1 for threads in in_turn(outer, 3))


def test_operators_of_a_pass_have_one_thread_and_its_jobs_the_others(more_threads: More) -> None:
    with more_threads():
        threads = torch.get_num_threads()
        with one_thread_each(), one_thread_each():
            assert (torch.get_num_threads(), worker_count()) == (1, threads)


def test_no_more_jobs_are_under_way_than_there_are_threads(more_threads: More) -> None:
    started: list[int] = []
    with more_threads():
        results = in_turn(started.append, 50)
        next(results)
        results.close()
    assert len(started) <= 2 * 2


def test_a_jobs_error_is_the_callers(more_threads: More) -> None:
    def job(index: int) -> int:
        return 1 // (2 - index)

    with more_threads():
        results = in_turn(job, 4)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_gradients_are_recorded_in_a_job_whatever_the_number_of_threads(more_threads: More) -> None:
    def job(_: int) -> bool:
        return bool(torch.is_grad_enabled())

    with torch.no_grad():
        assert list(in_turn(job, 2)) == [True, True]
        with more_threads():
            assert list(in_turn(job, 2)) == [True, True]


@pytest.fixture
def relu() -> onnx.ModelProto:
    return onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N,3] x) => (float[N,3] y) {y = Relu(x)}"""
    )


def test_threads_of_onnxruntime_spin_only_where_it_is_timed(relu: onnx.ModelProto) -> None:
    key = "session.intra_op.allow_spinning"
    options = session(relu, provider="cpu").get_session_options()
    assert options.get_session_config_entry(key) == "0"
    options = session(relu, provider="cpu", timed=True).get_session_options()
    with pytest.raises(RuntimeError):
        options.get_session_config_entry(key)


def test_jobs_are_asked_for_when_a_thread_is_free(more_threads: More) -> None:
    """What a job that waits holds is in memory: no more jobs are there than threads."""
    asked: list[int] = []

    def jobs() -> Iterator[Callable[[], int]]:
        for index in range(9):
            asked.append(index)
            yield partial(int, index)

    with more_threads():
        results = run_jobs(jobs())
        assert [next(results), next(results)] == [0, 1]
        assert len(asked) <= 2 + worker_count()
        assert list(results) == list(range(2, 9))


@pytest.mark.parametrize("count", [1, 3])
def test_a_context_may_say_how_many_threads_jobs_have(count: int) -> None:
    gate = threading.Barrier(count, timeout=10)
    with one_thread_each(count):
        assert worker_count() == count
        assert list(in_turn(lambda index: gate.wait() >= 0 and index, count)) == list(range(count))


def test_several_threads_may_run_an_executor_that_has_planned_nothing(more_threads: More) -> None:
    from onnxcompress.model import Model
    from onnxcompress.optimize.executor import Executor

    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N,3] x) => (float[N,3] y) {
        r = Relu(x) s = Neg(r) y = Add(r, s)}"""
    executor = Executor.from_model(Model.from_proto(onnx.parser.parse_model(text)))
    x = torch.randn(64, 3)
    with more_threads():
        made = executor.run_batched({"x": x}, ["s", "y"], count=64, batch=1)
    assert torch.equal(made["s"], -x.clamp_min(0))
    assert not made["y"].any()
