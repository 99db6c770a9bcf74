"""What the terminal says of fixed figures, word by word: every figure is another number."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from onnxcompress.account import BeforeAfter, Figures, InputSource, Refusal
from onnxcompress.cli.results.guard import show_guard, show_whole
from onnxcompress.cli.results.sensitivity_plot import title
from onnxcompress.cli.results.show import show_result
from onnxcompress.evaluation.fidelity import Fidelity, OutputFidelity, fidelity
from onnxcompress.evaluation.guard import Floors, GuardMeasurements, verdict
from onnxcompress.optimize.block_drop.figures import BlockRow, DropBlocksFigures
from onnxcompress.optimize.channel_drop.figures import ChannelGroupRow, DropChannelsFigures
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome
from onnxcompress.passes import Pass, PassResult, load_pass
from onnxcompress.passes.calibrate import Agreement, CalibrateFigures
from onnxcompress.passes.fp16.figures import HalfPrecisionFigures, KeptNode, ProviderRun
from onnxcompress.passes.quantize.figures import (
    Budget,
    FloatLayer,
    FloatLayers,
    QuantizedLayerRow,
    QuantizeFigures,
)
from onnxcompress.quantization.ort_fusion import OptimizedNodes
from onnxcompress.runtime.block_latency import Additivity, LatencyChange, Share
from onnxcompress.sensitivity.rows import Kind, Row


def shown(
    name: str,
    figures: Figures,
    *refusals: Refusal,
    guard: GuardMeasurements | None = None,
    **options: Any,
) -> list[str]:
    """Lines at the terminal, cells of tables apart by one space."""
    console = Console(file=io.StringIO(), width=300, highlight=False)
    pass_: Any = object.__new__(load_pass(name))
    show_result(console, pass_, PassResult(refusals=refusals, measured=figures, guard=guard), **options)
    return lines_of(console)


def lines_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().replace("┃", " ").replace("│", " ").splitlines()
    return [" ".join(line.split()) for line in lines if any(letter.isalnum() for letter in line)]


LATENCY = LatencyChange(10.0, 6.8, 0.68, 0.66, 0.71)
IMAGES = (InputSource("images", 48, 0, "photos/", "unit", "option"),)


def dropped(**changed: Any) -> DropBlocksFigures:
    rows = (
        BlockRow("first", "e1", True, Share(0.2, 0.15, 0.27), 0.0301, 0.15),
        BlockRow("second", "e2", False, Share(0.05, -0.01, 0.11), 0.4, 8.0),
        BlockRow("third", "e3", True, Share(0.1, 0.09, 0.12), 0.02, 0.2),
    )
    values: dict[str, Any] = {
        "feature": "relu",
        "preprocess": "unit",
        "latency": LATENCY,
        "blocks": rows,
        "order": ("third", "first"),
        "feature_error": 0.0144,
        "tuning": TuningOutcome(60, 30, 0, 0.0144, 0.0144, 75),
        "additivity": Additivity(Share(0.3, 0.24, 0.39), Share(0.32, 0.29, 0.34)),
        "inputs": IMAGES,
    }
    return DropBlocksFigures(**(values | changed))


def test_drop_channels_shows_each_group_and_what_became_less() -> None:
    groups = (
        ChannelGroupRow("stem", 32, 24, 1500, 250_000, 0.01234),
        ChannelGroupRow("last", 64, 64, 40_000, 3_000_000),
    )
    figures = DropChannelsFigures(
        "relu",
        "unit",
        LATENCY,
        groups,
        BeforeAfter(4_000_000, 3_200_000),
        BeforeAfter(50_000, 45_000),
        0.0144,
        TuningOutcome(60, 30, 20, 0.0225, 0.0144, 30),
        inputs=IMAGES,
    )
    assert shown("drop-channels", figures) == [
        "Groups of channels",
        "group channels kept parameters MACs predicted error",
        "stem 32 24 1.50 k 250 k 0.012",
        "last 64 64 40.0 k 3.00 M",
        "cut 1 of 2 groups; features matched at 'relu'",
        "learned from 48 images (photos/), preprocessed by unit (as asked for)",
        "latency 10.0 → 6.80 ms in onnxruntime: 32.0 % less (95 % interval 29.0 to 34.0 %)",
        "MACs 4.00 M → 3.20 M: 20.0 % less",
        "parameters 50.0 k → 45.0 k: 10.0 % less",
        "relative error of the features on inputs kept aside: 0.120 (root mean square)",
        "fine-tuning: relative error 0.150 before it, the weights of step 20 of 30 kept",
    ]


def test_drop_blocks_shows_each_block_and_the_latency() -> None:
    assert shown("drop-blocks", dropped())[2:] == [
        "block recoverability R latency share τ 95 % interval score R/τ decision",
        "first 0.0301 20.00 % 15.00 to 27.00 0.150 dropped 2.",
        "second 0.4000 5.00 % -1.00 to 11.00 8.000 kept",
        "third 0.0200 10.00 % 9.00 to 12.00 0.200 dropped 1.",
        "dropped 2 blocks; features matched at 'relu'",
        "learned from 48 images (photos/), preprocessed by unit (as asked for)",
        "latency 10.0 → 6.80 ms in onnxruntime: 32.0 % less (95 % interval 29.0 to 34.0 %)",
        "the blocks' shares τ add up to 30.0 % (24.0 to 39.0 %), measured are 32.0 % (29.0 to 34.0 %): "
        "they add up, within the intervals",
        "relative error of the features on inputs kept aside: 0.120 (root mean square)",
        "fine-tuning was discarded: none of 30 steps was better than the relative error 0.120",
    ]


def test_drop_blocks_says_which_clock_it_could_not_trust() -> None:
    for noisy in (False, True):
        text = shown("drop-blocks", dropped(noisy_latency=noisy))
        assert any(line.startswith("the machine was too busy to tell blocks") for line in text) == noisy
    for clock in ("wall", "processor"):
        text = shown("drop-blocks", dropped(latency=replace(LATENCY, clock=clock)))
        (line,) = [line for line in text if line.startswith("latency 10.0")]
        assert line.endswith("too busy for a wall clock") == (clock == "processor")


def quantized(**changed: Any) -> QuantizeFigures:
    rows = tuple(
        QuantizedLayerRow(f"l{at}", "Conv", 4, 8, (0.1, 0.2), 0.3, (-1.25, 6.5), 40.04 - at)
        for at in range(15)
    )
    values: dict[str, Any] = {
        "layers": (*rows, QuantizedLayerRow("alone", "Gemm", 2, 0, (0.1, 0.2), None, None, 11.26)),
        "channel_ranges": 3,
        "runtime": OptimizedNodes({"QLinearConv": 15}, {"Gemm": ("a", "b"), "Add": ("c",)}, 7),
        "output_snr_db": {"y": 17.25, "z": 9.04},
        "inputs": IMAGES,
    }
    return QuantizeFigures(**(values | changed))


def test_quantize_shows_the_noisiest_layers_and_the_outputs() -> None:
    text = shown("quantize", quantized())
    assert text[:4] == [
        "Layers with the most noise (12 of 16; all with --json)",
        "layer weight input input range signal to noise",
        "alone 2 bits float 11.3 dB",
        "l14 4 bits 8 bits -1.25 to 6.5 26.0 dB",
    ]
    assert text[13] == "l4 4 bits 8 bits -1.25 to 6.5 36.0 dB"
    assert text[15:] == [
        "onnxruntime fuses: 15 QLinearConv",
        "it computes with floats: 2 Gemm, 1 Add",
        "output 'y': signal to noise 17.2 dB on the inputs learned from (unseen ones were not compared)",
        "output 'z': signal to noise 9.0 dB on the inputs learned from (unseen ones were not compared)",
    ]


def test_quantize_leaves_the_noise_of_the_outputs_to_the_comparison_on_unseen_inputs() -> None:
    """Two lines with nearly the same figure would only be puzzling."""
    same = fidelity({"y": [np.ones((2, 3))]}, {"y": [np.ones((2, 3))]})
    compared = GuardMeasurements("2 images", 2, 0.1, same)
    for guard, lines in ((compared, 0), (replace(compared, fidelity=None, skipped="no"), 2)):
        assert sum("output '" in line for line in shown("quantize", quantized(), guard=guard)) == lines


def test_quantize_shows_what_tuning_gave() -> None:
    text = shown("quantize", quantized(tuning=TuningOutcome(12, 200, 160, 0.36, 0.0625, 200)))
    assert "fine-tuning: relative error 0.600 before it, the weights of step 160 of 200 kept" in text
    assert "relative error of the outputs on 12 inputs kept aside: 0.250 (root mean square)" in text
    assert not any("aside" in line for line in shown("quantize", quantized()))


def test_quantize_shows_which_layers_gain_no_time() -> None:
    rows = (
        FloatLayer("stem", -0.1, -0.12, -0.08, 0.02, 1),
        FloatLayer("deep", 0.001, -0.01, 0.01, 0.0005, 3),
    )
    change = LatencyChange(10.0, 9.0, 0.9, 0.88, 0.92, "openvino")
    text = "\n".join(shown("quantize", quantized(float_layers=FloatLayers(rows, change, 0.04, 0.02))))
    assert "gains no time on openvino" in text
    assert "stem" in text
    assert "-10.0 % (-12.0 to -8.0 %)" in text
    assert "+0.1 % (-1.0 to +1.0 %)" in text
    assert "variation 4 → 2 %" in text
    assert "10.0 % less" in text
    assert "gains no time" not in "\n".join(shown("quantize", quantized()))


def test_quantize_shows_what_a_budget_gave() -> None:
    budget = Budget("information", 4.21, 4.5, 1.234, {2: 1, 4: 15}, 0.5, "layers.json", 9.0)
    text = shown("quantize", quantized(budget=budget))
    assert text[15:18] == [
        "bits of the layers' weights: 1 with 2, 15 with 4; sensitivities: layers.json",
        "weights: 4.21 bits on average, 1.23 MB of information (budget 4.50 bits)",
        "fewer bits are stored in 8-bit types: the file is smaller only with --small-types",
    ]


def test_fp16_shows_its_errors_in_percent_of_the_deviation() -> None:
    figures = HalfPrecisionFigures(
        0.0042,
        math.inf,
        0.01,
        17,
        (KeptNode("exp", "Exp", 0.3),),
        2.0,
        ProviderRun("cpu", 0.0037),
        inputs=IMAGES,
    )
    assert shown("fp16", figures) == [
        "17 nodes compute in float16, 1 stay float32 to limit the error",
        "error of the outputs: 0.42 %, at most 1 % asked; with all nodes in float16: infinite",
        "measured on 48 images (photos/)",
        "run on cpu: error 0.37 %; a CPU computes it in float32, the gain is on GPUs",
    ]


def test_calibrate_shows_how_far_estimates_are_from_what_is_known() -> None:
    dead = {f"t{at}": tuple(range(at)) for at in range(1, 8)}
    figures = CalibrateFigures(20, 13, 7, dead, Agreement(5, 0.034, 1.12), inputs=IMAGES)
    assert shown("calibrate", figures) == [
        "statistics of 20 tensors: 13 estimated, 7 kept from BatchNorm",
        "estimated from 48 images (photos/), preprocessed by unit (as asked for)",
        "compared with BatchNorm (5 tensors): means off by 0.034 standard deviations, standard deviations "
        "1.12 times as large (medians over channels)",
        *(f"{at} channels do not vary: t{at}" for at in (7, 6, 5, 4, 3)),
        "channels of 2 more tensors do not vary (all with --json)",
        "nothing to change",
    ]


def measured(*, exact: bool = False) -> GuardMeasurements:
    outputs = (
        OutputFidelity("near", 40.0, 38.0, 0.5, 0.01, 0.97),
        OutputFidelity("far", 21.04, 16.06, 0.25, 0.02, 0.75),
    )
    return GuardMeasurements("16 images", 16, 1.0, Fidelity(outputs), max_rel=0.1 if exact else None)


@pytest.mark.parametrize(
    ("floors", "start"),
    [
        (Floors(7, 3), ""),
        (Floors(17, 3), "WARNING: "),
        (Floors(30, 20), "WARNING, written by --force: "),
    ],
)
def test_the_guard_shows_the_worst_output_and_how_many_keep_their_class(floors: Floors, start: str) -> None:
    console = Console(file=io.StringIO(), width=300)
    judged = verdict(measured(), floors, advice=("try less",), force=True)
    show_whole(console, measured(), judged)
    below = {"": "", "WARNING: ": ", below 17 dB"}.get(start, ", below 20 dB")
    assert lines_of(console) == [
        f"{start}all passes together: output 'far': variation to noise 16.1 dB (signal to noise 21.0 dB)"
        f"{below}, the same class for 75 %, on 16 images",
        *(["try less"] if start else []),
    ]


def test_a_pass_that_keeps_the_function_shows_the_largest_difference() -> None:
    console = Console(file=io.StringIO(), width=300)
    pass_: Any = object.__new__(load_pass("fold-bn"))
    assert isinstance(pass_, Pass)
    found = measured(exact=True)
    show_guard(console, pass_, found, verdict(found, Floors()))
    assert lines_of(console) == [
        "largest output difference: 2.50e-01 absolute, 2.00e-02 relative (output 'far'), on 16 images"
    ]


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("sparsity", 0.5, "50 % zeros"),
        ("weight_bits", 4, "weight 4 bits"),
        ("activation_bits", 8, "input 8 bits"),
    ],
)
def test_changes_of_the_sensitivity_plot(kind: Kind, value: float, text: str) -> None:
    assert title(Row("layer", "Conv", "w", 10, kind, value, 0.1, None)) == text
