"""Which blocks go: scores, the order of drops, what a clock says, on a tiny network."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from onnxcompress.graph.blocks import find_blocks
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop import selection
from onnxcompress.optimize.block_drop.figures import DropBlocksFigures
from onnxcompress.optimize.block_drop.recoverability import Probe, Recovery
from onnxcompress.optimize.block_drop.refinement import Refinement
from onnxcompress.optimize.block_drop.selection import BlockSelection, choose, choose_these
from onnxcompress.passes.base import PassResult
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.runtime.block_latency import LatencyChange, Share, usable
from onnxcompress.runtime.stopwatch import Stopwatch
from tests.helpers.folding import graph, weight

BODY = """a = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(a)
    c = Conv<pads=[1,1,1,1]>(r, w1, b1) d = Relu(c) e = Conv<pads=[1,1,1,1]>(d, w2, b2)
    s = Add(r, e) t = Relu(s) f = Conv(t, w3, b3) g = Relu(f) h = Conv(g, w4, b4) u = Add(t, h) v = Relu(u)
    i = Conv<pads=[1,1,1,1]>(v, w5, b5) j = Relu(i) k = Conv(j, w6, b6) l = Add(v, k) m = Relu(l)
    y = Conv(m, w7, b7)"""
FAST = DropBlocks(
    inputs="procedural", synthetic=16, preprocess="unit", steps=2, batch=8, feature="y", provider="cpu"
)
"""No images are needed; a few steps."""


def network() -> Model:
    """Three residual blocks: of two 3x3 convolutions, of two 1x1 ones, of one of each."""
    sizes = {
        0: (6, 3, 3),
        1: (6, 6, 3),
        2: (6, 6, 3),
        3: (6, 6, 1),
        4: (6, 6, 1),
        5: (6, 6, 3),
        6: (6, 6, 1),
    }
    sizes[7] = (4, 6, 1)
    arrays = {f"w{i}": 0.3 * weight(o, c, k, k, seed=i) for i, (o, c, k) in sizes.items()}
    arrays |= {f"b{i}": 0.2 * weight(o, seed=30 + i) for i, (o, _, _) in sizes.items()}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", BODY, arrays))


def drop(**options: Any) -> PassResult[DropBlocksFigures]:
    return replace(FAST, **options).apply(network())


@pytest.mark.slow
def test_scores_are_what_cannot_be_recovered_over_the_share_of_the_latency(
    fixed_clock: Callable[..., None],
) -> None:
    """The whole takes 10 ms; without a block 6, 9.5 and 8, the last give or take 5 %."""
    fixed_clock([10, 6, 9.5, 8], [10, 8], jitter=0.05)
    rows = drop(latency_reduction=15).measured.blocks
    shares = [row.latency_share for row in rows if row.latency_share is not None]
    assert len(shares) == len(rows)
    assert [value for value, _, _ in shares] == pytest.approx([0.4, 0.05, 0.2], abs=0.005)
    assert all(low <= value <= high for value, low, high in shares)
    assert shares[2].high - shares[2].low > 0.01
    for row, share in zip(rows, shares, strict=True):
        assert row.recoverability is not None
        assert row.score == pytest.approx(row.recoverability / share.value)


@pytest.mark.slow
def test_a_share_next_to_nothing_counts_as_a_tenth_of_the_largest(fixed_clock: Callable[..., None]) -> None:
    fixed_clock([10, 6, 9.99, 8], [10, 8])
    row = drop(latency_reduction=15).measured.blocks[1]
    assert row.recoverability is not None
    assert row.score == pytest.approx(row.recoverability / 0.04, rel=1e-3)


@pytest.mark.slow
def test_a_target_in_latency_counts_what_a_block_takes_and_one_in_blocks_does_not(
    fixed_clock: Callable[..., None],
) -> None:
    fixed_clock([10, 3, 9.5, 9], [10, 3])
    first, second, third = (b.name for b in find_blocks(network()).blocks)
    assert drop(blocks=1).measured.order == (second,)
    assert drop(blocks=2).measured.order == (second, third)
    assert drop(latency_reduction=60).measured.order == (first,)  # which then makes the other needless


@pytest.mark.slow
def test_a_target_is_missed_only_where_the_whole_interval_does(fixed_clock: Callable[..., None]) -> None:
    fixed_clock([10, 9, 9.5, 9], [10, 8], jitter=0.12)
    kept = drop(latency_reduction=21).measured
    latency = kept.latency
    assert (latency.before_ms, latency.after_ms) == pytest.approx((10, 8), rel=0.01)
    assert 0.75 < latency.low < 0.79 < latency.ratio < 0.81 < latency.high < 0.85
    assert kept.target_missed is None
    missed = drop(latency_reduction=26).measured
    assert missed.target_missed == (
        f"latency is {100 * (1 - latency.ratio):.1f} % lower, 26 % was asked for; "
        "the file was written as it is"
    )
    assert kept.additivity is not None
    value, low, high = kept.additivity.measured
    assert low < value < high
    assert value == pytest.approx(0.2, abs=0.01)
    assert kept.additivity.predicted.value == pytest.approx(0.25, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "today"), [("images", 0.0974), ("procedural", 0.0719)])
def test_what_is_lost_with_a_block_is_what_it_was(
    inputs: str, today: float, fixed_clock: Callable[..., None], tmp_path: Path
) -> None:
    """Refitted with more damping on images that were made."""
    fixed_clock([10, 8])
    file = tmp_path / "real.npz"
    np.savez(file, x=np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3)).astype(np.uint8))
    images = {"images": str(file)} if inputs == "images" else {}
    name = find_blocks(network()).blocks[0].name
    found = drop(drop=(name,), steps=0, inputs=inputs, **images).measured.feature_error
    assert found == pytest.approx(today, rel=0.03)


@pytest.mark.slow
def test_what_is_saved_is_of_the_originals_latency(
    fixed_clock: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that counts convolutions, eight at first: two of them are a quarter."""

    def compare(self: Any, before: Model, after: Model, seconds: float) -> LatencyChange:
        was, now = (sum(node.op == "Conv" for node in one.graph.nodes) for one in (before, after))
        return LatencyChange(was, now, now / was, now / was, now / was)

    fixed_clock([10, 9, 9.5, 7.5])
    monkeypatch.setattr(Stopwatch, "compare", compare)
    found = drop(latency_reduction=20, steps=0).measured
    assert found.order == (find_blocks(network()).blocks[2].name,)
    assert (found.latency.before_ms, found.latency.after_ms) == (8, 6)


class FakeScorer:
    """R of each set of blocks, by their names."""

    losses: ClassVar[dict[frozenset[str], float]] = {}
    exits: ClassVar[dict[str, str]] = {}

    def __init__(self, model: Model, blocks: Any, probe: Any, **options: Any) -> None:
        there = {b.exit for b in find_blocks(model).blocks}
        self.gone = {name for exit, name in self.exits.items() if exit not in there}

    def recover(self, block: Any) -> Recovery:
        return Recovery(self.losses[frozenset(self.gone | {self.exits[block.exit]})], {})

    def recover_each(self, blocks: Any) -> Generator[Recovery, None, None]:
        yield from map(self.recover, blocks)


@pytest.mark.parametrize(
    ("losses", "shares", "order"),
    [
        # the first gone, the second adds 0.2 a unit of latency, the third 0.45 / 2
        ({"1": 0.1, "2": 0.2, "3": 0.38, "12": 0.3, "13": 0.55, "123": 1}, (1, 1, 2), "123"),
        ({"1": 0.1, "2": 0.2, "3": 0.3, "12": 0.3, "13": 0.45, "123": 1}, (1, 1, 2), "132"),
        # what is left of the second costs nothing more, though it scored worst at first
        ({"1": 0.3, "2": 0.2, "3": 0.4, "12": 0.9, "23": 0.45, "123": 1}, (1, 1, 1), "231"),
    ],
)
def test_after_each_drop_what_is_left_is_scored_by_what_it_adds(
    losses: dict[str, float], shares: tuple[float, ...], order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    exits = {b.exit: str(at + 1) for at, b in enumerate(find_blocks(model).blocks)}
    monkeypatch.setattr(FakeScorer, "losses", {frozenset(k): v for k, v in losses.items()})
    monkeypatch.setattr(FakeScorer, "exits", exits)
    monkeypatch.setattr(selection, "Scorer", FakeScorer)
    tau = dict(zip(exits, shares, strict=True))
    scores = {exit: losses[name] / tau[exit] for exit, name in exits.items()}
    probe = Probe("x", "y", torch.zeros(1, 3, 8, 8), torch.ones(1))
    sizes: list[float] = []

    def enough(choice: BlockSelection) -> bool:
        sizes.append(choice.loss)
        return len(choice.dropped) == 3

    choice = choose(model, scores, tau, probe, enough)
    assert "".join(exits[b.exit] for b in choice.dropped) == order
    assert sizes == [0.0, *(losses["".join(sorted(order[: n + 1]))] for n in range(3))]


@pytest.mark.slow
@pytest.mark.usefixtures("whole_learning")
def test_what_cannot_be_recovered_is_what_it_was(fixed_clock: Callable[..., None]) -> None:
    """R of each block after 8 steps of its adapters, over the energy of the features.

    A target in blocks takes the one that loses least, however little latency it has.
    """
    fixed_clock([10, 9.5, 9.9, 1], [10, 9.9])
    found = drop(blocks=1, steps=0).measured
    losses = [row.recoverability for row in found.blocks]
    assert losses == pytest.approx([0.1356, 0.01189, 0.0846], rel=0.02)
    assert [row.dropped for row in found.blocks] == [False, True, False]
    assert found.choosing_loss == pytest.approx(losses[1])


@pytest.mark.slow
def test_what_a_target_in_latency_chose_is_told(fixed_clock: Callable[..., None]) -> None:
    """The third block saves 40 % as measured, twice as much as its share said: it is enough alone."""
    fixed_clock([10, 9, 9.5, 8], [10, 6])
    found = drop(latency_reduction=20, steps=0).measured
    for row, share in zip(found.blocks, (0.1, 0.05, 0.2), strict=True):
        assert row.recoverability is not None
        assert row.score == pytest.approx(row.recoverability / share)
    assert found.order == (find_blocks(network()).blocks[2].name,)
    assert found.choosing_loss == pytest.approx(found.blocks[2].recoverability)
    assert found.additivity is not None
    assert found.additivity.predicted.value == pytest.approx(0.2)
    assert found.additivity.measured.value == pytest.approx(0.4)
    assert found.latency.saved.value == pytest.approx(0.4)


@pytest.mark.parametrize(("wide", "noisy"), [(0.019, False), (0.021, True)])
def test_an_interval_wider_than_its_share_is_too_noisy_and_work_counts(wide: float, noisy: bool) -> None:
    """Then τ is the multiply-accumulates' share of a half; else it is what was measured."""
    blocks = find_blocks(network()).blocks
    values = (0.3, 0.1, 0.2)
    widths = (0.01, 5 * wide + 0.1 if noisy else 5 * wide, 0.01)
    shares = {
        b.exit: Share(v, v - w / 2, v + w / 2) for b, v, w in zip(blocks, values, widths, strict=True)
    }
    tau, found = usable(shares, blocks)
    assert found == noisy
    whole = sum(b.macs for b in blocks)
    wanted = [0.5 * b.macs / whole for b in blocks] if noisy else values
    assert list(tau.values()) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("together", "saves", "expected"),
    [
        (0.35, 0.23, "23"),  # less loss than what two steps chose
        (0.55, 0.23, "13"),  # the blocks alone promised less than they lose together
        (0.35, 0.19, "13"),  # less than the target, as measured
    ],
)
def test_sets_that_promise_less_loss_are_scored_and_timed_as_a_whole(
    together: float, saves: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = network()
    blocks = find_blocks(whole).blocks
    exits = {b.exit: str(at + 1) for at, b in enumerate(blocks)}
    losses = {"1": 0.3, "2": 0.15, "3": 0.1, "13": 0.5, "23": together}
    monkeypatch.setattr(FakeScorer, "losses", {frozenset(k): v for k, v in losses.items()})
    monkeypatch.setattr(FakeScorer, "exits", exits)
    monkeypatch.setattr(selection, "Scorer", FakeScorer)
    probe = Probe("x", "y", torch.zeros(1, 3, 8, 8), torch.ones(1))
    choice = choose_these(whole.copy(), [blocks[0], blocks[2]], probe)
    refinement = Refinement(
        whole,
        blocks,
        {e: losses[name] for e, name in exits.items()},
        dict(zip(exits, (0.25, 0.06, 0.17), strict=True)),
        0.2,
        probe,
        lambda model: saves if len(find_blocks(model).blocks) == 1 else 0.0,
        batch=1,
    )
    best = refinement.better(choice, 0.42)
    assert "".join(sorted(exits[b.exit] for b in best.dropped)) == expected
    assert {b.exit for b in find_blocks(best.model).blocks} == exits.keys() - {b.exit for b in best.dropped}


@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_a_set_that_saves_too_little_gives_way_to_the_next(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares only say how blocks compare: what they add up to is what was measured."""
    whole = network()
    blocks = find_blocks(whole).blocks
    exits = {b.exit: str(at + 1) for at, b in enumerate(blocks)}
    losses = {"1": 0.3, "2": 0.1, "3": 0.15, "12": 0.5}
    saves = {"": 0.0, "1": 0.19, "2": 0.1, "3": 0.23, "12": 0.42}
    monkeypatch.setattr(FakeScorer, "losses", {frozenset(k): v for k, v in losses.items()})
    monkeypatch.setattr(FakeScorer, "exits", exits)
    monkeypatch.setattr(selection, "Scorer", FakeScorer)
    probe = Probe("x", "y", torch.zeros(1, 3, 8, 8), torch.ones(1))
    timed: list[str] = []

    def saving(model: Model) -> float:
        there = {b.exit for b in find_blocks(model).blocks}
        timed.append("".join(name for exit, name in exits.items() if exit not in there))
        return saves[timed[-1]]

    shares = dict(zip(exits, (0.22 * factor, 0.2 * factor, 0.21 * factor), strict=True))
    alone = {exit: losses[name] for exit, name in exits.items()}
    refinement = Refinement(whole, blocks, alone, shares, 0.2, probe, saving, batch=1)
    best = refinement.better(choose_these(whole.copy(), [blocks[0], blocks[1]], probe), 0.42)
    assert [exits[b.exit] for b in best.dropped] == ["3"]
    assert set(timed) == {"1", "2", "3"}
