"""Figures of timings whose samples are known; what is asked for reaches the measurement."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.evaluation.compare import compare
from onnxcompress.evaluation.gates import Gates
from onnxcompress.runtime import latency
from onnxcompress.runtime.bootstrap import half_width, ratio_of
from onnxcompress.runtime.io_binding import bind
from onnxcompress.runtime.latency import Timing, benchmark, precision, ratio

Runs = Callable[..., None]


def network(width: int = 4) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[N,3] x) => (float[N,W] y) { y = MatMul(x, w) }'
    )
    values = np.random.default_rng(width).normal(size=(3, width)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    return proto


@pytest.fixture
def known_runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Runs that take known times: columns of milliseconds, one for each model in their order."""

    def install(*columns: Any) -> None:
        samples = np.array([np.asarray(column, float) for column in columns]).T
        monkeypatch.setattr(latency, "interleave", lambda timed, **options: samples[:, : len(timed)])
        monkeypatch.setattr(latency, "_warm", lambda timed, seconds: None)

    return install


def test_a_timing_has_the_figures_of_its_samples(known_runs: Runs) -> None:
    """0 to 100 and an outlier of 1000 ms: percentiles are linear between samples."""
    known_runs([*range(1, 101), 1000])
    (found,) = benchmark({"net": network()}, provider="cpu", batch=8).values()
    assert (found.median_ms, found.min_ms, found.runs, found.batch) == (51, 1, 101, 8)
    assert found.mean_ms == pytest.approx(6050 / 101)
    assert (found.p90_ms, found.p99_ms) == (91, 100)
    assert found.throughput == pytest.approx(8 * 1000 / 51)
    assert found.samples_ms[-1] == 1000


def timing(name: str, samples: Any) -> Timing:
    values = tuple(float(v) for v in samples)
    middle, mean = float(np.median(values)), float(np.mean(values))
    return Timing(name, middle, mean, middle, middle, middle, len(values), 1, 1.0, "cpu", values)


def test_a_ratio_is_the_second_models_time_over_the_firsts() -> None:
    first = np.random.default_rng(0).uniform(1, 2, 60)
    found = ratio(timing("a", first), timing("b", 0.8 * first))
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.8, 0.8))


def noisy(rounds: int, spread: float, seed: int = 0) -> np.ndarray:
    """Independent rounds of two models, with medians of 10 and 8."""
    rng = np.random.default_rng(seed)
    return np.array([10.0, 8.0]) * (1 + spread * rng.normal(size=(rounds, 2)))


def test_the_half_width_is_that_of_the_ratios_interval() -> None:
    """The median of n normal samples has a deviation of 1.2533 σ / √n; the ratio of two, √2 times that."""
    found = [half_width(noisy(400, 0.05, seed)) for seed in range(8)]
    assert np.mean(found) == pytest.approx(1.96 * 2**0.5 * 1.2533 * 0.05 / 400**0.5, rel=0.15)
    interval = ratio_of(noisy(400, 0.05), 0.95)
    assert found[0] == pytest.approx((interval.high - interval.low) / 2 / interval.value, rel=0.25)


def test_the_least_precise_model_says_how_precise_all_are() -> None:
    samples = noisy(100, 0.05)
    three = np.column_stack([samples, samples[:, 0] * 1.5])
    assert half_width(three) == pytest.approx(half_width(samples), rel=0.2)
    timings = {name: timing(name, column) for name, column in zip("abc", three.T, strict=True)}
    assert precision(timings) == pytest.approx(half_width(three), rel=0.15)
    alone = half_width(100 + samples[:, :1])
    assert alone == pytest.approx(half_width(10 + samples[:, :1] / 10), rel=1e-6)  # of the median itself


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_an_interval_is_as_wide_as_its_confidence(confidence: float) -> None:
    from scipy.stats import norm

    found = [ratio_of(noisy(400, 0.05, seed), confidence) for seed in range(8)]
    wanted = float(norm.ppf(0.5 + confidence / 2)) * 2**0.5 * 1.2533 * 0.05 / 400**0.5
    assert np.mean([(one.high - one.low) / 2 / one.value for one in found]) == pytest.approx(
        wanted, rel=0.2
    )


def test_a_machine_that_is_slow_for_half_of_the_time_slows_both() -> None:
    """Medians over all rounds lie anywhere between the two speeds, and so would their ratio."""
    slow = np.where(np.arange(200) < 101, 1.0, 1.6)[:, None]
    found = ratio_of(slow * noisy(200, 0.02), 0.95)
    assert found.value == pytest.approx(0.8, abs=0.005)
    assert found.high - found.low < 0.02
    assert half_width(slow * noisy(200, 0.02)) < 0.01


def test_half_of_the_rounds_are_of_sessions_opened_in_the_opposite_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one that is opened later is faster by a percent: neither is favoured."""
    opened: list[str] = []
    seen: list[dict[str, Any]] = []

    def bind_(name: str, *given: Any, **options: Any) -> Any:
        opened.append(name)
        return bind(name, *given, **options)

    def interleave(timed: Any, **options: Any) -> np.ndarray:
        seen.append(options)
        late = opened[-1]
        runners = ["a", "b"][: len(timed)]
        return np.array([[1.0 if name == late else 1.1 for name in runners]] * 30)

    monkeypatch.setattr(latency, "bind", bind_)
    monkeypatch.setattr(latency, "interleave", interleave)
    monkeypatch.setattr(latency, "_warm", lambda timed, seconds: None)
    pair = {"a": network(), "b": network(5)}
    timings = benchmark(pair, provider="cpu", seconds=4.0, tolerance=0.01, seed=2)
    assert opened == ["a", "b", "b", "a"]
    assert list(timings) == ["a", "b"]
    assert ratio(timings["a"], timings["b"]).value == pytest.approx(1, abs=0.01)
    assert [one["seconds"] for one in seen] == [2.0, 2.0]
    assert [one["tolerance"] for one in seen] == pytest.approx([0.01 * 2**0.5] * 2)
    told: list[tuple[str, int, int]] = []
    benchmark(pair, provider="cpu", runs=7, progress=lambda *step: told.append(step))
    assert [one["runs"] for one in seen[2:]] == [3, 4]
    seen[-1]["progress"]("timing", 2, 4)
    assert told == [("timing", 5, 7)]
    benchmark(pair, provider="cpu", runs=1)
    benchmark({"a": network()}, provider="cpu", runs=7)
    assert [one["runs"] for one in seen[4:]] == [1, 7]


def test_rounds_end_once_the_interval_is_within_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = iter([0.03, 0.011, 0.0099, 0.0])
    monkeypatch.setattr(latency, "half_width", lambda samples: next(widths))
    found = latency.interleave([lambda: 1.0] * 2, runs=None, seconds=None, tolerance=0.01, seed=0)
    assert len(found) == 34  # after 20, 26 and 34
    assert next(widths) == 0.0


def test_models_are_warmed_up_and_timed_while_no_garbage_is_collected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, bool, dict[str, Any]]] = []

    def warm(timed: Any, seconds: float) -> None:
        seen.append(("warm", gc.isenabled(), {"seconds": seconds}))

    def interleave(timed: Any, **options: Any) -> np.ndarray:
        seen.append(("timed", gc.isenabled(), options))
        return np.ones((3, len(timed)))

    monkeypatch.setattr(latency, "_warm", warm)
    monkeypatch.setattr(latency, "interleave", interleave)
    benchmark({"net": network()}, provider="cpu", seed=4)
    benchmark({"net": network()}, provider="cpu", runs=7, warm_up=0.5, tolerance=None)
    assert [(kind, collects) for kind, collects, _ in seen] == [("warm", False), ("timed", False)] * 2
    assert gc.isenabled()
    options = [{k: o.get(k) for k in ("runs", "seconds", "tolerance", "seed")} for _, _, o in seen]
    assert options[0]["seconds"] == 3.0
    assert options[1] == {"runs": None, "seconds": 10.0, "tolerance": 0.01, "seed": 4}
    assert options[2]["seconds"] == 0.5
    assert options[3] == {"runs": 7, "seconds": None, "tolerance": None, "seed": 0}


@pytest.mark.parametrize(
    ("history", "steady"),
    [
        ([10.0] * 9, False),  # too few
        ([10.0] * 10, True),
        ([10.0] * 5 + [9.6] * 5, True),
        ([10.0] * 5 + [9.4] * 5, False),
        ([20.0, 10.0, 10.0, 10.0, 10.0, 10.4, 10.4, 10.4, 30.0, 10.4], True),  # medians of five
    ],
)
def test_a_model_runs_steadily_once_its_runs_take_what_they_took(
    history: list[float], steady: bool
) -> None:
    assert latency._steady(history) is steady


def test_models_take_turns_in_a_new_order_each_round() -> None:
    def orders(seed: int) -> list[list[int]]:
        called: list[int] = []
        timed = [partial(lambda at: called.append(at) or float(at), at) for at in range(4)]  # type: ignore[func-returns-value]
        found = latency.interleave(timed, runs=12, seconds=None, tolerance=None, seed=seed)
        assert (found == np.arange(4)).all()
        return [called[start : start + 4] for start in range(0, 48, 4)]

    first = orders(0)
    assert all(sorted(order) == [0, 1, 2, 3] for order in first)
    assert len({tuple(order) for order in first}) > 5
    assert orders(0) == first != orders(1)


def test_rounds_end_at_a_limit() -> None:
    found = latency.interleave([lambda: 1.0], runs=None, seconds=None, tolerance=None, seed=0)
    assert len(found) == 10_000


@pytest.mark.slow
def test_options_reach_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor time is that of one thread; inputs follow the seed and the batch."""
    seen: list[dict[str, Any]] = []

    def bind_(name: str, model: Any, chosen: Any, threads: int, feeds: Any, **options: Any) -> Any:
        seen.append({"threads": threads, "x": feeds["x"], **options})
        return bind(name, model, chosen, threads, feeds, **options)

    monkeypatch.setattr(latency, "bind", bind_)
    asked: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"clock": "processor", "threads": 3},
        {"threads": 3, "batch": 5},
    ]
    for options in asked:
        benchmark({"net": network()}, provider="cpu", runs=1, warm_up=0.0, **options)
    assert [one["threads"] for one in seen] == [0, 0, 1, 3]
    assert [one["x"].shape for one in seen] == [(1, 3), (1, 3), (1, 3), (5, 3)]
    assert np.array_equal(seen[0]["x"], seen[2]["x"])
    assert not np.array_equal(seen[0]["x"], seen[1]["x"])
    wall, processor = time.perf_counter_ns, time.thread_time_ns
    assert [one["clock"] for one in seen] == [wall, wall, processor, wall]


def test_gates_measure_latency_as_they_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def measured(models: Any, **options: Any) -> dict[str, Timing]:
        seen.update(options, models=list(models))
        first = np.array([*np.random.default_rng(0).uniform(3, 5, 39), 400.0])
        return {name: timing(name, first * (0.5 if name == "after" else 1)) for name in models}

    monkeypatch.setattr(latency, "benchmark", measured)
    gates = Gates(min_speedup=1.5, max_latency=3, batch=4, threads=2, provider="cpu")
    found = gates.measure(gates.prepare(network()), network(2))
    assert (seen["batch"], seen["threads"], seen["models"]) == (4, 2, ["before", "after"])
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(0.5)
    assert found.latency_ms == pytest.approx(2, rel=0.1)
    assert found.bytes == len(network(2).SerializeToString())


def test_a_comparison_is_of_the_second_model_with_the_first(known_runs: Runs) -> None:
    first = np.random.default_rng(0).uniform(3, 5, 40)
    known_runs(first, 0.5 * first)
    a, b = network(), network()
    values = onnx.numpy_helper.to_array(b.graph.initializer[0]) * np.float32(1.25)
    b.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, "w"))
    found = compare(a, b, provider="cpu")
    assert found.latency.value == pytest.approx(0.5)
    assert found.b.timing.median_ms == pytest.approx(0.5 * found.a.timing.median_ms)
    assert found.difference.max_rel == pytest.approx(0.25, rel=1e-5)  # of the first one's magnitude
    assert found.agreement == 1
