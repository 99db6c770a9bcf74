"""What the sections of the report say of fixed figures: sentences, cells of tables, rows of charts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.account import InputSource
from onnxcompress.evaluation.fidelity import Fidelity, OutputFidelity
from onnxcompress.evaluation.guard import Floors, GuardMeasurements, verdict
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop.figures import BlockRow, DropBlocksFigures
from onnxcompress.optimize.channel_drop.figures import ChannelGroupRow, DropChannelsFigures
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.drop_channels import DropChannels
from onnxcompress.passes.quantize import Quantize
from onnxcompress.passes.quantize.figures import QuantizedLayerRow, QuantizeFigures
from onnxcompress.quantization.ort_fusion import OptimizedNodes
from onnxcompress.report import LayerSize, Material
from onnxcompress.report.build import _lead
from onnxcompress.report.charts import Bars, Intervals, Spread
from onnxcompress.report.collect import layer_sizes
from onnxcompress.report.elements import Fold, Part, Plot, Prose, Section, Table, Terms
from onnxcompress.report.sections.layers import blocks, channels, noise, sensitivity
from onnxcompress.report.sections.measurements import latency, scores
from onnxcompress.report.sections.model import inputs, model, sizes
from onnxcompress.report.sections.passes import _guard, plain_terms
from onnxcompress.runtime.block_latency import Additivity, LatencyChange, Share
from tests.helpers.folding import graph
from tests.helpers.results import step_of


def parts_of(section: Section | None) -> list[Part]:
    assert section is not None
    return list(section.parts)


def prose(section: Section | None) -> list[str]:
    return [part.text.replace("\u00a0", " ") for part in parts_of(section) if isinstance(part, Prose)]


def plots(section: Section | None) -> list[Plot]:
    return [part for part in parts_of(section) if isinstance(part, Plot)]


def table(section: Section | None) -> Table:
    """The first table, in view or folded away."""
    for part in parts_of(section):
        inner = part.parts if isinstance(part, Fold) else [part]
        for one in inner:
            if isinstance(one, Table):
                return one
    raise AssertionError


def timing(name: str, median: float, batch: int = 1) -> dict[str, Any]:
    times = {"median_ms": median, "mean_ms": 1.25 * median, "min_ms": 0.5 * median}
    times |= {"p90_ms": 1.5 * median, "p99_ms": 2 * median, "throughput": 1000 * batch / median}
    return times | {"name": name, "batch": batch, "runs": 40, "provider": "cpu", "settings": {}}


def side(name: str, size: int, top1: float | None, ms: float) -> dict[str, Any]:
    return {"name": name, "bytes": size, "top1": top1, "timing": timing(name, ms)}


def comparison(**changed: Any) -> dict[str, Any]:
    return {
        "a": side("net", 2_000_000, 0.93, 4.0),
        "b": side("fast", 1_500_000, 0.91, 2.0),
        "latency": {"value": 0.5, "low": 0.4, "high": 0.8},
        "agreement": 0.955,
        "inputs": "200 images",
        "difference": {"max_abs": 0.0123, "max_rel": 0.456, "output": "y"},
    } | changed


# outcomes of commands


def test_the_fastest_of_several_models_leads_a_benchmark() -> None:
    models = [timing("slow", 4.0), timing("fast", 2.0), timing("slower", 5.0)]
    ratios = {name: {"value": v, "low": v - 0.1, "high": v + 0.2} for name, v in (("fast", 0.5),)}
    lead = _lead(Material("benchmark", {"models": models, "ratios_to_first": ratios}))
    assert [line.replace("\u00a0", " ") for line in lead] == [
        "fast: 2.00 ms at the median on the CPU, the fastest of 3.",
        "fast takes 0.500 of slow's time (95 % interval 0.400 to 0.700).",
    ]
    (alone,) = _lead(Material("benchmark", {"models": models[:1], "ratios_to_first": {}}))
    assert alone.replace("\u00a0", " ") == "slow: 4.00 ms at the median on the CPU, 250 images a second."


def test_accuracy_leads_an_evaluation_with_its_interval() -> None:
    account = {"top1": 0.912, "top5": 0.99, "count": 500, "top1_interval": [0.884, 0.934]}
    (lead,) = _lead(Material("evaluate", account))
    assert lead.replace("\u00a0", " ") == (
        "91.20 % of 500 images are classified right (95 % interval 88.40 to 93.40 %)."
    )


def rows(count: int = 3) -> list[dict[str, Any]]:
    """Errors that rise and fall along the network; the second layer is the most sensitive at 4 bits."""
    shape = [0.02, 0.3, 0.1, *np.linspace(0.01, 0.05, max(count - 3, 0))]
    return [
        {"layer": f"l{at}", "kind": kind, "value": value, "error": error * factor, "changed": 0.126}
        for at, error in enumerate(shape[:count])
        for kind, value, factor in (
            ("weight_bits", 8, 0.01), ("weight_bits", 4, 1), ("sparsity", 0.5, 0.5), ("sparsity", 0.9, 2)
        )
    ]  # fmt: skip


def test_the_most_sensitive_layer_leads_a_sensitivity_analysis() -> None:
    (lead,) = _lead(Material("sensitivity", {"rows": rows()}))
    assert lead.replace("\u00a0", " ") == (
        "l1 matters most: with 90 % of its weights zero alone, the outputs' error is 60.00 % of their "
        "variance."
    )


# sections


def test_the_strongest_change_of_each_kind_is_drawn() -> None:
    section = sensitivity(Material("sensitivity", {"rows": rows(), "refusals": []}))
    four, ninety = plots(section)
    assert four.title.startswith("One layer with 4-bit weights")
    assert "l1 matters most (30 %)." in four.finding.replace("\u00a0", " ")
    assert ninety.title.replace("\u00a0", " ").startswith("One layer with 90 % of its weights zero")
    assert "l1 matters most (60 %)." in ninety.finding.replace("\u00a0", " ")
    assert isinstance(four.chart, Bars)
    assert [name for name, _ in four.chart.rows] == ["l0", "l1", "l2"]
    assert [value for _, (value,) in four.chart.rows] == pytest.approx([2, 30, 10])
    cells = [[cell.replace("\u00a0", " ") for cell in row] for row in table(section).rows]
    assert cells[1] == ["l0", "4-bit weights", "2.000 %", "12.6 %"]
    assert cells[3] == ["l0", "90 % of its weights zero", "4.000 %", "12.6 %"]


def test_of_many_layers_the_most_sensitive_are_drawn_in_their_order() -> None:
    found = rows(100)
    (chart, _) = plots(sensitivity(Material("sensitivity", {"rows": found})))
    assert isinstance(chart.chart, Bars)
    drawn = [name for name, _ in chart.chart.rows]
    assert len(drawn) == 60
    assert drawn == ["l1", "l2", *(f"l{at}" for at in range(42, 100))]
    assert "The 60 most sensitive of 100 layers are drawn." in chart.finding


def test_blocks_are_shown_with_their_shares_in_percent() -> None:
    figures = DropBlocksFigures(
        "f",
        "",
        LatencyChange(10.0, 9.0, 0.9, 0.8, 0.95, clock="processor"),
        (
            BlockRow("one", "e1", False, Share(0.2, 0.15, 0.27), 0.03, 0.15),
            BlockRow("two", "e2", True, Share(0.1, 0.05, 0.12), 0.02, 0.2),
        ),
        noisy_latency=True,
        order=("two",),
        feature_error=0.0144,
        tuning=TuningOutcome(60, 30, 20, 0.0225, 0.0144, 30),
        additivity=Additivity(Share(0.3, 0.24, 0.28), Share(0.32, 0.29, 0.34)),
    )
    section = blocks(Material("drop-blocks", {}, [step_of(DropBlocks(blocks=1), figures)]))
    assert table(section).rows == [
        ["one", "kept", "0.0300", "20.00 % (15.00 to 27.00)", "0.150"],
        ["two", "dropped, 1.", "0.0200", "10.00 % (5.00 to 12.00)", "0.200"],
    ]
    assert table(section).marked == {1}
    assert prose(section) == [
        "1 of 2 blocks were dropped: two.",
        "The machine was too busy to tell blocks apart: their share was taken by multiply-adds.",
        "The machine was too busy for a wall clock: latency is processor time on one thread.",
        "The blocks' shares τ add up to 30.0 % (24.0 to 28.0 %), measured are 32.0 % (29.0 to 34.0 %): "
        "they do not add up (95 %).",
        "After tuning, the features differ from the original's by 12.0 % (root of the relative squared "
        "error) on inputs that nothing was tuned on.",
        "Fine-tuning: relative error 0.150 before it, the weights of step 20 of 30 kept.",
    ]


def test_channels_are_shown_by_group_with_the_latency() -> None:
    groups = (
        ChannelGroupRow("stem", 32, 24, 1500, 250_000, 0.01234),
        ChannelGroupRow("last", 64, 64, 40_000, 3_000_000),
    )
    figures = DropChannelsFigures("relu", "unit", LatencyChange(10.0, 6.8, 0.68, 0.66, 0.71), groups)
    section = channels(Material("drop-channels", {}, [step_of(DropChannels(macs_reduction=9), figures)]))
    shown = table(section)
    assert shown.columns == ["group", "channels", "kept", "parameters", "multiply-adds", "predicted error"]
    assert [[cell.replace("\u00a0", " ") for cell in row] for row in shown.rows] == [
        ["stem", "32", "24", "1.50 k", "250 k", "0.012"],
        ["last", "64", "64", "40.0 k", "3.00 M", "–"],
    ]
    assert shown.marked == {0}
    assert prose(section) == [
        "latency 10.0 → 6.80 ms in onnxruntime: 32.0 % less (95 % interval 29.0 to 34.0 %)."
    ]


def test_quantized_layers_are_shown_with_their_bits_and_what_the_runtime_makes_of_them() -> None:
    layers = (
        QuantizedLayerRow("a", "Conv", 4, 8, (0.1, 0.2), 0.3, (-1.25, 6.5), 31.26),
        QuantizedLayerRow("b", "Gemm", 2, 0, (0.1, 0.2), None, None, 12.5),
    )
    runtime = OptimizedNodes({"QLinearConv": 15}, {"Gemm": ("a", "b"), "Add": ("c",)}, 7)
    figures = QuantizeFigures(layers, 0, runtime, output_snr_db={"y": 9.04})
    section = noise(Material("quantize", {}, [step_of(Quantize(), figures)]))
    assert table(section).rows == [
        ["a", "4 bits", "8 bits", "-1.25 to 6.5", "31.3 dB"],
        ["b", "2 bits", "float", "–", "12.5 dB"],
    ]
    (chart,) = plots(section)
    assert (
        "b suffers most (12.5 dB). At the outputs, on the inputs learned from: y: 9.0 dB." in chart.finding
    )
    runtime_text = "onnxruntime fuses 15 QLinearConv. It computes with floats: 2 Gemm, 1 Add."
    assert prose(section) == [runtime_text]
    tuned = replace(figures, tuning=TuningOutcome(12, 200, 160, 0.36, 0.0625, 200))
    texts = prose(noise(Material("quantize", {}, [step_of(Quantize(), tuned)])))
    assert [text.replace("\u00a0", " ") for text in texts] == [
        runtime_text,
        "Fine-tuning: relative error 0.600 before it, the weights of step 160 of 200 kept. The outputs "
        "differ from the original's by 25.0 % (root of the relative squared error) on 12 inputs that "
        "nothing was learned from.",
    ]


def test_latency_is_shown_with_each_of_its_figures() -> None:
    samples = {"net": [4.0, *np.linspace(3, 5, 97), 40.0, 50.0], "fast": [2.0] * 100}
    section = latency(Material("compare", {}, comparison=comparison(), samples=samples))
    assert table(section).rows == [
        ["net", "4.000", "5.000", "2.000", "6.000", "8.000", "250.0"],
        ["fast", "2.000", "2.500", "1.000", "3.000", "4.000", "500.0"],
    ]
    assert table(section).caption.replace("\u00a0", " ") == (
        "Latency in onnxruntime on the CPU, batch 1, 40 runs of each model"
    )
    (chart,) = plots(section)
    assert isinstance(chart.chart, Spread)
    assert chart.chart.limits == pytest.approx((2 - 0.18, 5 + 0.18))
    assert chart.finding.replace("\u00a0", " ").endswith(
        "tick: the median. fast takes 0.500 of the first model's time (95 % interval 0.400 to 0.800). "
        "1.0 % of the runs took longer, up to 50.0 ms: not drawn."
    )


def test_the_spread_is_drawn_at_its_percentiles() -> None:
    """Of 0 to 100: lines at 5 and 95, at 25 and 75, and a tick at the median."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.add_subplot()
    Spread([("net", [float(v) for v in range(101)])], "ms").draw(axes, narrow=False)
    ends = [tuple(line.get_xdata()) for line in axes.get_lines()]
    assert ends == [(5, 95), (25, 75), (50, 50)]


def test_accuracies_are_shown_in_percent_with_wilsons_intervals() -> None:
    section = scores(Material("compare", {}, comparison=comparison()))
    (chart,) = plots(section)
    assert chart.finding.replace("\u00a0", " ").startswith("Top-1 accuracy changed by −2.00 points.")
    assert isinstance(chart.chart, Intervals)
    assert [row[0] for row in chart.chart.rows] == ["net", "fast"]
    assert [row[1:] for row in chart.chart.rows] == [
        pytest.approx((93, 88.60, 95.78), abs=0.01),  # of 186 and of 182 of 200
        pytest.approx((91, 86.22, 94.23), abs=0.01),
    ]
    assert prose(section) == [
        "Both models name the same top-1 class for 95.50 % of 200 images (95 % interval 91.67 to 97.61 % "
        "for inputs of that kind).",
        "Largest difference of an output: 0.0123 absolute, 0.456 relative (output y), without "
        "onnxruntime's optimizations.",
    ]


def test_bytes_of_layers_are_shown_before_and_after() -> None:
    layers = [
        LayerSize("a", 4000, 1000),
        LayerSize("b", 1500, None),
        LayerSize("all Add nodes", 600, 600, layer=False),
        LayerSize("all Mul nodes", 8, 8, layer=False),
    ]
    section = sizes(Material("prune", {}, layers=layers))
    (chart,) = plots(section)
    assert chart.finding.replace("\u00a0", " ") == (
        "All weights together: 6.11 kB before, 1.61 kB after; gone: 1 layer."
    )
    assert isinstance(chart.chart, Bars)
    assert chart.chart.x_label == "weights, kB"
    assert chart.chart.rows == [("a", [4, 1]), ("b", [1.5, None]), ("all Add nodes", [0.6, 0.6])]
    cells = [[cell.replace("\u00a0", " ") for cell in row] for row in table(section).rows]
    assert cells[:2] == [["a", "4.00 kB", "1.00 kB"], ["b", "1.50 kB", "–"]]
    large = sizes(Material("prune", {}, layers=[LayerSize("a", 40_000_000, 10_000_000)]))
    chart = plots(large)[0]
    assert isinstance(chart.chart, Bars)
    assert (chart.chart.x_label, chart.chart.rows) == ("weights, MB", [("a", [40, 10])])


def test_of_many_layers_the_largest_are_drawn() -> None:
    layers = [LayerSize(f"l{at}", 100 + at, None) for at in range(50)]
    (chart,) = plots(sizes(Material("inspect", {}, layers=layers)))
    assert isinstance(chart.chart, Bars)
    assert [name for name, _ in chart.chart.rows] == [f"l{at}" for at in range(20, 50)]
    assert "The 30 largest of 50 layers are drawn." in chart.finding


def test_two_4_bit_weights_take_a_byte() -> None:
    """The three elements of w take two bytes, its scale four; v takes four times as many as it has."""
    body = "k = DequantizeLinear(w, s) d = MatMul(x, k) y = Add(d, v)"
    arrays = {"s": np.float32(0.5).reshape(()), "v": np.ones(1, np.float32)}
    proto = graph("(float[N,3] x) => (float[N,1] y)", body, arrays, opset=21, ir=10, domain="d")
    four = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [3, 1], [1, -2, 3])
    proto.graph.initializer.append(four)
    rows = {row.name: row.before for row in layer_sizes(Model.from_proto(proto))}
    assert sorted(v for v in rows.values() if v is not None) == [4, 6]
    assert rows["all Add nodes"] == 4


def test_shares_of_blocks_are_of_all_parameters_and_of_all_work() -> None:
    block = {"name": "b", "kind": "residual", "shape": ["N", 8, 4, 4], "parameters": 250, "macs": 1500}
    facts = {
        "bytes": 4000, "parameters": 1000, "macs": 2000, "inputs": {"x": ["N", 3, None]}, "outputs": {},
        "opset": 17, "ir_version": 8, "producer": "", "operators": {"Conv": 3, "Add": 1}, "feature": None,
        "blocks": [block],
    }  # fmt: skip
    section = model(Material("inspect", facts))
    cells = [[cell.replace("\u00a0", " ") for cell in row] for row in table(section).rows]
    assert cells == [["b", "residual", "8×4×4", "250 (25.0 %)", "1.50 k (75.0 %)"]]
    terms = next(part for part in parts_of(section) if isinstance(part, Terms))
    assert [(a, b.replace("\u00a0", " ")) for a, b in terms.rows][:3] == [
        ("file", "4.00 kB, 1.00 k parameters"),
        ("work", "2.00 k MACs an image"),
        ("input x", "N×3×?"),
    ]


def test_inputs_are_told_by_number_kind_reason_and_seed() -> None:
    used = InputSource("distilled", 48, 3, "no --images", "unit", "option")
    figures = DropBlocksFigures("f", "", LatencyChange(1, 1, 1, 1, 1), (), inputs=(used,))
    section = inputs(Material("drop-blocks", {}, [step_of(DropBlocks(blocks=1), figures)]))
    assert prose(section) == [
        "drop-blocks learned from 48 distilled images (no --images; seed 3), preprocessed by unit (as "
        "asked for)."
    ]


def guarded(*, exact: bool, refuse: float = 3.0) -> list[str]:
    outputs = (
        OutputFidelity("near", 40.0, 38.0, 0.5, 0.01, 0.97),
        OutputFidelity("far", 21.04, 16.06, 0.25, 0.02, 0.75),
    )
    found = GuardMeasurements("16 images", 16, 1.0, Fidelity(outputs), max_rel=0.1 if exact else None)
    judged = verdict(found, Floors(refuse, refuse), force=True, advice=("try less",))
    return [p.text.replace("\u00a0", " ") for p in _guard(found, judged, "") if isinstance(p, Prose)]


def test_the_guard_tells_of_the_output_that_changed_most() -> None:
    assert guarded(exact=True) == [
        "Largest output difference: 2.50e-01 absolute, 2.00e-02 relative (output 'far'), on 16 images."
    ]
    assert guarded(exact=False) == [
        "Output 'far': variation to noise 16.1 dB (signal to noise 21.0 dB), the same class for 75.00 %, "
        "on 16 images."
    ]
    assert guarded(exact=False, refuse=20.0) == [
        "Warning, written by --force: output 'far': variation to noise 16.1 dB (signal to noise 21.0 dB), "
        "below 20 dB, the same class for 75.00 %, on 16 images.",
        "try less.",
    ]


def test_values_are_named_as_they_are_nested() -> None:
    values = {"size": {"as_zip": 0.123456, "sparse": None}, "kept": True, "many": list(range(10)), "no": []}
    assert plain_terms(values) == [
        ("size: as zip", "0.1235"),
        ("size: sparse", "none"),
        ("kept", "yes"),
        ("many", "0, 1, 2, 3, 4, 5, 6, 7 … (10)"),
        ("no", "none"),
    ]
