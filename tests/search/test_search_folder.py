"""What search and sweep find in their folders: other images, other files, another process, a broken end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxcompress.cli.main import main
from onnxcompress.errors import CompressError, InputError, OptionError
from onnxcompress.evaluation.gates import Gates
from onnxcompress.search import results as written
from onnxcompress.search import search as searching
from onnxcompress.search.question import Search, alone, claim
from onnxcompress.search.results import Results
from onnxcompress.search.search import search
from onnxcompress.search.sweep import preview, sweep
from onnxcompress.search.trial import Result, Row, Trial, compress
from onnxcompress.search.workers import InProcess
from tests.search import test_search, test_sweep

optuna = pytest.importorskip("optuna")
quick, folder = test_search.quick, test_sweep.folder
NET, OTHER, plan_of, write = test_sweep.NET, test_sweep.OTHER, test_sweep.plan_of, test_sweep.write


def asked_of(models: Path, tmp_path: Path, **more: Any) -> Search:
    return Search(str(models / NET), tmp_path / "out", trials=2, repairs=1, **more)


# a search


@pytest.mark.parametrize("which", ["gates", "inputs"])
def test_other_images_under_the_same_name_are_another_question(
    which: str, quick: list[str], models: Path, tmp_path: Path
) -> None:
    archive, file = np.load(models / "fashion-test2k.npz"), tmp_path / "some.npz"
    np.savez(file, x=archive["x"][:8], y=archive["y"][:8])
    images: dict[str, Any] = {"gates": Gates(images=str(file)), "inputs": {"images": str(file)}}
    more = {which: images[which]}
    claim(asked_of(models, tmp_path, **more))
    claim(asked_of(models, tmp_path, **more))
    np.savez(file, x=archive["x"][8:16], y=archive["y"][8:16])
    with pytest.raises(OptionError, match="other limits, inputs or images"):
        claim(asked_of(models, tmp_path, **more))


def test_images_that_judge_are_read_anew_where_they_changed(models: Path, tmp_path: Path) -> None:
    archive, file = np.load(models / "fashion-test2k.npz"), tmp_path / "some.npz"
    shutil.copy(models / NET, tmp_path / NET)
    (trial,) = plan_of_fold(tmp_path, file, archive["x"][:8], archive["y"][:8])
    assert compress(trial).row["inputs"] == "8 images"
    (trial,) = plan_of_fold(tmp_path, file, archive["x"][:4], archive["y"][:4])
    assert compress(trial).row["inputs"] == "4 images"


def plan_of_fold(folder: Path, file: Path, x: np.ndarray, y: np.ndarray) -> tuple[Trial, ...]:
    np.savez(file, x=x, y=y)
    write(folder / "fold.yaml", test_sweep.FOLD)
    return plan_of(folder, f"models: [{NET}]\nrecipes: [fold.yaml]\ngates: {{images: {file}}}").trials


def test_one_process_searches_a_folder(quick: list[str], models: Path, tmp_path: Path) -> None:
    asked = asked_of(models, tmp_path)
    claim(asked)
    with alone(asked), pytest.raises(OptionError, match="another search is at work here"):
        search(asked, InProcess())
    search(asked, InProcess())


def test_a_folder_work_of_something_else_is_left_alone(models: Path, tmp_path: Path) -> None:
    asked = asked_of(models, tmp_path)
    (asked.work / "proxies").mkdir(parents=True)
    (asked.work / "proxies/mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="'proxies', and no search"):
        claim(asked)


def test_a_dry_run_sees_what_the_search_would_refuse(
    quick: list[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert main(["search", str(models / NET), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "'mine.txt', and no search" in capsys.readouterr().err
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_where_all_failed_all_is_tried_again(
    quick: list[str], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker may have died for want of memory."""
    asked = asked_of(models, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(searching, "compress", lambda trial, cache: Result({"error": "no memory"}))
        with pytest.raises(CompressError, match="none of 2 candidates could be made, the first: no memory"):
            search(asked, InProcess())
    assert len(search(asked, InProcess()).proxies) == 2


def test_an_unfinished_line_and_a_left_lock_do_not_stop_a_search(
    quick: list[str], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk was full, or the process killed while it wrote; with a relative folder, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("optuna.storages.journal._file.LOCK_GRACE_PERIOD", 1, raising=False)
    asked = Search(str(models / NET), Path("out"), trials=2, repairs=1)
    search(asked, InProcess())
    journal = asked.work / "study.journal"
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 4, "wor')
    assert len(search(replace(asked, trials=3), InProcess()).proxies) == 3


def test_what_cannot_be_compared_is_no_result_without_a_loss(
    quick: list[str], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs that are indices of classes, say."""
    working: Callable[[Trial, str | None], Result] = vars(searching)["compress"]

    def unmeasured(trial: Trial, cache: str | None) -> Result:
        found = working(trial, cache)
        return Result({k: v for k, v in found.row.items() if k != "noise"}, found.files)

    monkeypatch.setattr(searching, "compress", unmeasured)
    with pytest.raises(CompressError, match="nothing tells what it loses"):
        search(asked_of(models, tmp_path), InProcess())


def test_what_alone_keeps_a_limit_that_is_no_objective_is_on_the_front(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that others beat in accuracy, of which the more keep their class."""

    def row(top1: float, agreement: float) -> Row:
        base = test_search.row(0.5, 100 * (0.9 - top1))
        return base | {"agreement": agreement, "dropped": [], "sha256": "", "device": "cpu"}

    asked = asked_of(models, tmp_path, gates=Gates(images="x", min_agreement=95.0))
    results = Results(asked.work / "repaired")
    found = []
    for name, figures in (("best", row(0.9, 0.90)), ("keeps", row(0.89, 0.97))):
        trial: Any = SimpleNamespace(name=name, recipe=None)
        results.path(trial).write_bytes(b"")
        found.append(searching.Found(trial, figures))
    monkeypatch.setattr("onnxcompress.pipeline.recipe.write_recipe", lambda recipe, folder: "")
    front = searching._outcome(asked, (), found, ())
    assert front.picked is not None
    assert front.found[front.picked].trial.name == "keeps"


@pytest.mark.parametrize(
    "limit", [["--min-speedup", "inf"], ["--max-latency", "1e309"], ["--max-size", "inf"]]
)
def test_limits_are_finite(
    limit: list[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(models / NET), "--out", str(tmp_path / "o"), *limit]) in (1, 2)
    assert "expected" in capsys.readouterr().err
    call = ["search", str(models / NET), "--out", str(tmp_path / "o"), "--latency-seconds", "inf"]
    assert main(call) in (1, 2)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("ray", [True, False])
def test_a_provider_is_looked_for_where_candidates_are_measured(
    ray: bool, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On this machine, or not at all: a cluster may have what it lacks."""
    library = f"library={tmp_path / 'none.so'}"
    call = ["search", str(models / NET), "--out", str(tmp_path / "o"), "--min-speedup", "2", "--dry-run"]
    call += ["--provider", "openvino", "--provider-options", library]
    assert (main([*call, *(["--ray", "auto"] * ray)]) == 0) == ray
    assert ("none.so: no such file" in capsys.readouterr().err) == (not ray)


# a sweep


@pytest.mark.parametrize("name", [f"{Path(NET).stem}-fold.onnx", f"{Path(NET).stem}-fold.md"])
@pytest.mark.parametrize("is_input", [True, False])
def test_a_result_never_replaces_what_no_sweep_wrote(name: str, is_input: bool, folder: Path) -> None:
    is_input &= name.endswith(".onnx")
    shutil.copy(folder / OTHER, folder / name)
    plan = plan_of(folder, f"models: [{NET}{f', {name}' if is_input else ''}]\nrecipes: [fold.yaml]")
    with pytest.raises(OptionError, match="a result would replace it"):
        preview(plan, Results(folder))
    with pytest.raises(OptionError, match="a result would replace it"):
        sweep(plan, Results(folder), InProcess())
    assert (folder / name).read_bytes() == (folder / OTHER).read_bytes()


def test_results_replace_their_own(folder: Path) -> None:
    plan = plan_of(folder, f"models: [{NET}]\nrecipes: [fold.yaml]\nlatency_seconds: 0")
    for _ in range(2):
        assert sweep(plan, Results(folder / "o"), InProcess())[0]["status"] == "done"


def test_a_sweep_goes_on_that_was_killed_while_it_wrote(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(folder, f"models: [{NET}]\nrecipes: [fold.yaml]\nlatency_seconds: 0")
    whole = written.write_bytes

    def killed(path: Path, data: bytes) -> None:
        if path.suffix == ".json" and data != b"{}":
            raise KeyboardInterrupt
        whole(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(written, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(plan, Results(folder / "o"), InProcess())
    assert list((folder / "o").glob("*.onnx"))
    assert sweep(plan, Results(folder / "o"), InProcess())[0]["status"] == "done"


def test_a_model_that_changes_during_its_run_is_compressed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(folder, f"models: [{NET}]\nrecipes: [fold.yaml]\nlatency_seconds: 0")

    def swapped(trial: Trial, cache: str | None) -> Result:
        result = compress(trial, cache)
        shutil.copy(folder / OTHER, folder / NET)
        return result

    with monkeypatch.context() as patch:
        patch.setattr("onnxcompress.search.sweep.compress", swapped)
        (before,) = sweep(plan, Results(folder / "o"), InProcess())
    (after,) = sweep(plan, Results(folder / "o"), InProcess())
    assert after["bytes"] != before["bytes"]


def test_every_entry_of_the_models_has_its_runs(folder: Path) -> None:
    plan = plan_of(folder, f"models: [{NET}, {NET}: {{seed: 1}}, {NET}: {{seed: 2}}]\nrecipes: [both.yaml]")
    assert [trial.labels.get("seed") for trial in plan.trials] == [None, "1", "2"]


@pytest.mark.parametrize(
    ("listed", "variables", "line", "message"),
    [
        (f"[{NET}: {{sed: 5}}]", "{}", 1, "did you mean 'seed'"),
        (f"[{NET}, \n  {NET}: {{seed: []}}]", "{}", 2, "values to try"),
        (f"[{NET}]", "{inputs: [procedural]}", 3, "a column of the table"),
    ],
)
def test_variables_are_known_and_no_columns(
    listed: str, variables: str, line: int, message: str, folder: Path
) -> None:
    write(
        folder / "both.yaml",
        "variables: {seed: 0, inputs: x}\npasses:\n  - fp16: {seed: '${seed}', inputs: '${inputs}'}",
    )
    with pytest.raises(OptionError, match=message) as caught:
        plan_of(folder, f"models: {listed}\nrecipes: [both.yaml]\nvariables: {variables}")
    assert f"plan.yaml:{line}: " in str(caught.value)


def test_names_of_files_are_short_enough(folder: Path) -> None:
    write(folder / "r.yaml", "passes:\n  - fp16: {images: '${images}'}")
    long = "/".join(["deep"] * 60) + "/images.npz"
    plan = plan_of(
        folder, f"models: [{NET}]\nrecipes: [r.yaml]\nvariables: {{images: [{long}, other{long}]}}"
    )
    first, second = (trial.name for trial in plan.trials)
    assert first != second
    assert max(len(first), len(second)) < 200


def test_missing_images_are_seen_before_a_sweep(folder: Path) -> None:
    text = f"models: [{NET}]\nrecipes: [fold.yaml]\ngates: {{images: none.npz}}"
    with pytest.raises(InputError, match="no such file"):
        preview(plan_of(folder, text), None)


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_missing_labels_are_seen_before_the_work(kind: str, folder: Path, models: Path) -> None:
    if kind == "npz":
        np.savez(folder / "plain.npz", x=np.zeros((2, 28, 28, 1), np.uint8))
    else:
        (folder / "plain.npz").mkdir()
        Image.new("L", (28, 28)).save(folder / "plain.npz/a.png")
    text = f"models: [{NET}]\nrecipes: [fold.yaml]\ngates: {{images: plain.npz, max_drop: 1}}"
    with pytest.raises(InputError, match=r"no labels|no class folder"):
        preview(plan_of(folder, text), None)
    gates = Gates(images=str(folder / "plain.npz"), max_drop=1.0)
    with pytest.raises(InputError, match=r"no labels|no class folder"):
        asked_of(models, folder, gates=gates).check()


@pytest.mark.parametrize("gates", ["[]", "false"])
def test_gates_are_a_mapping(gates: str, folder: Path) -> None:
    with pytest.raises(OptionError, match="gates"):
        plan_of(folder, f"models: [{NET}]\nrecipes: [fold.yaml]\ngates: {gates}")
