"""A repeated or killed command begins where it was; what is kept can be shown, bounded and deleted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcompress.cli.main import main
from onnxcompress.model import Model, load
from onnxcompress.optimize.block_drop import pipeline
from onnxcompress.optimize.block_drop.pipeline import Dropper
from onnxcompress.optimize.block_drop.recoverability import Recovery, Scorer
from onnxcompress.optimize.calibration import InputRequest, gather_inputs
from onnxcompress.optimize.intermediate_results import keep, keeping, kept
from onnxcompress.optimize.synthesis import distillation
from onnxcompress.pipeline.cache import VALUES, Cache
from onnxcompress.runtime.block_latency import Stopwatch
from tests.optimize.test_block_drop import FAST, network

NET = "resnet20-fashion.onnx"


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


@pytest.mark.usefixtures("quick_clock")
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


@pytest.mark.usefixtures("quick_clock")
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


@pytest.mark.usefixtures("quick_clock")
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
