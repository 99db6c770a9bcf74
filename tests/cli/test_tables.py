"""What compare, benchmark, evaluate, inspect and sensitivity show and write of fixed figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.account import Refusal
from onnxcompress.cli import benchmark, evaluate, inspect, options, sensitivity, sweep
from onnxcompress.cli import compare as compare_command
from onnxcompress.cli.main import main
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.data.preprocessing_choice import PreprocessingChoice
from onnxcompress.evaluation.accuracy import Accuracy
from onnxcompress.evaluation.compare import Comparison, Side
from onnxcompress.evaluation.equivalence import Difference
from onnxcompress.evaluation.gate_results import GateMeasurements, judge
from onnxcompress.evaluation.inspection import group_rows
from onnxcompress.graph.blocks import Block, Discovery
from onnxcompress.graph.channel_groups.cut_tracer import CutGroup, CutGroups
from onnxcompress.graph.channel_groups.groups import ChannelGroup, ChannelGroups
from onnxcompress.runtime.bootstrap import Ratio
from onnxcompress.runtime.io_binding import Placement
from onnxcompress.runtime.latency import Timing
from onnxcompress.sensitivity.analysis import Sensitivity
from onnxcompress.sensitivity.rows import Row
from tests.helpers.folding import graph, weight

CHOICE = PreprocessingChoice(Preprocess(), "option")


def timing(name: str, median: float, samples: tuple[float, ...] = (1.0,), batch: int = 2) -> Timing:
    """Each figure is another multiple of the median."""
    return Timing(
        name, median, 1.25 * median, 0.5 * median, 1.5 * median, 2 * median, len(samples), batch,
        1000 * batch / median, "cpu", samples, Placement({"CPUExecutionProvider": 7}),
    )  # fmt: skip


def comparison() -> Comparison:
    a = Side("net.onnx", 2_000_000, 500, 4000, timing("net.onnx", 4.0), 0.93)
    b = Side("fast.onnx", 1_500_000, 400, 1000, timing("fast.onnx", 2.0), 0.91)
    difference = Difference(0.125, 0.03, "y", {"y": (0.125, 0.03)})
    return Comparison(a, b, Ratio(0.5, 0.4, 0.8), difference, 0.955, "200 images")


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_compare_shows_changes_over_what_was(capsys: pytest.CaptureFixture[str]) -> None:
    compare_command._show(comparison(), CHOICE)
    assert printed(capsys) == [
        "cpu, batch 2, 1 runs each",
        "net.onnx fast.onnx B / A",
        "size 2.00 MB 1.50 MB -25.0%",
        "parameters 500 400 -20.0%",
        "MACs 4.00 k 1.00 k -75.0%",
        "median latency 4.000 ms 2.000 ms × 0.500 [0.400, 0.800]",
        "top-1 93.00% 91.00% -2.00 points",
        "largest output difference: 1.25e-01 absolute, 3.00e-02 relative (output 'y')",
        "top-1 agreement: 95.50% on 200 images",
        f"images are {CHOICE}",
    ]


def test_gates_judge_the_second_model_of_a_comparison() -> None:
    facts = GateMeasurements.of(comparison(), "unit")
    assert facts == GateMeasurements(
        1_500_000,
        "200 images",
        (0.93, 0.91),
        0.955,
        2.0,
        Ratio(0.5, 0.4, 0.8),
        "cpu, batch 2",
        "unit",
    )
    limits = {"max_drop": 1.0, "min_agreement": 95, "max_latency": 1.5, "min_speedup": 2.0, "max_size": 1.6}
    verdicts = judge(limits, facts)
    assert [round(v.measured, 6) for v in verdicts] == [2.0, 95.5, 2.0, 2.0, 1.5]
    assert [v.passed for v in verdicts] == [False, True, False, True, True]
    assert [v.text for v in verdicts[:4]] == [
        "top-1 accuracy fell by 2.00 points (93.00% to 91.00% on 200 images), it may fall by 1",
        "the same top-1 class for 95.50 % of 200 images, at least 95 % is asked for",
        "median latency 2 ms (cpu, batch 2), at most 1.5 ms is allowed",
        "2.000 times as fast (95 % interval 1.250 to 2.500; cpu, batch 2), at least 2 is asked for",
    ]


def timed(batch: int) -> dict[str, Timing]:
    """The second model takes 0.8 of the first one's time in every round, the third 1.5."""
    first = np.linspace(1, 2, 30)
    return {
        name: timing(name, factor * batch, tuple(factor * first), batch)
        for name, factor in (("a", 1.0), ("b", 0.8), ("c", 1.5))
    }


def test_benchmark_shows_each_model_against_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    found = [timed(1), timed(8)]
    account = benchmark._account((1, 8), found, 1.0)
    names = [f"{name}, batch {batch}" for batch in (1, 8) for name in "abc"]
    assert [one["name"] for one in account["models"]] == names
    ratios = {name: one["value"] for name, one in account["ratios_to_first"].items()}
    assert ratios == pytest.approx({n: 0.8 if n[0] == "b" else 1.5 for n in names if n[0] != "a"})
    assert [one["batch"] for one in account["precision"]] == [1, 8]
    assert [one["asked"] for one in account["precision"]] == [0.01, 0.01]
    benchmark._show(found, account)
    text = printed(capsys)
    assert text[1:8] == [
        "model median mean min p90 p99 images/s ratio [95 %]",
        "a, batch 1 1.000 1.250 0.500 1.500 2.000 1000.0 1",
        "b, batch 1 0.800 1.000 0.400 1.200 1.600 1250.0 0.800 [0.800, 0.800]",
        "c, batch 1 1.500 1.875 0.750 2.250 3.000 666.7 1.500 [1.500, 1.500]",
        "a, batch 8 8.000 10.000 4.000 12.000 16.000 1000.0 1",
        "b, batch 8 6.400 8.000 3.200 9.600 12.800 1250.0 0.800 [0.800, 0.800]",
        "c, batch 8 12.000 15.000 6.000 18.000 24.000 666.7 1.500 [1.500, 1.500]",
    ]
    assert text[0] == "cpu, 30 / 30 runs each, ms"
    assert text[-1] == "nodes of c: CPUExecutionProvider 7"


def test_tolerances_are_percent_at_the_command_and_shares_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def measure(models: Any, **options: Any) -> dict[str, Timing]:
        seen.update(options, models=models)
        return timed(4)

    monkeypatch.setattr("onnxcompress.runtime.latency.benchmark", measure)
    benchmark._timed(("a.onnx", "b.onnx"), 4, tolerance=2.0, seed=3)
    assert (seen["tolerance"], seen["batch"], seen["seed"]) == (0.02, 4, 3)
    assert list(seen["models"].values()) == ["a.onnx", "b.onnx"]


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (None, "ratios within ± 1.2 %"),
        (0.02, "ratios within ± 1.2 %, as asked (± 2 %)"),
        (0.01, "ratios within ± 1.2 %, ± 1 % was asked for: give it more --seconds, or a quieter machine"),
    ],
)
def test_precision_is_told_in_percent(asked: float | None, text: str) -> None:
    precision = {"within": 0.0123, "asked": asked, "reached": None if asked is None else asked > 0.0123}
    assert options.precision_text(precision, True) == text


def test_evaluate_shows_wilsons_interval(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 90 of 100: 82.56 to 94.48 % (Wilson, JASA 22, 1927, eq. 1 with z = 1.96)."""
    evaluate._show("nets/net.onnx", "val", CHOICE, Accuracy(0.9, 0.99, 100, 1.26, "cpu"))
    assert printed(capsys)[:3] == [
        "accuracy on val, cpu",
        "model top-1 95 % interval top-5 images took",
        "net.onnx 90.00% 82.56% to 94.48% 99.00% 100 1.3 s",
    ]


def test_inspect_shows_shares_of_parameters_and_of_work(capsys: pytest.CaptureFixture[str]) -> None:
    from onnxcompress.cli.console import stdout

    block = Block("b1", "residual", "x", "y", ("N", 8, 4, 4), ("y",), 250, 1500, "s")
    inspect._show_blocks(stdout(), Discovery((block,), ()), {"macs": 2000, "parameters": 1000})
    assert printed(capsys) == [
        "1 block that can be dropped",
        "block kind shape parameters of all MACs of all",
        "b1 residual 8×4×4 250 25.0 % 1.50 k 75.0 %",
    ]


BLOCK = "a = Conv<pads=[1,1,1,1]>({x}, v) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, v) d = Add({x}, c)"
BODIES = {
    f"s = Conv<pads=[1,1,1,1]>(x, w) {BLOCK.format(x='s')} y = Relu(d)": "onnxcompress drop-blocks {} ",
    "s = Conv<pads=[1,1,1,1]>(x, w) y = Conv<pads=[1,1,1,1]>(s, v)": "onnxcompress drop-channels {} ",
    f"s = Conv<pads=[1,1,1,1]>(x, w) g = GlobalAveragePool(s) {BLOCK.format(x='g')} y = Relu(d)": (
        "onnxcompress quantize {} OUT.onnx"  # its block lies behind the features
    ),
    "y = Conv<pads=[1,1,1,1]>(x, w)": "onnxcompress quantize {} OUT.onnx --images FOLDER ",
    "q = QuantizeLinear(x, t) d = DequantizeLinear(q, t) y = Conv<pads=[1,1,1,1]>(d, w)": "the float model",
}
"""What a network computes, and the start of what is to be tried next."""


@pytest.mark.parametrize(("body", "words"), BODIES.items())
def test_inspect_ends_with_the_command_to_try(
    body: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arrays = {"w": weight(4, 3, 3, 3), "v": weight(4, 4, 3, 3), "t": np.array(0.1, np.float32)}
    used = {name: value for name, value in arrays.items() if f"{name})" in body}
    monkeypatch.chdir(tmp_path)
    onnx.save(graph("(float[1,3,8,8] x) => (float[1,4,h,k] y)", body, used), "my net.onnx")
    assert main(["inspect", "my net.onnx"]) == 0
    assert f"try next: {words.format(repr('my net.onnx'))}" in " ".join(printed(capsys))


def test_inspect_shows_groups_of_channels_and_why_others_stay(capsys: pytest.CaptureFixture[str]) -> None:
    from onnxcompress.cli.console import stdout

    stays = Refusal("y", "is an output of the model")
    free, fixed = (ChannelGroup(np.arange(n), (), why) for n, why in ((8, None), (4, stays)))
    found: tuple[CutGroup, ...] = (CutGroup("conv1", free, 250, 1500), CutGroup("last", fixed, 30, 70))
    groups = CutGroups(ChannelGroups(), found)
    assert group_rows(groups) == [
        {"name": "conv1", "channels": 8, "parameters": 250, "macs": 1500, "stays": None},
        {"name": "last", "channels": 4, "parameters": 30, "macs": 70, "stays": str(stays)},
    ]
    inspect._show_channels(stdout(), groups, {"macs": 2000, "parameters": 1000})
    lines = printed(capsys)
    assert lines[:3] == [
        "1 group of channels that can be cut",
        "group channels parameters of all MACs of all",
        "conv1 8 250 25.0 % 1.50 k 75.0 %",
    ]
    assert "last" in lines[-1]


def test_sweep_shows_the_figures_of_a_run() -> None:
    row = {"status": "done", "bytes": 1_500_000, "agreement": 0.955, "top1": 0.91, "ratio": 0.8}
    assert [cell.replace("\u00a0", " ") for cell in sweep.figures(row)] == [
        "done", "1.50 MB", "95.50 %", "91.00 %", "1.25×"
    ]  # fmt: skip
    assert sweep.figures({"status": "failed"}) == ["failed", "", "", "", ""]


def test_sensitivity_shows_the_most_costly_layers_first(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Row(layer, "Conv", f"w {layer}", 1500, "weight_bits", bits, error, changed)
        for layer, errors in (("low", (0.001, 0.02)), ("high", (0.0001, 0.3)))
        for bits, error, changed in zip((8, 4), errors, (0.02, 0.31), strict=True)
    ]
    sensitivity._show(Sensitivity(rows, (), []), 2.34, Path("plot.png"))
    assert printed(capsys) == [
        "Output error of 2 layers, each changed alone, and share of other top-1 classes",
        "layer weights weight 8 bits weight 4 bits",
        "high 1.50 k 1.00e-04 2 % 3.00e-01 31 %",
        "low 1.50 k 1.00e-03 2 % 2.00e-02 31 %",
        "took 2.3 s; drawn: plot.png",
    ]
