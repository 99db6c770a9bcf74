"""What the page and the model cards of a search say of fixed figures, word by word."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from onnxcompress.evaluation.gates import Gates
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.pipeline.recipe import Recipe
from onnxcompress.report.charts import Scatter
from onnxcompress.report.elements import Code, Fold, Part, Plot, Prose, Story, Table, Tile
from onnxcompress.search.card import model_card
from onnxcompress.search.front import loss_name, loss_of
from onnxcompress.search.page import front_page
from onnxcompress.search.search import Found, Front
from onnxcompress.search.space import Candidate
from onnxcompress.search.study import Told
from onnxcompress.search.trial import Row, Trial
from onnxcompress.version import __version__

GATES = Gates(images="x", max_drop=1.0, min_speedup=1.5)


def figures(ratio: float, low: float, high: float, **others: Any) -> Row:
    """Of a result whose original takes 8 ms, has 2 MB, and is right for 90 of 100 images."""
    row: dict[str, Any] = {
        "bytes_before": 2_000_000, "bytes": 1_500_000, "latency_before_ms": 8.0, "latency_ms": 8 * ratio,
        "ratio": ratio, "ratio_low": low, "ratio_high": high, "device": "cpu, batch 4", "top1_before": 0.9,
        "top1": 0.87, "agreement": 0.955, "inputs": "200 images", "preprocess": "unit", "sha256": "5a",
    } | others  # fmt: skip
    return row | {"loss": loss_of(row), "size": row["bytes"] / row["bytes_before"]}


def found(name: str, row: Row) -> Found:
    recipe = Recipe((FoldBatchNorm(), HalfPrecision(seed=3)), GATES)
    return Found(Trial(name, "nets/net.onnx", recipe), row | {"output": f"best/front/{name}.onnx"})


FAST = found("fast", figures(0.4, 0.32, 0.5))
GOOD = found("good", figures(0.625, 0.5, 0.64, top1=0.895, bytes=1_000_000, latency_ms=4.9))
PROXIES = (
    Told(Candidate(1), figures(0.8, 0.7, 0.9)),
    Told(Candidate(0, "int8", 8), figures(0.5, 0.4, 0.6, bytes=500_000, top1=0.8)),
)
FRONT = Front((FAST, GOOD), 1, PROXIES, (found("worse", FAST.row),), ("no memory",))


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


def parts(page: Story, name: str) -> list[Part]:
    return list(next(section for section in page.sections if section.name == name).parts)


def test_the_page_has_each_figure_of_the_front() -> None:
    page = front_page(FRONT, "nets/net.onnx", GATES)
    assert (page.title, page.missed) == ("net.onnx: 2 best models", [])
    assert page.lead == ["good keeps all limits: 1.60 times as fast, loss 0.50."]
    assert [Tile(*map(plain, vars(tile).values())) for tile in page.tiles] == [
        Tile("speed", "1.60×", "1.56 to 2.00, 95 % interval"),
        Tile("top-1 accuracy", "89.5 %", "was 90.0 %"),
        Tile("file", "1.00 MB", "was 2.00 MB"),
    ]
    chart, table, *notes = parts(page, "front")
    assert isinstance(table, Table)
    assert table.marked == {1}
    assert [list(map(plain, cells)) for cells in table.rows] == [
        ["fast", "3.20 ms", "2.50×", "2.00 to 3.12", "3.00", "1.50 MB", "max_drop"],
        ["good", "4.90 ms", "1.60×", "1.56 to 2.00", "0.50", "1.00 MB", "nothing"],
    ]
    assert [note.text for note in notes if isinstance(note, Prose)] == [
        "Loss is top-1 accuracy lost on 200 images, points; all were timed together, on cpu, batch 4.",
        "Repaired, and beaten: worse.",
    ]
    assert isinstance(chart, Plot)
    fast, good = "fast (2.50 times as fast, loss 3.00)", "good (1.60 times as fast, loss 0.50)"
    assert chart.finding == f"From {fast} to {good}."
    assert isinstance(chart.chart, Scatter)
    points: list[tuple[object, ...]] = [
        (p.name, p.x, p.low, p.high, p.y, p.picked) for p in chart.chart.points
    ]
    assert points == [
        ("fast", pytest.approx(3.2), pytest.approx(2.56), pytest.approx(4), pytest.approx(3), False),
        ("good", 4.9, pytest.approx(3.92), pytest.approx(5.0176), pytest.approx(0.5), True),
    ]


def test_the_page_has_the_commands_and_what_was_looked_at() -> None:
    page = front_page(FRONT, "nets/net.onnx", GATES)
    (code,) = parts(page, "repeat")
    assert isinstance(code, Code)
    assert code.text.splitlines() == [
        f"onnxcompress run best/front/{name}.yaml nets/net.onnx {name}.onnx" for name in ("fast", "good")
    ]
    (fold,) = parts(page, "proxies")
    assert isinstance(fold, Fold)
    table, failed = fold.parts
    assert isinstance(table, Table)
    assert isinstance(failed, Prose)
    assert [list(map(plain, cells)) for cells in table.rows] == [
        ["drop0-int8-a8", "2.00×", "10.00", "25 %"],
        ["drop1-float32", "1.25×", "3.00", "75 %"],
    ]
    assert failed.text == "Not made: no memory."


def test_the_page_says_where_no_result_keeps_all_limits() -> None:
    page = front_page(replace(FRONT, picked=None), "net.onnx", GATES)
    assert page.missed == ["no result keeps all limits: --max-drop 1 --min-speedup 1.5"]
    assert page.lead == ["2 models that no other one beats in latency, loss and size at once."]
    assert page.tiles == []


def test_a_single_result_that_gained_accuracy_is_told_as_such() -> None:
    alone = found("better", figures(0.4, 0.32, 0.5, top1=0.907))
    page = front_page(Front((alone,), None, PROXIES[:1]), "net.onnx", Gates())
    assert page.title == "net.onnx: 1 best model"
    assert page.lead == ["1 model that no other one beats in latency, loss and size at once."]
    chart, table, *_ = parts(page, "front")
    assert isinstance(chart, Plot)
    assert isinstance(table, Table)
    assert chart.finding == "better (2.50 times as fast, loss −0.70)."
    assert table.rows[0][4] == "−0.70"
    (fold,) = parts(page, "proxies")
    assert isinstance(fold, Fold)
    assert fold.summary == "1 candidate, by closed forms on few inputs"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (FAST.row, "top-1 accuracy lost on 200 images, points"),
        (FAST.row | {"top1": None}, "200 images with another class than before, %"),
        ({"noise": 0.1}, "noise of the outputs over their variation, %"),
    ],
)
def test_the_loss_says_what_it_is(row: Row, name: str) -> None:
    assert loss_name(row) == name


def test_a_card_has_each_figure() -> None:
    assert plain(model_card(FAST.trial, FAST.row, "`small.yaml`")).splitlines() == [
        "# fast",
        "",
        f"Made from `net.onnx` by onnxcompress {__version__}.",
        "",
        "## Passes",
        "",
        "1. `fold-bn`",
        "2. `fp16`: seed 3",
        "",
        "## Figures",
        "",
        "| | before | after |",
        "|---|---|---|",
        "| size | 2.00 MB | 1.50 MB |",
        "| top-1 accuracy | 90.00 % | 87.00 % |",
        "| same class as before | | 95.50 % |",
        "| median latency | 8.00 ms | 3.20 ms |",
        "| speedup | | 2.50 (95 % interval 2.00 to 3.12) |",
        "",
        "Accuracy and agreement: 200 images, unit.",
        "",
        "Latency: onnxruntime, cpu, batch 4, run by run with the model before.",
        "",
        "## Limits",
        "",
        "- MISSED: top-1 accuracy fell by 3.00 points (90.00% to 87.00% on 200 images), it may fall by 1",
        "- kept: 2.500 times as fast (95 % interval 2.000 to 3.125; cpu, batch 4), "
        "at least 1.5 is asked for",
        "",
        "SHA-256 of the file: `5a`. Recipe: `small.yaml`.",
    ]
