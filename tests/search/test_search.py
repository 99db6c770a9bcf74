"""Search: the front and the choice from it, killed and undisturbed searches, and recipes that remake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.cli.main import main
from onnxcompress.errors import OptionError
from onnxcompress.evaluation.fidelity import Fidelity, OutputFidelity
from onnxcompress.evaluation.gates import Gates
from onnxcompress.evaluation.guard import GuardMeasurements
from onnxcompress.model import Model, load
from onnxcompress.runtime.latency import Timing
from onnxcompress.search import latencies
from onnxcompress.search import search as searching
from onnxcompress.search import trial as trial_module
from onnxcompress.search.front import choose_for_repair, contenders, loss_of, pareto_front, pick, violations
from onnxcompress.search.question import Search
from onnxcompress.search.search import Front, search
from onnxcompress.search.space import (
    CHANNELS,
    QUANTIZED,
    Candidate,
    Extent,
    extent_of,
    first_points,
    suggest,
)
from onnxcompress.search.trial import Result, Row, Trial, compress, structure, time_together
from onnxcompress.search.workers import InProcess
from tests.helpers.folding import graph, weight

optuna = pytest.importorskip("optuna")

NET = "resnet20-fashion.onnx"
Compress = Callable[[Trial, str | None], Result]


def row(ratio: float, drop: float, size: int = 50) -> Row:
    """Figures of a result that lost `drop` points, of 100 bytes before."""
    scores = {"inputs": "100 images", "top1_before": 0.9, "top1": 0.9 - drop / 100, "agreement": 0.9}
    times = {"ratio": ratio, "ratio_low": ratio, "ratio_high": ratio, "latency_ms": ratio}
    return {"bytes_before": 100, "bytes": size, "loss": drop, "size": size / 100, **scores, **times}


def test_the_front_is_what_no_other_point_beats() -> None:
    values = np.random.default_rng(0).integers(0, 6, (200, 3)).tolist()
    front = pareto_front(values)
    for index, own in enumerate(values):
        beaten = any(all(a <= b for a, b in zip(v, own, strict=True)) and v != own for v in values)
        assert beaten or own in [values[i] for i in front]
        assert not (beaten and index in front)
    assert len({tuple(values[i]) for i in front}) == len(front)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, None),
        ({"max_drop": 1.0}, 1),  # the fastest that loses no more
        ({"min_speedup": 1.5}, 2),  # the least loss that is as fast
        ({"min_speedup": 1.5, "max_drop": 3.0}, 2),
        ({"min_speedup": 3.9, "max_drop": 3.0}, None),
    ],
)
def test_the_choice_keeps_all_limits(limits: dict[str, float], expected: int | None) -> None:
    rows = [row(0.25, 5), row(0.7, 0.9), row(0.6, 2), row(0.9, 0.1)]
    assert pick(rows, Gates(images="x", **limits)) == expected  # type: ignore[arg-type]


def test_what_keeps_exact_limits_and_promises_least_loss_is_repaired_first() -> None:
    rows = [row(0.3, 4), row(0.4, 3), row(0.8, 1), row(0.9, 0.5), row(0.95, 9)]
    chosen = choose_for_repair(rows, Gates(images="x", min_speedup=2, max_drop=1), 4)
    assert chosen[:2] == [1, 0]  # both fast enough; the loss of a proxy decides nothing but the order
    assert sorted(chosen) == [0, 1, 2, 3]  # the last is beaten
    assert choose_for_repair(rows, Gates(), 3) == [0, 2, 3] or len(choose_for_repair(rows, Gates(), 3)) == 3


def test_what_just_keeps_the_speed_comes_after_what_surely_does() -> None:
    """Measured again, it may be too slow: 2.01 times as fast where 2 is asked for, beside 2.1 times."""
    rows = [row(1 / 2.01, 1), row(1 / 2.1, 2), row(1 / 1.9, 0.5)]
    assert choose_for_repair(rows, Gates(images="x", min_speedup=2), 4)[:2] == [1, 0]
    assert choose_for_repair(rows, Gates(images="x", min_speedup=1.95), 4)[:2] == [0, 1]


def test_of_results_that_lose_the_same_the_fastest_is_chosen() -> None:
    rows = [row(0.5, 1), row(0.4, 1), row(0.45, 1)]
    assert pick(rows, Gates(images="x", min_speedup=1.5)) == 1


def test_a_missed_limit_counts_by_how_far_it_is_missed() -> None:
    """Twice as fast where 2.5 times is asked for; 3 points where 2 are; 80 bytes where there may be 100."""
    gates = Gates(images="x", max_drop=2, min_speedup=2.5, max_size=1e-4, min_agreement=96)
    missed = violations(row(0.5, 3, 80), gates, loss=True)
    assert missed == pytest.approx([0.5, 6 / 96, 0.2, -0.2])
    assert violations(row(0.5, 3, 80), gates, loss=False) == pytest.approx(missed[2:])


def test_half_is_repaired_for_the_limits_and_half_over_all_latencies() -> None:
    """Of the front, six keep the speed; those of them that lose least come first."""
    rows = [row(0.1 * at, 10 - at) for at in range(1, 11)]
    gates = Gates(images="x", min_speedup=1.6)
    assert choose_for_repair(rows, gates, 4) == [5, 4, 0, 9]
    assert choose_for_repair(rows, gates, 5) == [5, 4, 3, 0, 9]
    assert choose_for_repair(rows[3:], gates, 6) == [2, 1, 0, 3, 5, 6]  # time may end before the slowest
    assert choose_for_repair(rows, Gates(), 4) == [0, 3, 6, 9]
    few = Gates(images="x", min_speedup=1.6, max_drop=6.5)  # the limit on the loss orders, too
    assert choose_for_repair([row(0.1, 8), row(0.2, 7), row(0.7, 6)], few, 3) == [1, 0, 2]


def test_what_is_about_as_fast_as_asked_is_in_doubt() -> None:
    rows = [row(0.4, 1), row(0.56, 3), row(0.62, 0.5), row(0.55, 2), row(0.7, 0), row(0.5, 4)]
    assert contenders(rows, 0.6, 8) == [2, 3, 1]
    assert contenders(rows, 0.6, 2) == [2, 3]


def test_what_is_timed_together_has_its_ratio_to_the_model_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    clocks: list[str] = []
    first = np.random.default_rng(0).uniform(3, 5, 40)

    def timed(models: dict[str, Any], **options: Any) -> dict[str, Timing]:
        seen.update(options, models=models)
        clocks.append(options["clock"])
        samples = {"": first, "a": 0.5 * first, "b": 0.5 * first[::-1]}
        return {
            name: Timing(name, float(np.median(x)), 0, 0, 0, 0, 40, 4, 0, "cpu", tuple(x.tolist()))
            for name, x in samples.items()
        }

    monkeypatch.setattr("onnxcompress.runtime.stopwatch.benchmark", timed)
    monkeypatch.setattr("onnxcompress.runtime.stopwatch.other_load", lambda: 1.0)
    gates = Gates(provider="cpu", batch=4, threads=2, input_shape="x=1x3x8x8")
    rows = time_together("net.onnx", {"a": "a.onnx", "b": "b.onnx"}, gates, 7.0)
    assert seen["models"] == {"": "net.onnx", "a": "a.onnx", "b": "b.onnx"}
    assert (seen["batch"], seen["threads"], seen["seconds"]) == (4, 2, 7.0)
    assert (seen["shapes"], seen["provider"].name) == ({"x": (1, 3, 8, 8)}, "cpu")
    middle = float(np.median(first))
    expected = {"a": 0.5, "b": float(np.median(0.5 * first[::-1] / first))}
    for name in "ab":
        assert (rows[name]["latency_ms"], rows[name]["latency_before_ms"]) == (0.5 * middle, middle)
        assert rows[name]["ratio"] == pytest.approx(expected[name])
        assert rows[name]["device"] == "cpu, batch 4, processor time of one thread"
    assert clocks == ["wall", "processor"]  # b's times are too noisy for the wall's
    steady = time_together("net.onnx", {"a": "a.onnx"}, gates, 7.0)["a"]
    assert (steady["device"], steady["clock"]) == ("cpu, batch 4", "wall")
    assert (rows["a"]["ratio_low"], rows["a"]["ratio_high"]) == pytest.approx((0.5, 0.5))
    assert rows["b"]["ratio_low"] < 0.49 < 0.51 < rows["b"]["ratio_high"]


def test_noise_is_that_of_the_worst_output_over_what_it_varies() -> None:
    """10 dB are a tenth of the variation; of several passes the last measurement counts."""

    def measured(*levels: float | None) -> GuardMeasurements:
        outputs = [OutputFidelity(f"y{at}", db, db, 0.1, 0.1) for at, db in enumerate(levels)]
        return GuardMeasurements("16 images", 16, 1.0, Fidelity(tuple(outputs)))

    steps = [SimpleNamespace(result=SimpleNamespace(guard=found)) for found in (measured(3.0), None)]
    together: Any = SimpleNamespace(steps=steps, guard=measured(30.0, 10.0, None))
    assert trial_module._noise(together)["noise"] == pytest.approx(0.1)
    together.guard = None
    assert trial_module._noise(together)["noise"] == pytest.approx(10**-0.3)
    together.steps = steps[1:]
    assert trial_module._noise(together) == {}


@pytest.mark.parametrize(
    ("candidate", "chain"),
    [
        (Candidate(), [("fold-bn", {})]),
        (
            Candidate(2, "int8", 8, equalize="first"),
            [
                ("fold-bn", {}),
                ("equalize", {}),
                ("drop-blocks", {"blocks": 2, "steps": 0, "effort": "fast", "seed": 5}),
                ("quantize", {"weight_bits": 8, "activation_bits": 8, "small_types": False, "seed": 5}),
            ],
        ),
        (
            Candidate(1, "int4", 0, equalize="last"),
            [
                ("fold-bn", {}),
                ("drop-blocks", {"blocks": 1, "steps": 0, "seed": 5}),
                ("equalize", {}),
                ("quantize", {"weight_bits": 4, "activation_bits": 0, "small_types": True}),
            ],
        ),
        (
            Candidate(0, "mixed", 8, 5.5),
            [("fold-bn", {}), ("quantize", {"bits_budget": 5.5, "small_types": True, "effort": "fast"})],
        ),
        (
            Candidate(0, "sparse", sparsity=0.4),
            [
                ("fold-bn", {}),
                ("prune", {"sparsity": 0.4, "storage": "sparse", "effort": "fast", "seed": 5}),
            ],
        ),
        (Candidate(0, "float16"), [("fold-bn", {}), ("fp16", {"seed": 5})]),
    ],
)
def test_a_candidate_is_made_by_these_passes(
    candidate: Candidate, chain: list[tuple[str, dict[str, Any]]]
) -> None:
    made = candidate.passes({"seed": 5}, effort="fast", repair=False)
    options = [p.options() for p in made]
    assert [p.name for p in made] == [name for name, _ in chain]
    for found, (_, expected) in zip(options, chain, strict=True):
        assert {name: found[name] for name in expected} == expected


def test_in_full_repair_the_same_blocks_are_dropped_and_fine_tuned() -> None:
    chain = Candidate(2).passes({}, effort="balanced", repair=True, dropped=("a", "b"))
    options = chain[1].options()
    assert (options["drop"], options["blocks"], options["steps"]) == (["a", "b"], None, None)
    assert options["effort"] == "balanced"


def test_milder_candidates_drop_fewer_blocks() -> None:
    own = Candidate(3, "int8", 8)
    assert list(own.milder()) == [replace(own, blocks=blocks) for blocks in range(3)]


def test_the_first_points_are_those_of_an_engineer() -> None:
    points = [(p["blocks"], p["weights"]) for p in first_points(Extent(8, 0))]
    assert points == [
        (0, "int8"), (0, "float16"), (2, "float32"), (2, "int8"), (4, "float32"), (4, "int8"), (0, "sparse")
    ]  # fmt: skip
    few = [(0, "int8"), (0, "float16"), (0, "sparse")]
    assert [(p["blocks"], p["weights"]) for p in first_points(Extent(0, 0))] == few
    cut = [(p["blocks"], p["channels"]) for p in first_points(Extent(8, 40)) if p["channels"]]
    assert cut == [(0, 20), (2, 20)]


def test_the_loss_is_the_best_that_was_measured() -> None:
    assert loss_of(row(1, 2.0)) == pytest.approx(2)
    assert loss_of({"agreement": 0.98, "noise": 0.5}) == pytest.approx(2)
    assert loss_of({"noise": 0.05}) == pytest.approx(5)


def test_every_point_of_the_space_is_a_chain_that_can_start(models: Path) -> None:
    extent = extent_of(load(models / NET))
    assert extent == Extent(9, 40)
    study, seen = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), set()
    for _ in range(60):
        candidate = suggest(study.ask(), extent)
        for repair in (False, True):
            for pass_ in candidate.passes({"inputs": "layerwise"}, effort="fast", repair=repair):
                pass_.check()
        names = [p.name for p in candidate.passes({}, effort="fast", repair=True)]
        assert ("drop-blocks" in names) == (candidate.blocks > 0)
        assert ("drop-channels" in names) == (candidate.channels > 0)
        assert ("quantize" in names) == (candidate.weights in QUANTIZED)
        seen.add((candidate.weights, candidate.equalize))
    assert len(seen) >= 10


def test_a_network_without_channels_to_cut_has_none_in_its_space() -> None:
    model = Model.from_proto(
        graph("(float[N,4,8,8] x) => (float[N,3,8,8] y)", "y = Conv(x, w)", {"w": weight(3, 4, 1, 1)})
    )
    assert extent_of(model) == Extent(0, 0)
    assert not any("channels" in point for point in first_points(extent_of(model)))


@pytest.mark.filterwarnings("ignore::onnxcompress.errors.CompressWarning")
def test_channels_of_a_network_with_open_sizes_can_be_cut() -> None:
    """They are run at a usual size, or at the one that is asked for."""
    model = Model.from_proto(
        graph(
            "(float[N,3,H,W] x) => (float[N,8,P,Q] y)",
            "a = Conv(x, w)  b = Relu(a)  y = Conv(b, v)",
            {"w": weight(16, 3, 1, 1), "v": weight(8, 16, 1, 1)},
        )
    )
    for inputs in ({}, {"input_shape": "1x3x64x64"}):
        assert extent_of(model, inputs).channels == CHANNELS[1]


def test_a_structure_is_a_graph_without_its_weights(models: Path, tmp_path: Path) -> None:
    import onnx

    proto = onnx.load(models / NET)
    weight = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
    weight.raw_data = bytes(len(weight.raw_data))
    onnx.save(proto, tmp_path / "other-weights.onnx")
    proto.graph.node[0].name += "-renamed"
    onnx.save(proto, tmp_path / "other-node.onnx")
    assert structure(models / NET) == structure(tmp_path / "other-weights.onnx")
    assert structure(models / NET) != structure(tmp_path / "other-node.onnx")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Candidates are made by folding alone, with figures by formula; returns the names of what was made."""
    made: list[str] = []

    def compressed(trial: Trial, cache: str | None) -> Result:
        made.append(trial.name)
        fold = replace(trial, recipe=replace(trial.recipe, passes=trial.recipe.passes[:1]))
        result = compress(fold, cache)
        words = trial.name.split("-")
        blocks, bits = int(words[0].removeprefix("drop")), {"int8": 2, "int4": 4}.get(words[1], 1)
        cut = next((int(word[3:]) for word in words if word.startswith("cut")), 0)
        noise = 0.004 * blocks**2 + 0.002 * cut + 0.01 * bits * ("equalized" not in trial.name)
        size = result.row["bytes"] // bits
        return Result(result.row | {"noise": noise, "bytes": size, "dropped": ["a"] * blocks}, result.files)

    def timed(
        model: str, results: dict[str, str], gates: Gates, seconds: float, clock: str
    ) -> dict[str, Row]:
        ratio = {"ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6}
        return {
            name: ratio | {"latency_ms": 1.0, "latency_before_ms": 2.0, "device": "cpu"} for name in results
        }

    monkeypatch.setattr(searching, "compress", compressed)
    monkeypatch.setattr(latencies, "time_together", timed)
    monkeypatch.setattr(latencies, "time_result", lambda m, r, *how: timed(m, {"r": r}, *how)["r"])
    return made


def now_compressing() -> Compress:
    """The function that makes candidates, as `quick` has replaced it."""
    function: Compress = vars(searching)["compress"]
    return function


def outcome(front: Front) -> Any:
    return (
        [(one.candidate, one.row["loss"]) for one in front.proxies],
        [(found.trial.name, found.row["sha256"], found.row["loss"]) for found in front.found],
        front.picked,
    )


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_search_killed_at_any_moment_ends_as_an_undisturbed_one(
    jobs: int, quick: list[str], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Several(InProcess):
        pass

    workers = Several()
    workers.jobs = jobs
    gates = Gates(max_size=0.9, min_speedup=3.0)  # some are proposed by the speed that is asked for
    asked = Search(str(models / NET), tmp_path / "a", gates, trials=14, repairs=3)
    expected, count = outcome(search(asked, workers)), len(quick)
    assert len(expected[0]) == 14
    for at, moment in enumerate((1, count // 2, count - 1)):
        again = replace(asked, folder=tmp_path / f"killed{at}")
        with monkeypatch.context() as patch:
            left, working = [moment], now_compressing()

            def killed(
                trial: Trial, cache: str | None, left: list[int] = left, working: Compress = working
            ) -> Result:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return working(trial, cache)

            patch.setattr(searching, "compress", killed)
            with pytest.raises(KeyboardInterrupt):
                search(again, workers)
        assert outcome(search(again, workers)) == expected
    quick.clear()
    assert outcome(search(asked, workers)) == expected
    assert quick == []  # all of it was there


def test_a_folder_with_another_search_is_refused(quick: list[str], models: Path, tmp_path: Path) -> None:
    asked = Search(str(models / NET), tmp_path / "a", trials=2, repairs=1)
    search(asked, InProcess())
    search(replace(asked, trials=4), InProcess())
    with pytest.raises(OptionError, match="another search was begun here"):
        search(replace(asked, seed=1), InProcess())


def test_weights_in_another_file_are_part_of_the_question(
    quick: list[str], models: Path, tmp_path: Path
) -> None:
    file, weights = tmp_path / "net.onnx", tmp_path / "net.onnx.data"
    proto = onnx.load(models / NET)
    onnx.save(proto, file, save_as_external_data=True, location=weights.name)
    asked = Search(str(file), tmp_path / "a", trials=2, repairs=1)
    search(asked, InProcess())
    held = bytearray(weights.read_bytes())
    held[100] ^= 1
    weights.write_bytes(held)
    with pytest.raises(OptionError, match="another search was begun here"):
        search(asked, InProcess())


def test_files_that_are_not_of_a_search_are_left_alone(
    quick: list[str], models: Path, tmp_path: Path
) -> None:
    asked = Search(str(models / NET), tmp_path / "a", trials=2, repairs=1)
    search(asked, InProcess())
    own = tmp_path / "a/front/my.txt"
    own.write_text("mine")
    search(replace(asked, trials=3), InProcess())
    assert own.read_text() == "mine"
    (tmp_path / "b").mkdir()
    (tmp_path / "b/my.txt").write_text("mine")
    with pytest.raises(OptionError, match=r"'my.txt', and no search"):
        search(replace(asked, folder=tmp_path / "b"), InProcess())


def test_a_failed_candidate_costs_itself_alone(
    quick: list[str], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = now_compressing()

    def failing(trial: Trial, cache: str | None) -> Result:
        return Result({"error": "no"}) if "float16" in trial.name else working(trial, cache)

    monkeypatch.setattr(searching, "compress", failing)
    front = search(Search(str(models / NET), tmp_path / "a", trials=9, repairs=2), InProcess())
    assert 0 < len(front.proxies) < 9
    assert set(front.failures) == {"no"}


@pytest.mark.slow
def test_more_blocks_than_are_hopeless_are_not_tried(
    quick: list[str], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "HOPELESS", 2.0)
    front = search(Search(str(models / NET), tmp_path / "a", trials=30, repairs=1), InProcess())
    tried = [one.candidate for one in front.proxies]
    assert any("hopeless" in text for text in front.failures)
    for at, one in enumerate(tried):
        losses = [before.row["loss"] for before in front.proxies[:at] if before.candidate in one.milder()]
        assert not losses or max(losses) <= 2.0


def test_without_optuna_it_is_one_line(models: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['optuna'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'optuna' else find(name, *a)\n"
        "from onnxcompress.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "search", str(models / NET), "--out", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: search needs optuna, which is not installed here: pip install optuna"
    ]


@pytest.mark.parametrize("text", ["soon", "0m", "30"])
def test_a_time_is_a_duration(text: str, models: Path, tmp_path: Path) -> None:
    assert main(["search", str(models / NET), "--out", str(tmp_path / "o"), "--time", text]) == 2


@pytest.mark.slow
def test_the_command_writes_models_that_their_recipes_remake(
    models: Path,
    tmp_path: Path,
    fixed_clock: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(models / NET, tmp_path / NET)
    archive = np.load(models / "fashion-test2k.npz")
    np.savez(tmp_path / "few.npz", x=archive["x"][:64], y=archive["y"][:64])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(searching, "choose_for_repair", lambda rows, gates, count: int8_of(rows))
    monkeypatch.setattr("onnxcompress.search.workers.Processes", lambda jobs: InProcess())
    fixed_clock([4.0, 2.0])
    call = ["search", NET, "--out", "best", "--inputs", "procedural", "--gate-images", "few.npz"]
    short = ["--trials", "1", "--effort", "fast", "--cache", str(tmp_path / "cache")]
    first = {"blocks": 0, "channels": 0, "weights": "int8", "activations": 8, "equalize": "no"}
    monkeypatch.setattr("onnxcompress.search.study.first_points", lambda most: [first])
    assert main([*call, *short, "--min-agreement", "90", "--min-speedup", "1.5", "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    (point,) = account["front"]
    assert account["picked"] == point["candidate"] == "drop0-int8-a8"
    assert (point["ratio"], point["picked"]) == (0.5, True)
    assert main(["run", point["recipe"], NET, "again.onnx", "--no-cache", "--gate-images", "few.npz"]) == 0
    assert Path("again.onnx").read_bytes() == Path(point["output"]).read_bytes()
    for name in ("front.csv", "search.html", "front/drop0-int8-a8.md"):
        assert "drop0-int8-a8" in Path("best", name).read_text("utf-8")
    other = [*call[:3], "other", *call[4:]]
    assert main([*other, *short, "--min-speedup", "3", "--quiet"]) == 3


def test_missing_images_are_seen_before_the_search(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["search", str(models / NET), "--out", str(tmp_path / "best"), "--min-speedup", "1.5"]
    for more in ([], ["--dry-run"]):
        assert main([*call, "--images", str(tmp_path / "none"), *more]) == 1
        assert "none: no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "best").exists()


def int8_of(rows: Sequence[Row]) -> list[int]:
    """The first of the given proxies."""
    return [0]


def test_a_candidate_is_named_by_what_it_is() -> None:
    assert Candidate(2, "mixed", 8, budget=5.5, equalize="last").name == "drop2-mixed-a8-5.5-equalized-last"
    assert Candidate(0, "sparse", sparsity=0.5).name == "drop0-sparse-0.5"
    assert Candidate(1, "int8", 8, channels=20).name == "drop1-int8-a8-cut20"
