"""Sweeps: which runs a plan stands for, what is done again, and what a failure or a dead worker costs."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from onnxcompress.cli.main import main
from onnxcompress.cli.worker_options import workers
from onnxcompress.errors import InputError, OptionError
from onnxcompress.search.plan import Plan, read_plan
from onnxcompress.search.results import FIGURES, Results, write_table
from onnxcompress.search.sweep import preview, sweep
from onnxcompress.search.trial import Result, Row, Trial, compress
from onnxcompress.search.workers import InProcess, Processes, WorkerDied
from tests.helpers.paths import ROOT

NET, OTHER = "resnet20-fashion.onnx", "mobilenetv2-fashion.onnx"
FOLD = "passes: [fold-bn]"
FAILS = "passes:\n  - drop-blocks: {drop: [no-such-block], inputs: procedural, synthetic: 8}"


@pytest.fixture
def folder(tmp_path: Path, models: Path) -> Path:
    """A folder with both networks and three recipes, the last of which fails on any model."""
    for name in (NET, OTHER):
        shutil.copy(models / name, tmp_path / name)
    write(tmp_path / "fold.yaml", FOLD)
    write(tmp_path / "both.yaml", "variables: {seed: 0}\npasses:\n  - fold-bn\n  - fp16: {seed: '${seed}'}")
    write(tmp_path / "fails.yaml", FAILS)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def plan_of(folder: Path, text: str) -> Plan:
    return read_plan(write(folder / "plan.yaml", text))


def run(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    return sweep(plan, Results(folder / "results"), InProcess())


def test_a_plan_is_the_product_of_models_recipes_and_the_values_that_a_recipe_takes(folder: Path) -> None:
    plan = plan_of(
        folder,
        f"models: [{NET}, {OTHER}: {{seed: 7}}]\nrecipes: [fold.yaml, both.yaml]\n"
        "variables: {seed: [1, 2]}",
    )
    found = [(Path(t.model).name, Path(t.labels["recipe"]).stem, t.labels.get("seed")) for t in plan.trials]
    assert found == [
        (NET, "fold", None),
        (NET, "both", "1"),
        (NET, "both", "2"),
        (OTHER, "fold", None),
        (OTHER, "both", "7"),
    ]
    seeds = [getattr(p, "seed", None) for t in plan.trials for p in t.recipe.passes if p.name == "fp16"]
    assert seeds == [1, 2, 7]
    assert plan.variables == ("seed",)


def test_runs_of_models_with_one_file_name_get_files_of_their_own(folder: Path) -> None:
    (folder / "sub").mkdir()
    shutil.copy(folder / NET, folder / "sub" / NET)
    plan = plan_of(folder, f"models: [{NET}, sub/{NET}, {NET}]\nrecipes: [fold.yaml]")
    assert len(plan.trials) == len({t.name for t in plan.trials}) == 2


def test_paths_in_values_are_relative_to_the_plan(folder: Path, models: Path) -> None:
    shutil.copy(models / "fashion-tiny.npz", folder / "tiny.npz")
    (folder / "recipes").mkdir()
    write(folder / "recipes" / "r.yaml", "passes:\n  - fp16: {images: '${images}'}")
    plan = plan_of(folder, f"models: [{NET}]\nrecipes: [recipes/r.yaml]\nvariables: {{images: tiny.npz}}")
    assert plan.trials[0].recipe.passes[0].options()["images"] == str(folder / "tiny.npz")


def test_the_shipped_plans_can_be_carried_out(models: Path) -> None:
    plans = sorted((models / "plans").glob("*.yaml"))
    assert plans
    for path in plans:
        assert all(row["status"] == "waiting" for row in preview(read_plan(path), None))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (f"models: [{NET}]\nrecipes: [fold.yaml]\nvariable: 1", 3, "did you mean 'variables'"),
        (f"models: [{NET}]\nrecipes: [both.yaml]\nvariables: {{sed: 1}}", 3, "did you mean 'seed'"),
        ("models: []\nrecipes: [fold.yaml]", 1, "list of ONNX files"),
        (f"models: [{NET}]\nrecipes: fold.yaml", 2, "list of files"),
        (f"models: [{NET}]\nrecipes: [both.yaml]\nvariables: {{seed: []}}", 3, "values to try"),
        (f"models: [{NET}]\nrecipes: [fold.yaml]\nlatency_seconds: soon", 3, "expected seconds"),
        (
            f"models: [{NET}]\nrecipes: [fold.yaml]\ngates: {{min_speedup: 1}}\nlatency_seconds: 0",
            4,
            "min_speedup",
        ),
        (f"models: [{NET}]\nrecipes: [fold.yaml]\ngates: {{min_agreement: x}}", 3, "min_agreement"),
    ],
)
def test_an_error_names_the_line(folder: Path, text: str, line: int, message: str) -> None:
    with pytest.raises(OptionError, match=rf"plan\.yaml:{line}: .*{message}"):
        plan_of(folder, text)


def test_a_model_that_is_not_there_is_named_before_anything_runs(folder: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.onnx: no such file"):
        plan_of(folder, "models: [gone.onnx]\nrecipes: [fold.yaml]")


def test_a_failure_is_listed_and_the_others_are_done(folder: Path) -> None:
    plan = plan_of(
        folder,
        f"models: [{NET}, {OTHER}]\nrecipes: [fails.yaml, fold.yaml]\nlatency_seconds: 0",
    )
    rows = run(plan, folder)
    assert [row["status"] for row in rows] == ["failed", "done", "failed", "done"]
    assert all("no-such-block" in row["error"] for row in rows[::2])
    assert all(Path(row["output"]).stat().st_size == row["bytes"] for row in rows[1::2])


@pytest.mark.slow
def test_what_is_done_is_done_again_only_where_it_depends_on_what_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def counting(trial: Trial, cache: str | None) -> Result:
        ran.append(f"{Path(trial.model).stem} {Path(trial.labels['recipe']).stem}")
        return compress(trial, cache)

    monkeypatch.setattr("onnxcompress.search.sweep.compress", counting)
    text = f"models: [{NET}, {OTHER}]\nrecipes: [fold.yaml, both.yaml]\nlatency_seconds: 0"

    def again(text: str = text) -> set[str]:
        ran.clear()
        rows = run(plan_of(folder, text), folder)
        assert {row["status"] for row in rows} <= {"done", "missed"}
        return set(ran)

    resnet, mobilenet = Path(NET).stem, Path(OTHER).stem
    assert len(again()) == 4
    assert again() == set()
    assert again(f"{text}\ngates: {{max_size: 0.1}}") == set()  # a limit judges, and changes nothing
    shutil.copy(folder / OTHER, folder / NET)
    assert again() == {f"{resnet} fold", f"{resnet} both"}
    write(folder / "fold.yaml", "passes: [fold-bn, equalize]")
    assert again() == {f"{resnet} fold", f"{mobilenet} fold"}
    (folder / "results" / f"{mobilenet}-both.onnx").write_bytes(b"damaged")
    assert again() == {f"{mobilenet} both"}


def test_a_table_has_the_same_content_in_each_format(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow.parquet")
    columns = ["model", *FIGURES]
    rows: list[Row] = [
        {"model": "a,b", "status": "done", "bytes": 3, "ratio": 0.5},
        {"model": "c", "status": "failed"},
    ]
    for suffix in (".csv", ".jsonl", ".parquet"):
        write_table(tmp_path / f"t{suffix}", columns, rows)
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert lines == [{name: row.get(name) for name in columns} for row in rows]
    assert pyarrow.read_table(tmp_path / "t.parquet").to_pylist() == lines
    with (tmp_path / "t.csv").open() as file:
        texts = list(csv.DictReader(file))
    assert texts == [{n: "" if v is None else str(v) for n, v in line.items()} for line in lines]


def die() -> None:
    os._exit(9)


def test_an_interrupt_says_that_the_same_command_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), workers(None, None, None, None):
        raise KeyboardInterrupt
    assert "the same command goes on" in capsys.readouterr().err


def test_a_worker_that_dies_costs_its_task_alone() -> None:
    calls: list[Any] = [partial(abs, -1), die, partial(abs, -2), partial(abs, -3)]
    found = dict(Processes(2).run(calls))
    assert isinstance(found.pop(1), WorkerDied)
    assert found == {0: 1, 2: 2, 3: 3}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_process_is_kept_for_the_next_task_unless_it_was_killed() -> None:
    """What it has loaded, such as the scores of the model before, is there for all trials of a search."""
    own = Processes(1)

    def process() -> int:
        ((_, found),) = own.run([partial(os.getpid)])
        assert isinstance(found, int)
        return found

    first = process()
    assert process() == first != os.getpid()
    (killed,) = own._idle
    os.kill(first, signal.SIGTERM)
    assert within(60, lambda: bool(killed._broken))
    assert process() != first
    (left,) = own._idle
    own.close()
    assert not own._idle
    with pytest.raises(RuntimeError):
        left.submit(os.getpid)


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Else each killed sweep would leave processes that go on for minutes."""
    told = tmp_path / "pid"
    code = (
        "from functools import partial\n"
        "from onnxcompress.search.workers import Processes\n"
        "from tests.search.test_sweep import stay\n"
        f"if __name__ == '__main__': list(Processes(1).run([partial(stay, {str(told)!r})]))"
    )
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        assert within(120, told.exists)
    finally:
        parent.kill()
        parent.wait()
    worker = int(told.read_text())
    assert within(60, lambda: not is_alive(worker))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def stay(path: str) -> None:
    partly = Path(path).with_suffix(".partly")
    partly.write_text(str(os.getpid()))
    partly.rename(path)
    time.sleep(600)


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Whether something comes true before the test gives up; nothing is timed."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


@pytest.mark.parametrize("option", [["--task-cpus", "2"], ["--jobs", "0"], ["--models", NET]])
def test_a_wrong_option_is_refused_before_anything_runs(
    option: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    write(folder / "plan.yaml", f"models: [{NET}]\nrecipes: [fold.yaml]\nlatency_seconds: 0")
    assert main(["sweep", "plan.yaml", "t.csv", *option]) == 2
    assert not (folder / "t.csv").exists()


@pytest.mark.slow
def test_the_command_has_a_table_and_an_exit_code(
    folder: Path, fixed_clock: Callable[..., None], capsys: pytest.CaptureFixture[str], models: Path
) -> None:
    fixed_clock([4.0, 2.0])
    images = models / "fashion-test2k.npz"
    plan = f"models: [{NET}]\nlatency_seconds: 1\nrecipes: "
    gates = f"\ngates: {{images: {images}, max_size: "

    def call(text: str, *more: str) -> tuple[int, Counter[str]]:
        write(folder / "plan.yaml", plan + text)
        code = main(["sweep", str(folder / "plan.yaml"), str(folder / "t.csv"), "--json", *more])
        return code, Counter(json.loads(capsys.readouterr().out)["counts"])

    assert call("[fold.yaml, fails.yaml]", "--dry-run") == (0, Counter(waiting=2))
    assert not (folder / "t.csv").exists()
    assert call("[fold.yaml, fails.yaml]") == (1, Counter(done=1, failed=1))
    assert call(f"[fold.yaml]{gates}9}}") == (0, Counter(done=1))
    assert call(f"[fold.yaml]{gates}0.1}}") == (3, Counter(missed=1))
    with (folder / "t.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["agreement"], row["status"]) == ("1.0", "missed")
    assert (row["latency_ms"], row["ratio"]) == ("2.0", "0.5")
    card = Path(row["output"]).with_suffix(".md").read_text("utf-8")
    for text in ("1. `fold-bn`", "2.00 (95 % interval", "MISSED: ", row["sha256"], "`fold.yaml`"):
        assert text in card


def test_a_table_of_no_known_format_is_refused_first(folder: Path) -> None:
    write(folder / "plan.yaml", f"models: [{NET}]\nrecipes: [fold.yaml]")
    assert main(["sweep", str(folder / "plan.yaml"), str(folder / "t.xls")]) == 2


def test_a_model_that_broke_after_its_run_is_a_failure_alone(folder: Path) -> None:
    plan = plan_of(folder, f"models: [{NET}, {OTHER}]\nrecipes: [fold.yaml]\nlatency_seconds: 0")
    run(plan, folder)
    (folder / NET).write_bytes(b"\x08")
    assert [row["status"] for row in run(plan, folder)] == ["failed", "done"]


def test_a_defect_is_a_failure_of_its_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("onnxcompress.model.model_like.model_bytes", broken)
    plan = plan_of(folder, f"models: [{NET}]\nrecipes: [fold.yaml]\nlatency_seconds: 0")
    (row,) = run(plan, folder)
    assert (row["status"], row["error"]) == ("failed", "ZeroDivisionError: a defect")
