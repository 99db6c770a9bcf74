"""What a search asks for at each of its steps: seeds, effort, counts, times, and what the sampler hears."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onnxcompress.errors import CompressWarning
from onnxcompress.evaluation.gates import Gates
from onnxcompress.evaluation.guard import Guard
from onnxcompress.model import load, save
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.pipeline.recipe import Recipe
from onnxcompress.search import latencies
from onnxcompress.search import search as searching
from onnxcompress.search import trial as trial_module
from onnxcompress.search.question import Search
from onnxcompress.search.search import search
from onnxcompress.search.space import FASTER, WEIGHTS, Candidate, Extent, extent_for, first_points
from onnxcompress.search.study import Study
from onnxcompress.search.trial import Result, Row, Trial, compress
from onnxcompress.search.workers import InProcess

pytest.importorskip("optuna")

NET = "resnet20-fashion.onnx"


class Recorded:
    """Stands for what makes and times candidates, and keeps what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[Trial, str | None]] = []
        self.timed: list[tuple[str, float]] = []
        self.clocks: list[str] = []
        self.seeds: set[int] = set()
        self.told: list[tuple[int, Row, list[float]]] = []
        monkeypatch.setattr(searching, "compress", self.compress)
        for name in ("time_result", "time_together"):
            monkeypatch.setattr(latencies, name, getattr(self, name))
        monkeypatch.setattr(latencies, "structure", lambda file: Path(file).stem)
        tell = Study.tell

        def told(study: Study, number: int, row: Row, violations: Any) -> None:
            self.told.append((number, row, list(violations)))
            self.seeds.add(study._seed)
            tell(study, number, row, violations)

        monkeypatch.setattr(Study, "tell", told)

    def compress(self, trial: Trial, cache: str | None) -> Result:
        self.made.append((trial, cache))
        data = trial.name.encode()
        blocks = int(trial.name.split("-")[0].removeprefix("drop"))
        row: Row = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes_before": 400,
            "bytes": 100 - 5 * blocks,
        }
        return Result(
            row | {"noise": 0.01 * (blocks + 1), "dropped": list("abcdefg")[:blocks]}, {".onnx": data}
        )

    def time_result(self, model: str, result: str, gates: Gates, seconds: float, clock: str) -> Row:
        self.timed.append(("one", seconds))
        return self.time_together(model, {"": result}, gates, seconds, clock)[""]

    def time_together(
        self, model: str, results: Mapping[str, str], gates: Gates, seconds: float, clock: str
    ) -> dict[str, Row]:
        self.clocks.append(clock)
        self.timed.append((f"{len(results)}", seconds))
        row = {
            "ratio": 0.5,
            "ratio_low": 0.4,
            "ratio_high": 0.6,
            "latency_ms": 1.0,
            "latency_before_ms": 2.0,
            "clock": "processor",
        }
        return {name: row | {"device": "cpu"} for name in results}


class Apart(Recorded):
    """Alone, the network that drops nothing seems too slow; beside others it is fast enough."""

    def time_together(
        self, model: str, results: Mapping[str, str], gates: Gates, seconds: float, clock: str
    ) -> dict[str, Row]:
        rows = super().time_together(model, results, gates, seconds, clock)
        for name, row in rows.items():
            file = Path(results[name])
            alone = len(results) == 1 and file.parent.name == "proxies"
            slow = alone and file.stem.startswith("drop0")
            row["ratio"] = 0.9 if "int8" not in file.stem else 0.54 if slow else 0.49
        return rows


def test_proxies_about_as_fast_as_asked_are_timed_together_before_some_are_repaired(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Apart(monkeypatch)
    gates = Gates(min_speedup=2.0)
    asked = Search(
        str(models / NET), tmp_path / "out", gates, {"inputs": "procedural"}, trials=6, repairs=1
    )
    front = search(asked, InProcess())
    assert [one.trial.name for one in front.found] == ["drop0-int8-a8"]
    timed = [(many, seconds / (int(many) + 1)) for many, seconds in seen.timed if many not in ("one", "1")]
    assert [seconds for _, seconds in timed] == [2 * asked.latency_seconds]  # the front is one alone
    made, all_timed = len(seen.made), len(seen.timed)
    assert search(asked, InProcess()) == front  # its proxies are gone, what was measured is not
    assert (len(seen.made), len(seen.timed)) == (made, all_timed)


def test_candidates_are_made_and_timed_as_asked(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Recorded(monkeypatch)
    asked = Search(
        str(models / NET), tmp_path / "out", Gates(min_speedup=4.0), {"inputs": "procedural"}, trials=8,
        repairs=3, effort="balanced", latency_seconds=1.5, seed=7,
    )  # fmt: skip
    front = search(asked, InProcess(), cache="kept")
    assert {cache for _, cache in seen.made} == {"kept"}
    repaired = [one for one in seen.made if not one[0].recipe.guard.force]
    proxies = seen.made[: -len(repaired)]
    assert len(repaired) == 3
    learning = [
        [pass_.options() for pass_ in trial.recipe.passes if "effort" in pass_.options()]
        for trial, _ in (*proxies, *repaired)
    ]
    assert {values["seed"] for chain in learning for values in chain} == seen.seeds == {7}
    assert {values["effort"] for chain in learning[: len(proxies)] for values in chain} == {"fast"}
    assert {values["effort"] for chain in learning[len(proxies) :] for values in chain} == {"balanced"}
    drops = [v for chain in learning for v in chain if "blocks" in v]
    full = [v for v in drops if v["effort"] == "balanced"]
    assert {v["steps"] for v in drops if v["effort"] == "fast"} == {0}
    assert full
    assert all((v["steps"], v["blocks"]) == (None, None) and v["drop"] for v in full)
    assert all(trial.recipe.guard.force for trial, _ in proxies)
    assert {seconds for kind, seconds in seen.timed if kind == "one"} == {1.5}
    assert seen.timed[-1] == ("3", 5 * 1.5 * 4)  # three results and the original
    assert seen.clocks == ["wall", *["processor"] * (len(seen.clocks) - 1)]  # too noisy once
    for _, row, violations in seen.told:  # twice as fast, where four times is asked for
        assert violations == pytest.approx([0.5])
        assert (row["loss"], row["size"]) == (pytest.approx(100 * row["noise"]), row["bytes"] / 400)
    assert len(seen.told) == len(front.proxies) == 8


@pytest.mark.parametrize(
    ("inputs", "count"),
    [({}, 128), ({"count": 200}, 128), ({"count": 50}, 50)],
)
def test_proxies_learn_from_few_images(
    inputs: dict[str, Any], count: int, models: Path, tmp_path: Path
) -> None:
    """fashion-tiny has 500 of them; what is repaired in full learns from all that are asked for."""
    asked = Search("net.onnx", tmp_path, inputs={"images": str(models / "fashion-tiny.npz")} | inputs)
    for repair, expected in ((False, count), (True, inputs.get("count"))):
        trial = searching._trial(asked, Candidate(1), effort="fast", repair=repair)
        assert trial.recipe.passes[1].options()["count"] == expected


def test_a_limit_on_speed_is_aimed_at(tmp_path: Path) -> None:
    """Each of 20 blocks takes 4 %: 13 are enough to be twice as fast. Without a limit a study is blind."""
    tried: dict[Gates, list[tuple[int, str]]] = {}
    for gates in (Gates(), Gates(min_speedup=2.0)):
        study = Study(tmp_path / f"{len(tried)}", 0, Extent(20, 0, FASTER), gates)
        for _ in range(10):
            ((number, one),) = study.batch(1, 10)
            kind = {"float32": 1.0, "int8": 0.9, "float16": 1.3}[one.weights]
            ratio = kind * (1 - 0.04 * one.blocks)
            study.tell(number, {"ratio": ratio, "loss": one.blocks, "size": kind}, [2 * ratio - 1])
            tried.setdefault(gates, []).append((one.blocks, one.weights))
    assert {(13, "float32"), (12, "int8")} <= {*tried[Gates(min_speedup=2.0)]}
    assert not {(13, "float32"), (12, "int8")} & {*tried[Gates()]}


def test_weights_that_gain_no_time_are_left_out_where_speed_alone_is_limited(models: Path) -> None:
    model = load(models / NET)
    for gates, weights in (
        (Gates(min_speedup=2), FASTER),
        (Gates(max_latency=2), FASTER),
        (Gates(min_speedup=2, max_size=1), WEIGHTS),
        (Gates(max_size=1), WEIGHTS),
        (Gates(), WEIGHTS),
    ):
        assert extent_for(model, gates, {}).weights == weights
    assert {point["weights"] for point in first_points(Extent(4, 0, FASTER))} == {*FASTER}


def test_a_search_ends_in_time(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time is for proxies; one result is repaired in full whatever it takes."""
    seen = Recorded(monkeypatch)
    spent = iter([4.0, 6.0, 20.0, 20.0, 20.0])
    monkeypatch.setattr(searching._Clock, "spent", property(lambda clock: next(spent)))
    monkeypatch.setattr(searching._Clock, "note", lambda clock: None)
    search(Search(str(models / NET), tmp_path / "out", trials=30, repairs=3, seconds=10.0), InProcess())
    assert len(seen.told) == 2
    assert len(seen.made) == 2 + 1
    spent = iter([20.0] * 3)  # asked for again: nothing is looked at beyond the time
    search(Search(str(models / NET), tmp_path / "out", trials=30, repairs=3, seconds=10.0), InProcess())
    assert len(seen.told) == 2


def test_a_repair_that_would_not_end_in_time_is_not_begun(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one takes 3 of 10 seconds and ends at 8: a third would end after the time."""
    seen = Recorded(monkeypatch)
    spent = iter([4.0, 4.0, 5.1, 5.1, 5.2, 5.2, 8.2, 8.2])
    monkeypatch.setattr(searching._Clock, "spent", property(lambda clock: next(spent)))
    monkeypatch.setattr(searching._Clock, "note", lambda clock: None)
    search(Search(str(models / NET), tmp_path / "out", trials=30, repairs=9, seconds=10.0), InProcess())
    assert len(seen.made) == 3 + 2


def test_the_sampler_has_the_seed_and_learns_which_candidates_miss_limits(tmp_path: Path) -> None:
    """Quantized ones are best in all objectives, and miss a limit: at random it would be half of them."""
    studies = [Study(tmp_path / f"{seed}", seed, Extent(4, 0)) for seed in (2, 1)]
    quantized: list[bool] = []
    for at in range(40):
        ((number, candidate),) = studies[0].batch(1, 40)
        quantized.append(candidate.weights in ("int8", "int4", "mixed"))
        row = (
            {"ratio": 0.2, "loss": 0.1, "size": 0.2}
            if quantized[-1]
            else {"ratio": 0.8, "loss": 0.1, "size": 0.9}
        )
        studies[0].tell(number, row, [1.0 if quantized[-1] else -1.0])
        assert number == at
    assert sum(quantized[20:]) <= 7
    first = len(first_points(Extent(4, 0)))
    batches = [[studies[1].batch(9, 9)], [Study(tmp_path / "again", 0, Extent(4, 0)).batch(9, 9)]]
    other, own = ([candidate for _, candidate in batch[first:]] for (batch,) in batches)
    assert other != own


def test_what_a_pass_warns_of_is_a_note_of_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a worker nobody would read it, or each trial would print it again."""

    def warned(trial: Trial, cache: str | None) -> tuple[Row, dict[str, bytes]]:
        for text in ("few images", "few images", "sizes are open"):
            warnings.warn(text, CompressWarning, stacklevel=2)
        return {}, {}

    monkeypatch.setattr(trial_module, "_compressed", warned)
    trial = Trial("a", "net.onnx", Recipe((FoldBatchNorm(),), Gates()))
    assert compress(trial).row["notes"] == "few images; sizes are open"


def test_figures_of_a_result_are_those_of_its_file(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes and top-1 accuracy, of the model before and of the result."""
    net = tmp_path / NET
    save(load(models / NET), net)
    scores = {"before": (0.9, 0.95), "after": (0.8, 0.85)}

    def topk(logits: Any, y: Any, name: str = "") -> tuple[float, float]:
        return scores[logits]

    monkeypatch.setattr("onnxcompress.evaluation.accuracy.topk", topk)
    monkeypatch.setattr(
        "onnxcompress.evaluation.accuracy.agreement", lambda a, b: (a, b) == ("before", "after")
    )
    monkeypatch.setattr(
        "onnxcompress.evaluation.accuracy.logits",
        lambda model, images, **options: "before" if str(model) == str(net) else "after",
    )
    gates = Gates(images=str(models / "fashion-tiny.npz"), provider="cpu")
    result = compress(Trial("a", str(net), Recipe((FoldBatchNorm(),), gates)))
    row = result.row
    assert "error" not in row, row
    assert (row["top1_before"], row["top1"], row["agreement"]) == (0.9, 0.8, 1.0)
    assert (row["bytes_before"], row["bytes"]) == (net.stat().st_size, len(result.files[".onnx"]))


def test_a_trial_is_known_by_all_that_its_result_depends_on(models: Path) -> None:
    """Not by limits, which only judge it."""
    trial = Trial("a", str(models / NET), Recipe((FoldBatchNorm(),), Gates(batch=2)))
    recipes = [
        Recipe((FoldBatchNorm(copy_shared=True),), Gates(batch=2)),
        Recipe((FoldBatchNorm(),), Gates(batch=4)),
        Recipe((FoldBatchNorm(),), Gates(batch=2), Guard(force=True)),
        Recipe((FoldBatchNorm(),), Gates(batch=2, images=str(models / "fashion-tiny.npz"))),
    ]
    keys = {trial.key, *(replace(trial, recipe=recipe).key for recipe in recipes)}
    assert len(keys) == 1 + len(recipes)
    limited = replace(trial, recipe=Recipe((FoldBatchNorm(),), Gates(batch=2, max_size=1.0)), name="b")
    assert limited.key == trial.key
