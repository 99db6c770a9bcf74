"""The chain of a network: every layer in one segment, in order, blocks as they were found."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onnxcompress.cli.main import main
from onnxcompress.evaluation.inspection import chain_shares, inspect_model
from onnxcompress.graph.chain import chain
from onnxcompress.graph.macs import count_macs
from onnxcompress.model import Model, load
from onnxcompress.report.chain_chart import Box, ChainChart
from onnxcompress.report.charts import svgs
from onnxcompress.runtime.block_latency import Share

NETS = ("resnet20-fashion.onnx", "mobilenetv2-fashion.onnx")


@pytest.mark.parametrize("net", NETS)
def test_all_work_is_in_one_segment_each(net: str, models: Path) -> None:
    model = load(models / net)
    found = inspect_model(model, net, 0)
    assert sum(segment.macs for segment in found.chain) == count_macs(model)
    assert [s.exit for s in found.chain if s.droppable] == [block.exit for block in found.blocks]
    assert all(segment.macs for segment in found.chain)
    order = {tensor.name: at for at, n in enumerate(model.graph.nodes) for tensor in n.outputs}
    ends = [order[segment.exit] for segment in found.chain]
    assert ends == sorted(ends)
    assert len(chain(model, ())) == 1


def clock(values: dict[str, float], width: float = 0.001) -> Any:
    def shares(model: Model, blocks: Any, seconds: float) -> dict[str, Share]:
        return {
            b.exit: Share(v, v - width, v + width) for b, v in zip(blocks, values.values(), strict=True)
        }

    return SimpleNamespace(shares=shares, provider="cpu", batch=2)


def test_shares_are_those_measured_and_the_rest_goes_by_its_work(models: Path) -> None:
    model = load(models / NETS[0])
    found = inspect_model(model, "n", 0)
    measured = {block.exit: 0.02 * (at + 1) for at, block in enumerate(found.blocks)}
    told = chain_shares(model, found, clock(measured))
    by_exit = dict(zip((s.exit for s in found.chain), told.shares, strict=True))
    assert {exit: by_exit[exit] for exit in measured} == pytest.approx(measured)
    assert sum(told.shares) == pytest.approx(1)
    stays = [(s.macs, v) for s, v in zip(found.chain, told.shares, strict=True) if not s.droppable]
    assert stays[1][1] / stays[0][1] == pytest.approx(stays[1][0] / stays[0][0])
    assert told.device == "cpu, batch 2"


@pytest.mark.parametrize(("share", "width"), [(0.2, 0.001), (0.01, 0.2)])  # 7 × 0.2 > 1; as wide as nothing
def test_what_a_busy_clock_says_is_not_drawn(share: float, width: float, models: Path) -> None:
    model = load(models / NETS[0])
    found = inspect_model(model, "n", 0)
    told = chain_shares(model, found, clock(dict.fromkeys(map(str, found.blocks), share), width))
    assert told.noisy
    assert told.device is None
    assert told.shares == chain_shares(model, found, None).shares


@pytest.mark.usefixtures("quick_clock")
def test_the_report_draws_it(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "p.html"
    assert main(["inspect", str(models / NETS[0]), "--report", str(page), "--json"]) == 0
    text = page.read_text("utf-8")
    assert "From the input to the output" in text
    assert "of the multiply-accumulates" in text  # latency is off in tests
    assert text.count(">blocks.4<") >= 2  # wide and narrow
    monkeypatch.delenv("ONNXCOMPRESS_LATENCY")
    assert (
        main(["inspect", str(models / NETS[0]), "--report", str(page), "--provider", "cpu", "--json"]) == 0
    )
    assert "on cpu, batch 1" in page.read_text("utf-8") or "too busy" in page.read_text("utf-8")


def test_names_stand_where_they_fit() -> None:
    boxes = [Box("wide.block", 60, True), Box("thin.block", 3, True), Box("thin.rest", 3, False)]
    wide, narrow = svgs(ChainChart([("8×8", boxes)], "share, %"), "c")
    assert "wide.block" in wide
    assert "thin.block"[:4] in wide
    assert "thin.rest" not in wide + narrow
