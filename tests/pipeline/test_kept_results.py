"""A repeated or killed command begins where it was; what is kept can be shown, bounded and deleted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from onnxcompress.account import Change, Figures
from onnxcompress.cli.main import main
from onnxcompress.graph.blocks import find_blocks
from onnxcompress.model import Model, load
from onnxcompress.optimize.block_drop import pipeline
from onnxcompress.optimize.block_drop.figures import DropBlocksFigures
from onnxcompress.optimize.block_drop.kept_scores import latency_shares
from onnxcompress.optimize.block_drop.pipeline import Dropper
from onnxcompress.optimize.block_drop.recoverability import Recovery, Scorer
from onnxcompress.optimize.calibration import InputRequest, gather_inputs
from onnxcompress.optimize.intermediate_results import keep, keeping, kept
from onnxcompress.optimize.synthesis import distillation
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.pipeline.cache import VALUES, Cache
from onnxcompress.pipeline.pipeline import Pipeline
from onnxcompress.progress import Progress, silent
from onnxcompress.runtime.block_latency import LatencyChange, Share
from onnxcompress.runtime.stopwatch import Stopwatch
from tests.optimize.test_block_drop import FAST, network

NET = "resnet20-fashion.onnx"


@pytest.fixture
def undisturbed_clock(fixed_clock: Callable[..., None]) -> None:
    """A clock whose latency shares are worth keeping."""
    fixed_clock([10, 6, 9.5, 8], [10, 8])


class Killed(Exception):
    """Stands for a signal."""


def dropped() -> Model:
    """The small network without one block."""
    model = network()
    FAST.__class__(**{**FAST.__dict__, "blocks": 1}).apply(model)
    return model


def kill(*arguments: Any, **options: Any) -> Any:
    """Take the place of a function at which a run is killed, or which a run must not need."""
    raise Killed


@pytest.mark.slow
@pytest.mark.usefixtures("undisturbed_clock")
def test_a_run_killed_after_scoring_repeats_without_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache")
    with keeping(cache), monkeypatch.context() as patch:
        patch.setattr(Dropper, "_choose", kill)
        with pytest.raises(Killed):
            dropped()
    with keeping(cache), monkeypatch.context() as patch:
        patch.setattr(pipeline, "Scorer", kill)
        patch.setattr(Stopwatch, "shares", kill)
        resumed = dropped()
    assert resumed.digest() == dropped().digest()  # nothing was kept of the second: it scores
    monkeypatch.setattr(pipeline, "Scorer", kill)
    with pytest.raises(Killed):
        dropped()


@pytest.mark.slow
@pytest.mark.usefixtures("undisturbed_clock")
def test_a_run_killed_while_it_scores_scores_only_the_other_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    original = Scorer.recover

    def until(most: int) -> Callable[[Scorer, Any], Recovery]:
        def recover(scorer: Scorer, block: Any) -> Recovery:
            if len(scored) == most:
                raise Killed
            scored.append(block.exit)
            return original(scorer, block)

        return recover

    monkeypatch.setattr(Dropper, "_choose", kill)
    with keeping(Cache(tmp_path / "cache")):
        for most in (2, 99):
            monkeypatch.setattr(Scorer, "recover", until(most))
            with pytest.raises(Killed):
                dropped()
    assert len(scored) == len(set(scored)) == 3


def test_distilled_images_are_made_once(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "STEPS", 2)

    def made(**options: Any) -> np.ndarray:
        request = InputRequest(preprocess="fashion-mnist", inputs="distilled", synthetic=4, **options)
        return gather_inputs(load(models / NET), request).images.array()

    with keeping(Cache(tmp_path / "cache")):
        first = made()
        monkeypatch.setattr(distillation, "_optimized", kill)
        np.testing.assert_array_equal(made(), first)
        with pytest.raises(Killed):
            made(seed=1)


@pytest.mark.parametrize(
    "command",
    [
        "synthesize {net} {folder}/out.npz --count 4",
        "sensitivity {net} --inputs distilled --synthetic 6 --weight-bits 8 --activation-bits= ",
        "correct-bias {net} {folder}/out.onnx --reference {net} --inputs distilled --synthetic 4",
    ],
)
def test_every_command_that_distills_keeps_the_images(
    command: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "STEPS", 2)
    argv = command.format(net=models / NET, folder=tmp_path).split(" ")
    argv = [*filter(None, argv), "--preprocess", "fashion-mnist", "--cache", str(tmp_path / "cache")]
    assert main(argv) == 0
    monkeypatch.setattr(distillation, "_optimized", kill)
    assert main(argv) == 0
    assert main([*argv, "--seed", "1"]) == 1  # other images, which are not kept


def test_values_are_computed_again_where_they_are_missing_damaged_or_others(tmp_path: Path) -> None:
    cache, calls = Cache(tmp_path / "cache"), []

    def value(kind: str = "kind", parts: int = 0) -> float:
        def compute() -> dict[str, np.ndarray]:
            calls.append((kind, parts))
            return {"x": np.array(float(len(calls)))}

        with keeping(cache):
            return float(kept(kind, lambda: {"parts": parts}, compute)["x"])

    assert [value(), value(), value("other"), value(parts=1), value()] == [1, 1, 2, 3, 1]
    for file in cache.folder.glob(f"*/{VALUES}"):
        file.write_bytes(file.read_bytes()[:-1])
    assert value() == 4


def test_what_is_kept_is_shown_bounded_and_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Cache(tmp_path / "cache", limit=26_000)
    (cache.folder / "mine.txt").write_text("no entry")
    with keeping(cache):
        for index in range(4):
            keep("kind", lambda index=index: {"index": index}, {"x": np.zeros(1000)})  # type: ignore[misc]
    argv = ["cache", "--cache", str(cache.folder)]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["entries"], found["bytes"]) == cache.usage()
    assert found["entries"] == 3
    assert found["bytes"] <= 26_000
    assert main([*argv, "--clear"]) == 0
    assert "0 results, 0 B of at most 10.0 GB" in capsys.readouterr().out
    assert [file.name for file in cache.folder.iterdir()] == ["mine.txt"]


@pytest.mark.slow
@pytest.mark.usefixtures("undisturbed_clock")
def test_a_repeated_command_gives_the_result_that_was_kept(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> dict[str, Any]:
        argv = ["quantize", str(models / NET), str(tmp_path / "o.onnx"), "--json", "--effort", "fast"]
        assert main([*argv, "--synthetic", "32", *options]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found | {"file": (tmp_path / "o.onnx").read_bytes()}

    where = ["--cache", str(tmp_path / "cache")]
    first, again = run(*where), run(*where)
    assert (first["cached"], again["cached"], run("--no-cache")["cached"]) == (False, True, False)
    assert first | {"cached": True} == again
    assert not run(*where, "--seed", "1")["cached"]


@pytest.mark.parametrize(
    ("jitter", "clock", "times"), [(0.0, "wall", 1), (0.9, "wall", 2), (0.0, "processor", 2)]
)
def test_shares_of_a_disturbed_clock_are_measured_again(
    jitter: float, clock: str, times: int, tmp_path: Path
) -> None:
    measured: list[int] = []
    blocks = find_blocks(network()).blocks

    def measure() -> dict[str, Share]:
        measured.append(1)
        return {b.exit: Share(0.1, 0.1 - jitter / 2, 0.1 + jitter / 2) for b in blocks}

    with keeping(Cache(tmp_path / "cache")):
        for _ in range(2):
            latency_shares(blocks, measure, lambda: clock == "wall", {"model": "m"}, silent)
    assert len(measured) == times


@dataclass(frozen=True)
class Missing(Pass):
    """Miss a target, and count how often that was tried."""

    name: ClassVar[str] = "missing"
    calls: ClassVar[list[str]] = []

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[Figures]:
        self.calls.append(self.name)
        model.set_metadata("missed", "yes")
        return PassResult([Change("model", "marked")], measured=Figures(target_missed="try again"))


def test_a_result_that_missed_its_target_is_not_kept(models: Path, tmp_path: Path) -> None:
    for _ in range(2):
        Pipeline([Missing()]).run(load(models / NET), cache=Cache(tmp_path / "cache"))
    assert len(Missing.calls) == 2


def test_blocks_chosen_by_a_disturbed_clock_are_chosen_again() -> None:
    by_latency, by_count = replace(FAST, latency_reduction=20.0), replace(FAST, blocks=1)
    calm = _figures()
    assert by_latency.is_repeatable(calm)
    by_processor = replace(calm, latency=replace(calm.latency, clock="processor"))
    for disturbed in (by_processor, replace(calm, noisy_latency=True)):
        assert not by_latency.is_repeatable(disturbed)
        assert by_count.is_repeatable(disturbed)


def _figures() -> DropBlocksFigures:
    return DropBlocksFigures("y", "", LatencyChange(2.0, 1.0, 0.5, 0.4, 0.6), ())
