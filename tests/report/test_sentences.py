"""What the report says of fixed figures, word by word."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from onnxcompress.account import Change, Refusal
from onnxcompress.optimize.block_drop.figures import BlockRow, DropBlocksFigures
from onnxcompress.passes import PassResult
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.prune.figures import PrunedLayerRow, PruneFigures, WeightBytes
from onnxcompress.pipeline import Step
from onnxcompress.report import Material
from onnxcompress.report.build import _lead, _smaller, _tiles
from onnxcompress.report.charts import Bars, Scatter
from onnxcompress.report.elements import Fold, Heading, Plot, Prose, Section, Table
from onnxcompress.report.sections.layers import blocks, noise, sensitivity
from onnxcompress.report.sections.passes import passes
from onnxcompress.runtime.block_latency import LatencyChange, Share
from tests.helpers.results import step_of


def side(size: int, top1: float | None, ms: float, macs: int = 1000) -> dict[str, Any]:
    timing = {"median_ms": ms, "batch": 1, "provider": "cpu", "placement": {}, "settings": {}}
    return {"bytes": size, "top1": top1, "macs": macs, "parameters": 10, "timing": timing}


def compared(ratio: tuple[float, float, float], **changed: Any) -> dict[str, Any]:
    """Latency after over before with its interval; 2 MB to 1.5 MB; 93 to 91 %."""
    value, low, high = ratio
    return {
        "a": side(2_000_000, 0.93, 4.0),
        "b": side(1_500_000, 0.91, 4.0 * value, 600),
        "latency": {"value": value, "low": low, "high": high},
        "agreement": 0.955,
        "inputs": "200 images",
        "difference": {"max_abs": 0.0123},
    } | changed


def said(found: dict[str, Any]) -> str:
    return " ".join(_lead(Material("compare", {}, comparison=found))).replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (2_000_000, 1_500_000, "The file is 25.0 % smaller: 2.00 MB → 1.50 MB."),
        (1_500_000, 2_000_000, "The file is 33.3 % larger: 1.50 MB → 2.00 MB."),
        (1_000_000, 1_000_400, "The file is as large as it was: 1.00 MB."),
        (1_000_000, 1_000_600, "The file is 0.1 % larger: 1.00 MB → 1.00 MB."),
    ],
)
def test_the_change_of_size_is_over_what_it_was(before: int, after: int, sentence: str) -> None:
    assert _smaller(before, after).replace("\u00a0", " ") == sentence


@pytest.mark.parametrize(
    ("ratio", "start"),
    [
        (
            (0.5, 0.4, 0.8),
            "It is 2.00 times as fast (95 % interval 1.25 to 2.50): 4.00 ms →",
        ),
        (
            (1.25, 1.1, 1.6),
            "It is slower, 0.80 times as fast (95 % interval 0.62 to 0.91): 4.00 ms →",
        ),
        ((0.8, 0.7, 1.01), "No difference in speed can be told: 1.25 times as fast (95 % interval 0.99 to"),
    ],
)
def test_speed_is_how_many_times_as_fast(ratio: tuple[float, float, float], start: str) -> None:
    assert said(compared(ratio)).startswith(start)


def test_accuracy_goes_from_what_it_was_to_what_it_is() -> None:
    text = said(compared((0.5, 0.4, 0.8)))
    assert "accuracy goes from 93.00 % to 91.00 % (−2.00 points) on 200 images; 95.5 % of them keep" in text


def test_tiles_have_the_figures_after_and_before() -> None:
    tiles = _tiles(Material("compare", {}, comparison=compared((0.5, 0.4, 0.8))))
    shown = [" ".join(vars(tile).values()).replace("\u00a0", " ") for tile in tiles]
    assert shown == [
        "speed 2.00× 1.25 to 2.50, 95 % interval",
        "top-1 accuracy 91.0 % −2.00 points",
        "file 1.50 MB was 2.00 MB",
        "multiply-adds 600 was 1.00 k",
    ]


def test_the_last_tile_has_the_parameters_where_the_work_is_the_same() -> None:
    found = compared((0.5, 0.4, 0.8), b=side(1_500_000, None, 2.0) | {"parameters": 8})
    tiles = _tiles(Material("compare", {}, comparison=found))
    shown = [" ".join(vars(tile).values()).replace("\u00a0", " ") for tile in tiles]
    assert shown[1:] == [
        "same class 95.5 % of 200 images",
        "file 1.50 MB was 2.00 MB",
        "parameters 8 was 10",
    ]


def test_a_pass_tells_its_changes_its_time_and_what_it_left_alone() -> None:
    """Of many refusals the first are in view, and all are there."""
    changes = [Change("a", "folded"), Change("b", "folded"), Change("c", "moved")]
    refusals = [Refusal(f"n{at}", "why") for at in range(15)]
    latency = LatencyChange(10.0, 9.8, 0.98, 0.94, 1.02)
    first = Step(Prune(), PassResult(changes, refusals, latency=latency), 12.34, cached=True)
    gain = replace(latency, high=0.99)
    second = Step(Prune(), PassResult(changes[2:], latency=gain), 0.56)
    section = passes(Material("run", {}, [first, second]))
    assert section is not None
    headings = [(part.text, part.note) for part in section.parts if isinstance(part, Heading)]
    assert headings == [("1. prune", "12.3 s, kept from an earlier run"), ("2. prune", "0.6 s")]
    prose = [(part.text, part.tone) for part in section.parts if isinstance(part, Prose)]
    assert prose[0] == ("2 × folded; moved.", "")
    assert [tone for text, tone in prose if text.startswith("Latency")] == ["missed", ""]
    (table,) = [part for part in section.parts if isinstance(part, Table)]
    fold = next(part for part in section.parts if isinstance(part, Fold) and part.summary == "3 more")
    (rest,) = fold.parts
    assert isinstance(rest, Table)
    assert [row[0] for row in (*table.rows, *rest.rows)] == [f"n{at}" for at in range(15)]
    assert table.caption == "Left alone: 15"


ROWS = tuple(
    PrunedLayerRow(f"layer{i}", "Conv", f"w{i}", 0.1 * i, db)
    for i, db in enumerate([20.0, 12.5, 31.0, 17.0])
)


def pruned(rows: tuple[PrunedLayerRow, ...], **figures: Any) -> Material:
    size = WeightBytes(10, 5)
    return Material("prune", {}, [step_of(Prune(), PruneFigures(0.5, 10, 5, size, "", rows, **figures))])


def plot(section: Section | None) -> Plot:
    assert section is not None
    return next(part for part in section.parts if isinstance(part, Plot))


def test_the_noisiest_layer_is_the_one_that_suffers_most() -> None:
    section = noise(pruned(ROWS, output_snr_db={"y": 14.26}))
    chart = plot(section)
    assert chart.finding.replace("\u00a0", " ") == (
        "The shorter the bar, the more pruning costs there; 20 dB is noise of a tenth of the signal. "
        "layer1 suffers most (12.5 dB). At the outputs, on the inputs learned from: y: 14.3 dB."
    )
    assert isinstance(chart.chart, Bars)
    assert chart.chart.rows == [(row.name, [row.snr_db]) for row in ROWS]


def test_of_many_layers_the_noisiest_are_drawn() -> None:
    many = tuple(replace(ROWS[0], name=f"n{i}", snr_db=float(i)) for i in range(100))
    chart = plot(noise(pruned(many)))
    assert isinstance(chart.chart, Bars)
    drawn = [name for name, _ in chart.chart.rows]
    assert drawn == [f"n{i}" for i in range(len(drawn))]
    assert f"The {len(drawn)} noisiest of 100 layers are drawn." in chart.finding


def test_the_block_that_costs_least_and_the_one_that_costs_most() -> None:
    rows = tuple(
        BlockRow(f"block{i}", f"e{i}", i == 1, Share(0.1, 0.05, 0.2), r, r / 0.1)
        for i, r in enumerate([0.3, 0.02, 0.5])
    )
    latency = LatencyChange(10.0, 9.0, 0.9, 0.8, 0.95)
    figures = DropBlocksFigures("f", "", latency, rows, order=("block1",))
    found = plot(blocks(Material("drop-blocks", {}, [step_of(DropBlocks(blocks=1), figures)])))
    assert "Least is lost without block1 (R 0.02), most without block2 (R 0.5)." in found.finding
    assert isinstance(found.chart, Scatter)
    first = found.chart.points[0]
    assert (first.x, first.low, first.high, first.y) == pytest.approx((10, 5, 20, 0.3))


def test_sensitivity_needs_rows() -> None:
    assert sensitivity(pruned(ROWS)) is None
