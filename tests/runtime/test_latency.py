"""Latency: what is refused, what is reported, and the statistics; never how fast this machine is."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.errors import CompressWarning, ModelError, OptionError, RuntimeUnavailable
from onnxcompress.model import Model
from onnxcompress.model.model_like import ModelLike, display_names
from onnxcompress.runtime import latency
from onnxcompress.runtime.io_binding import Placement, _check_provider, placement_of
from onnxcompress.runtime.latency import Timing, benchmark, interleave, precision, ratio
from onnxcompress.runtime.session import cuda_devices, pick_provider, session


def network(shape: str = "N,3,4,4") -> onnx.ModelProto:
    return onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[{shape}] x) => (float[{shape}] y) {{ r = Relu(x)  y = Add(r, x) }}
    """)


def timing(name: str, samples: np.ndarray) -> Timing:
    middle = float(np.median(samples))
    values = tuple(float(s) for s in samples)
    return Timing(name, middle, 0, 0, 0, 0, len(samples), 1, 0, "cpu", values)


@pytest.mark.parametrize(
    "declared", ["float[N,3,4,4] y", "float[N,M] y", "float y", "float[] y", "seq(float) y"]
)
def test_outputs_of_another_rank_than_the_file_declares(declared: str) -> None:
    """onnxruntime computes them with a warning, and refuses the memory of the run before."""
    body = "y = SequenceConstruct(x)" if declared.startswith("seq") else "r = Relu(x) y = Add(r, x)"
    proto = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N,3,4,4] x) => ({declared}) {{ {body} }}
    """)
    assert benchmark({"a": proto}, runs=3, warm_up=0)["a"].runs == 3


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch: 0"),
        ({"runs": 0}, "runs: 0"),
        ({"seconds": 0.0}, "seconds: 0"),
        ({"tolerance": -1.0}, "tolerance: -1"),
        ({"threads": -1}, "threads: -1"),
        ({"provider": "cud"}, "did you mean 'cuda'"),
        ({"shapes": {"z": (1,)}}, "no model has this input; inputs are x"),
        ({"shapes": {"x": (1, 4, 4, 4)}}, "expected the shape Nx3x4x4, got 1x4x4x4"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        benchmark({"a": network()}, **options)  # type: ignore[arg-type]


def test_no_models() -> None:
    with pytest.raises(OptionError, match="no model"):
        benchmark({})


def test_open_dimensions_get_a_usual_size_and_a_warning() -> None:
    with pytest.warns(
        CompressWarning, match="run at 1x3x224x224, a usual size: choose another with --input-shape x="
    ):
        benchmark({"a": network("N,3,H,W")}, runs=1)


def test_fixed_batch_must_be_the_one_asked_for() -> None:
    with pytest.raises(OptionError, match="its batch is fixed to 8, got 1; use batch 8"):
        benchmark({"a": network("8,3,4,4")}, runs=1)


def test_a_single_run_tells_no_interval() -> None:
    found = benchmark({"a": network(), "b": network()}, runs=1, warm_up=0)
    between = ratio(found["a"], found["b"])
    assert between.value > 0
    assert np.isnan([between.low, between.high]).all()
    assert precision(found) == np.inf


@pytest.mark.parametrize("runs", [3, 4])
def test_progress_counts_the_runs_that_were_asked_for(runs: int) -> None:
    told: list[tuple[str, int, int]] = []
    benchmark(
        {"a": network(), "b": network()},
        runs=runs,
        warm_up=0,
        progress=lambda *step: told.append(step),
    )
    assert told == [("timing, rounds", done, runs) for done in range(1, runs + 1)]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a folder; name an ONNX file"):
        benchmark({"folder": tmp_path})


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.onnx: no such file"):
        benchmark({"a": tmp_path / "none.onnx"}, runs=1)


def test_a_model_onnxruntime_refuses_is_one_line() -> None:
    broken = network()
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match="onnxruntime cannot load it") as caught:
        session(broken, provider="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(cuda_devices() > 0, reason="there is a GPU")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_is_an_error_with_its_remedy(
    provider: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeUnavailable, match=f"provider {provider}: .*pip install") as caught:
        benchmark({"a": network()}, provider=provider, runs=1)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(cuda_devices() > 0, reason="there is a GPU")
def test_auto_is_the_cpu_without_a_gpu() -> None:
    assert pick_provider("auto").name == "cpu"


def test_no_node_on_the_provider_is_an_error() -> None:
    with pytest.raises(RuntimeUnavailable, match="no node ran on CUDAExecutionProvider"):
        _check_provider("a", "cuda", Placement({"CPUExecutionProvider": 3}))


# what is reported


def test_reports_all_models_in_order() -> None:
    timings = benchmark({"b": network(), "a": network()}, runs=7, batch=2, threads=1)
    assert list(timings) == ["b", "a"]
    for one in timings.values():
        assert (one.runs, one.batch, one.provider) == (7, 2, "cpu")
        assert len(one.samples_ms) == 7
        assert 0 < one.min_ms <= one.median_ms <= one.p90_ms <= one.p99_ms
        assert one.throughput == pytest.approx(2 * 1000 / one.median_ms)
        assert one.placement.nodes["CPUExecutionProvider"] >= 1
        assert "samples_ms" not in json.loads(json.dumps(one.as_dict()))


def test_accepts_a_model_in_every_form(tmp_path: Path) -> None:
    proto = network()
    onnx.save(proto, tmp_path / "net.onnx")
    forms: dict[str, ModelLike] = {
        "proto": proto,
        "bytes": proto.SerializeToString(),
        "path": tmp_path / "net.onnx",
        "model": Model.from_proto(proto),
    }
    assert set(benchmark(forms, runs=1, threads=1)) == set(forms)


def test_shapes_fill_open_dimensions() -> None:
    timings = benchmark({"a": network("N,3,H,W")}, runs=1, threads=1, shapes={"x": (5, 3, 6, 6)})
    assert timings["a"].batch == 5


def test_garbage_collection_is_back_on() -> None:
    benchmark({"a": network()}, runs=1, threads=1)
    assert gc.isenabled()


def test_display_names() -> None:
    assert display_names(["d/a.onnx", "d/b.onnx"]) == ["a.onnx", "b.onnx"]
    assert display_names(["d/a.onnx", "e/a.onnx"]) == ["d/a.onnx", "e/a.onnx"]
    assert display_names(["a.onnx", "a.onnx"]) == ["a.onnx (1)", "a.onnx (2)"]


def test_placement_tells_computing_from_shapes() -> None:
    def event(name: str, provider: str, shape: list[int]) -> dict[str, Any]:
        args = {"provider": provider, "op_name": "Op", "output_type_shape": [{"float": shape}]}
        return {"cat": "Node", "name": f"{name}_kernel_time", "args": args}

    events: list[dict[str, Any]] = [
        {"cat": "Session", "name": "model_run"},
        event("conv", "CUDAExecutionProvider", [1, 8, 4, 4]),
        event("nms", "CPUExecutionProvider", [1, 8, 4]),
        event("gather", "CPUExecutionProvider", [4]),
        event("size", "CPUExecutionProvider", []),
    ]
    found = placement_of(events, "cuda")
    assert found.nodes == {"CUDAExecutionProvider": 1, "CPUExecutionProvider": 3}
    assert found.computed_on_cpu == ("nms (Op)",)
    assert found.shapes_on_cpu == ("gather (Op)", "size (Op)")


@pytest.mark.gpu
@pytest.mark.skipif(cuda_devices() == 0, reason="there is no GPU")
def test_cuda_runs_on_cuda() -> None:
    timings = benchmark({"a": network(), "b": network()}, provider="cuda", runs=3)
    assert timings["a"].placement.nodes["CUDAExecutionProvider"] >= 1


# the rounds


def recorder(calls: list[str], name: str, value: float = 1.0) -> Callable[[], float]:
    def run() -> float:
        calls.append(name)
        return value

    return run


def test_each_round_runs_each_model_once_in_changing_order() -> None:
    calls: list[str] = []
    timed = [recorder(calls, "a", 1), recorder(calls, "b", 2), recorder(calls, "c", 3)]
    samples = interleave(timed, runs=20, seconds=None, tolerance=None, seed=0)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert np.array_equal(samples, np.tile([1.0, 2.0, 3.0], (20, 1)))


def test_same_seed_same_order() -> None:
    first: list[str] = []
    second: list[str] = []
    for calls in (first, second):
        timed = [recorder(calls, "a"), recorder(calls, "b")]
        interleave(timed, runs=10, seconds=None, tolerance=None, seed=3)
    assert first == second


def test_time_limit_ends_the_rounds_but_not_before_the_third() -> None:
    ticks = iter(float(i) for i in range(100))
    timed = [recorder([], "a")]
    samples = interleave(timed, runs=None, seconds=5.5, tolerance=None, seed=0, clock=lambda: next(ticks))
    assert len(samples) == 6
    late = interleave(timed, runs=None, seconds=1e-9, tolerance=None, seed=0)
    assert len(late) == 3


def test_ends_once_the_ratio_is_settled() -> None:
    rng = np.random.default_rng(0)

    def steady() -> float:
        return 1 + 0.001 * float(rng.random())

    def noisy() -> float:
        return 1 + 2 * float(rng.random())

    calm = interleave([steady, steady], runs=None, seconds=None, tolerance=0.01, seed=0)
    assert len(calm) == 20
    wild = interleave([steady, noisy], runs=None, seconds=None, tolerance=0.05, seed=0)
    assert len(wild) > 100


# the ratio


def test_ratio_survives_drift_that_hits_both() -> None:
    rng = np.random.default_rng(1)
    drift = 1 + np.linspace(0, 1, 400)
    a = drift * (1 + 0.01 * rng.standard_normal(400))
    b = 2 * drift * (1 + 0.01 * rng.standard_normal(400))
    found = ratio(timing("a", a), timing("b", b))
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(2, rel=0.01)
    assert found.high - found.low < 0.1


def test_ratio_interval_grows_with_confidence_and_is_the_same_each_time() -> None:
    rng = np.random.default_rng(2)
    a, b = timing("a", 1 + rng.random(60)), timing("b", 1 + rng.random(60))
    narrow, wide = ratio(a, b, confidence=0.5), ratio(a, b, confidence=0.99)
    assert wide.high - wide.low > narrow.high - narrow.low
    assert ratio(a, b) == ratio(a, b)


def test_ratio_refuses_runs_that_were_not_interleaved() -> None:
    with pytest.raises(OptionError, match="time them together"):
        ratio(timing("a", np.ones(3)), timing("b", np.ones(4)))
    with pytest.raises(OptionError, match="confidence"):
        ratio(timing("a", np.ones(3)), timing("b", np.ones(3)), confidence=1.5)


def test_the_interval_is_looked_at_again_after_a_third_more_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def half_width(samples: np.ndarray) -> float:
        looked.append(len(samples))
        return 0.1 if len(looked) < 3 else 0.001

    monkeypatch.setattr(latency, "half_width", half_width)
    samples = interleave([lambda: 1.0], runs=None, seconds=None, tolerance=0.01, seed=0)
    assert looked == [20, 26, 34]
    assert len(samples) == 34


@pytest.mark.parametrize(("later", "steady"), [(1.04, True), (0.96, True), (1.06, False), (0.9, False)])
def test_a_model_is_warm_once_five_runs_take_what_the_five_before_did(later: float, steady: bool) -> None:
    assert latency._steady([9.0] * 3 + [1.0] * 5 + [later] * 5) == steady
    assert not latency._steady([1.0] * 9)
