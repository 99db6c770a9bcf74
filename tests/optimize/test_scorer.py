"""Losses of blocks against runs of the network without them; when a target counts as missed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import Block, find_blocks
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop.recoverability import Probe, Scorer, probe
from onnxcompress.optimize.block_drop.selection import choose_these, target_missed
from onnxcompress.optimize.executor import Executor
from onnxcompress.runtime.block_latency import LatencyChange
from tests.optimize.test_block_drop import network

pytestmark = pytest.mark.usefixtures("whole_learning")


def probed(model: Model, count: int = 24) -> Probe:
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return probe(Executor.from_model(model), x, "x", "y")


def lost(model: Model, target: Probe, weights: Mapping[str, Tensor]) -> float:
    """What a network lacks of the features, over their energy."""
    own = Executor.from_model(model)
    known = {name: value for name, value in weights.items() if name in own.parameters}
    with torch.no_grad():
        got = own.run({"x": target.images}, ["y"], known)["y"]
    return float((got - target.wanted).square().sum() / target.wanted.square().sum())


def without(model: Model, *blocks: Block) -> Model:
    pruned = model.copy()
    drop_blocks(pruned, [block.exit for block in blocks])
    return pruned


def test_a_loss_is_that_of_the_network_with_its_adapters() -> None:
    model = network()
    target, blocks = probed(model), find_blocks(model).blocks
    scorer = Scorer(model, blocks, target, batch=7)
    for block, recovery in zip(blocks, scorer.recover_each(blocks), strict=True):
        pruned = without(model, block)
        assert recovery.loss == pytest.approx(lost(pruned, target, recovery.weights), rel=0.05)
        assert recovery.loss < 0.9 * lost(pruned, target, {})


def test_adapters_are_trained_on_all_images_in_turn() -> None:
    """On the first eight alone 2 to 3 % more is lost on the 96."""
    model = network()
    scorer = Scorer(model, find_blocks(model).blocks, probed(model, 96), batch=8)
    losses = [recovery.loss for recovery in scorer.recover_each(find_blocks(model).blocks)]
    assert losses == pytest.approx([0.1961, 0.02206, 0.1205], rel=0.015)


def test_a_loss_counts_what_earlier_drops_changed() -> None:
    """Weights that are no longer the file's, as those with the adapters of blocks that are gone."""
    model = network()
    target, blocks = probed(model), find_blocks(model).blocks
    changed = {"w7": 1.3 * Executor.from_model(model).parameters["w7"]}
    found = Scorer(model, blocks, target, parameters=changed, steps=0).recover(blocks[1])
    assert found.loss == pytest.approx(lost(without(model, blocks[1]), target, changed), rel=0.05)
    assert found.loss > 1.5 * lost(without(model, blocks[1]), target, {})


def test_the_loss_of_several_blocks_is_that_of_the_network_with_all_their_adapters() -> None:
    model = network()
    target, blocks = probed(model), find_blocks(model).blocks
    choice = choose_these(model.copy(), [blocks[0], blocks[2]], target)
    assert choice.loss == pytest.approx(lost(choice.model, target, choice.weights), rel=0.05)
    only = choose_these(model.copy(), [blocks[2]], target)
    assert choice.weights.keys() > only.weights.keys()


BLOCKS = find_blocks(network()).blocks
SHARES = dict(zip((b.exit for b in BLOCKS), (0.3, 0.05, 0.1), strict=True))


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (46.5, "latency is 45.0 % lower, 46.5 % was asked for"),
        (45.9, ""),  # within the interval
        (38, ""),  # without the smallest 44 %, less a ninth, are 39.1 %: hardly more than the target
        (
            37,
            "latency is 45.0 % lower, 37 % was asked for, and without dropping {name} it would be about "
            "40.0 %: try again when the machine is less busy, or with --threads 1",
        ),
    ],
)
def test_a_target_is_missed_below_it_and_far_above_it(target: float, text: str) -> None:
    latency = LatencyChange(10.0, 5.5, 0.55, 0.54, 0.56)
    assert target_missed(latency, target, BLOCKS, SHARES) == text.format(name=BLOCKS[1].name)


def test_with_one_block_nothing_could_be_put_back() -> None:
    latency = LatencyChange(10.0, 5.5, 0.55, 0.54, 0.56)
    assert target_missed(latency, 10, BLOCKS[:1], SHARES) == ""
