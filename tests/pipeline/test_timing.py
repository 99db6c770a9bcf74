"""Passes that are to make a network faster end with its latency, before and after."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxcompress.cli.main import main
from onnxcompress.errors import CompressWarning, ModelError
from onnxcompress.formatting import milliseconds
from onnxcompress.model import Model, load
from onnxcompress.optimize.executor.open_batch import timed_batch
from onnxcompress.passes import CATALOGUE, load_pass
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.quantize import Quantize
from onnxcompress.pipeline import Pipeline, timing
from onnxcompress.pipeline.cache import Cache
from onnxcompress.runtime.block_latency import LatencyChange, latency_text
from onnxcompress.runtime.timing_options import TimingOptions
from tests.helpers.folding import graph, weight

FEW = {
    "quantize": ["--synthetic", "4", "--inputs", "procedural"],
    "prune": ["--synthetic", "4", "--inputs", "procedural", "--scope", "layer"],
    "fp16": [],
}
"""Options with which each timed pass is quick."""
KEYS = {"before_ms", "after_ms", "ratio", "low", "high", "provider", "batch", "clock"}


@pytest.fixture
def net(tmp_path: Path) -> str:
    arrays = {"w": weight(4, 3, 3, 3), "v": weight(4, 4, 1, 1)}
    body = "c = Conv<pads = [1,1,1,1]>(x, w) r = Relu(c) y = Conv(r, v)"
    onnx.save(
        graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", body, arrays, opset=21), tmp_path / "net.onnx"
    )
    return str(tmp_path / "net.onnx")


def test_all_timed_passes_are_tested() -> None:
    assert {e.name for e in CATALOGUE if load_pass(e.name).timed} == FEW.keys()


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, ("cuda", ("tf32=off",), 8, 2)),
        ({"threads": 1}, ("cuda", ("tf32=off",), 8, 1)),
        ({"latency_batch": 4}, ("cuda", ("tf32=off",), 4, 2)),
        ({"provider": "cpu"}, ("cpu", (), 1, 0)),
        ({"provider": "openvino", "latency_batch": 3}, ("openvino", (), 3, 0)),
    ],
)
def test_what_a_pass_says_of_its_clock_counts_more(own: dict[str, Any], expected: tuple[Any, ...]) -> None:
    given = TimingOptions("cuda", latency_batch=8, provider_options=("tf32=off",), threads=2)
    found = timing.options_for(Quantize(**own), given)
    assert found is not None
    assert (found.provider, found.provider_options, found.latency_batch, found.threads) == expected


def test_a_clock_that_decides_nothing_is_not_noted() -> None:
    names = {"provider", "provider_options", "latency_batch", "threads"}
    assert not names & Quantize(provider="openvino").options().keys()
    assert names < Quantize(provider="openvino", only_faster=True).options().keys()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_clock")
@pytest.mark.parametrize("name", FEW)
def test_a_pass_ends_with_the_latency_and_leaves_the_file_as_it_is(
    name: str, net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs: list[bytes] = []
    for more, keys in ((["--latency", "--latency-batch", "2"], KEYS), (["--no-latency"], None)):
        out = tmp_path / f"{len(outputs)}.onnx"
        assert main([name, net, str(out), *FEW[name], *more, "--json", "--no-verify"]) == 0
        latency = json.loads(capsys.readouterr().out)["measured"].get("latency")
        assert keys == (None if latency is None else latency.keys())
        if latency is not None:
            assert (latency["provider"], latency["batch"]) == ("cpu", 2)
            assert 0 < latency["low"] <= latency["high"]
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("after", "low", "high", "words"),
    [
        (5.0, 0.49, 0.51, "50.0 % less (95 % interval 49.0 to 51.0 %)"),
        (
            10.0,
            0.99,
            1.02,
            "0.0 % less (95 % interval -2.0 to 1.0 %); no gain there that could be measured",
        ),
        (12.0, 1.1, 1.3, "20.0 % more (95 % interval 10.0 to 30.0 %); it is slower there, not faster"),
    ],
)
def test_a_sentence_says_where_it_is_no_gain(after: float, low: float, high: float, words: str) -> None:
    change = LatencyChange(10.0, after, after / 10, low, high, "cuda (tf32 on)", 8)
    text = latency_text(change)
    assert (
        text == f"latency 10.0 → {milliseconds(after)} in onnxruntime on cuda (tf32 on), batch 8: {words}"
    )


def test_the_sentence_is_printed_and_the_pass_is_told_to_be_no_gain_before(
    net: str, tmp_path: Path, fixed_clock: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fixed_clock([10.0, 12.0])
    out, page = tmp_path / "o.onnx", tmp_path / "o.html"
    assert main(["fp16", net, str(out), "--latency", "--provider", "cpu", "--report", str(page)]) == 0
    printed = capsys.readouterr()
    assert "20.0 % more (95 % interval 20.0 to 20.0 %); it is slower there" in printed.out
    assert printed.err.startswith("note: fp16: a CPU computes float16 in float32")
    assert "it is slower there" in page.read_text("utf-8").replace("\u00a0", " ")


@pytest.mark.slow
def test_a_busy_machine_is_timed_by_the_processors_clock(
    net: str, fixed_clock: Callable[..., None]
) -> None:
    fixed_clock([10.0, 5.0], jitter=0.9)
    run = Pipeline([HalfPrecision()]).run(load(net), timing=TimingOptions(provider="cpu"))
    found = run.steps[0].result.latency
    assert found is not None
    assert found.clock == "processor"
    assert "by processor time on one thread" in latency_text(found)


def test_a_provider_that_cannot_start_is_an_error_before_the_work(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Quantize, "apply", lambda *_: pytest.fail("it began to work"))
    argv = ["quantize", net, str(tmp_path / "o.onnx"), "--provider", "openvino"]
    assert main([*argv, "--latency"]) == 1
    assert "provider openvino" in capsys.readouterr().err
    with pytest.raises(pytest.fail.Exception):
        main([*argv, "--no-latency"])


def test_a_result_that_cannot_be_timed_is_kept_with_a_note(
    net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ModelError("no kernel")

    monkeypatch.setattr("onnxcompress.runtime.stopwatch.benchmark", refuse)
    with pytest.warns(CompressWarning, match="the latency was not measured: no kernel"):
        run = Pipeline([HalfPrecision()]).run(load(net), timing=TimingOptions())
    assert run.steps[0].result.modified
    assert run.steps[0].result.latency is None


@pytest.mark.slow
def test_chains_are_timed_step_by_step_and_as_a_whole_also_from_the_cache(
    net: str, tmp_path: Path, fixed_clock: Callable[..., None]
) -> None:
    fixed_clock([10.0, 5.0])
    chain = Pipeline([Prune(scope="layer", reconstruct=False), HalfPrecision()])
    for cached in (False, True):
        run = chain.run(load(net), cache=Cache(tmp_path / "kept"), timing=TimingOptions())
        assert [step.cached for step in run.steps] == [cached] * 2
        assert all(step.result.latency is not None for step in run.steps)
        assert run.latency is not None
        assert run.latency.ratio == 0.5
    assert chain.run(load(net), cache=Cache(tmp_path / "kept")).steps[0].result.latency is None
    alone = Pipeline([HalfPrecision()]).run(load(net), timing=TimingOptions())
    assert alone.latency is None  # its step has the same


def test_nothing_is_timed_where_nobody_sees_it(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "change", lambda *_: pytest.fail("timed"))
    assert main(["fp16", net, str(tmp_path / "o.onnx"), "--latency", "--quiet"]) == 0
    result = Pipeline([Prune()]).run(load(str(tmp_path / "o.onnx")), timing=TimingOptions()).steps[0].result
    assert not result.modified  # float16 weights are not pruned
    assert result.latency is None


@pytest.mark.slow
def test_a_recipe_says_where_latency_is_measured(
    net: str, tmp_path: Path, fixed_clock: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fixed_clock([10.0, 5.0])
    recipe = tmp_path / "r.yaml"
    recipe.write_text("passes: [fp16]\ntiming: {latency_batch: 3, provider: cpu}\n")
    out = str(tmp_path / "o.onnx")
    for more, batch in ((["--latency"], 3), (["--latency", "--latency-batch", "4"], 4)):
        assert main(["run", str(recipe), net, out, "--no-cache", "--json", *more]) == 0
        account = json.loads(capsys.readouterr().out)
        assert account["steps"][0]["measured"]["latency"]["batch"] == batch
        assert account["latency"] is None


@pytest.mark.parametrize(
    ("pass_", "provider", "batch", "words"),
    [
        (Quantize(), "cuda", 1, "fuses no integer layers on cuda"),
        (Quantize(), "cpu", 1, ""),
        (Quantize(activation_bits=0), "cpu", 1, "weights alone"),
        (Quantize(weight_bits=4, activation_bits=6), "tensorrt", 1, "8 bits only"),
        (HalfPrecision(), "cuda", 1, "batch 1"),
        (HalfPrecision(), "cuda", 8, ""),
        (HalfPrecision(), "cpu", 8, "float32"),
        (Prune(), "cuda", 1, "zeros are computed"),
        (Prune(pattern="2:4"), "tensorrt", 1, ""),
    ],
)
def test_what_a_provider_has_no_kernels_for_is_known(
    pass_: Any, provider: str, batch: int, words: str
) -> None:
    found = pass_.no_gain_on(provider, batch)
    assert words in found
    assert bool(words) == bool(found)


def test_a_batch_that_the_file_fixes_is_told_where_another_was_asked_for() -> None:
    fixed, free = (
        Model.from_proto(graph(f"(float[{batch},3] x) => (float[{batch},3] y)", "y = Relu(x)", {}))
        for batch in ("4", "N")
    )
    with pytest.warns(CompressWarning, match="--latency-batch 8: the file fixes the batch to 4"):
        assert timed_batch(fixed, 8) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [timed_batch(fixed, 1), timed_batch(fixed, 4), timed_batch(free, 8)] == [4, 4, 8]
