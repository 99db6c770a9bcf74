"""Choose blocks one after the other, scoring what is left again after each drop.

The publication scores once and drops the lowest (PRACTISE §3.2). Scores are no sum: which block can be
spared depends on those that are gone. So after each drop the marginal score of what remains,

    s(B | D) = (R(D ∪ B) − R(D)) / τ(B)

(τ = 1 where the target is a number of blocks) is measured again, lazily: losses rarely shrink as more is
dropped, so a block whose last known score is above the best new one need not be looked at (Minoux 1978,
Accelerated greedy algorithms).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from onnxcompress.graph.block_removal import drop_block
from onnxcompress.graph.blocks import Block, find_blocks
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop.recoverability import BATCH, STEPS, Probe, Recovery, Scorer
from onnxcompress.progress import Progress, silent
from onnxcompress.runtime.block_latency import LatencyChange

TOLERANCE = 0.02
"""Error of a block's share, as part of the whole latency, that a trial without the block allows for."""
MAX_RESCORED = 6
"""Blocks that are scored again after a drop, at most."""


@dataclass
class BlockSelection:
    """The student, block by block smaller."""

    model: Model
    feature: str
    """The tensor that stands for the original's features."""
    dropped: list[Block] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Adapters of the dropped blocks, folded."""
    loss: float = 0.0
    """R of all that was dropped."""

    def drop(self, block: Block, recovery: Recovery) -> None:
        """Drop one block more, and keep its adapters.

        Args:
            block: The block, as found in the model as it is now.
            recovery: The loss without it, and the weights with its adapters folded in.
        """
        instead = drop_block(self.model, block)
        self.feature = instead.get(self.feature, self.feature)
        self.dropped.append(block)
        self.weights.update(recovery.weights)
        self.loss = recovery.loss


def choose(
    model: Model,
    scores: Mapping[str, float],
    shares: Mapping[str, float],
    probe: Probe,
    enough: Callable[[BlockSelection], bool],
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    device: str = "cpu",
    progress: Progress = silent,
    expected: int = 0,
) -> BlockSelection:
    """Drop blocks from the model, in place, until `enough` says so or none is left.

    Args:
        model: The network, with all its blocks.
        scores: Exit of each block -> its first score, R / τ.
        shares: Exit of each block -> τ, above 0.
        probe: Images, with the original network's features.
        enough: Whether the choice meets the target.
        steps: Training steps of the adapters each time that a block is scored.
        batch: Images that run at once, at most.
        device: Where torch computes.
        progress: Called with the stage, the blocks dropped and the blocks in all.
        expected: Number of blocks to drop, where it is known; for `progress`.

    Returns:
        The model without the blocks, the blocks in the order of dropping, and their adapters.
    """
    choice = BlockSelection(model, probe.feature)
    known = dict(scores)
    while not enough(choice):
        left = [b for b in find_blocks(model).blocks if known.get(b.exit, math.inf) < math.inf]
        if not left:
            break
        block, recovery = _best(choice, left, known, shares, probe, (steps, batch), device)
        if recovery.loss == math.inf:  # what is left is not finite without it
            known[block.exit] = math.inf  # whatever its share: it is not tried again
            continue
        choice.drop(block, recovery)
        del known[block.exit]
        count = len(choice.dropped)
        progress("choosing blocks", count, max(expected or len(scores), count))
    if choice.dropped and not expected:  # only now is the number known
        progress("choosing blocks", len(choice.dropped), len(choice.dropped))
    return choice


def choose_these(
    model: Model, blocks: Sequence[Block], probe: Probe, *, batch: int = BATCH, device: str = "cpu"
) -> BlockSelection:
    """Drop given blocks from the model, in place and in order, each with adapters of its own.

    Args:
        model: The network.
        blocks: The blocks, first to last.
        probe: Images, with the original network's features.
        batch: Images that run at once, at most.
        device: Where torch computes.

    Returns:
        The model without the blocks, and their adapters.
    """
    choice = BlockSelection(model, probe.feature)
    for block in blocks:
        now = find_blocks(model)[block.exit]
        scorer = Scorer(
            model,
            [now],
            probe,
            feature=choice.feature,
            parameters=choice.weights,
            batch=batch,
            device=device,
        )
        choice.drop(now, scorer.recover(now))
    return choice


def target_missed(
    latency: LatencyChange, target: float, dropped: Sequence[Block], shares: Mapping[str, float]
) -> str:
    """Explain by how much a latency misses its target, where its interval does not explain it.

    It is missed where too little was saved, or where the blocks without one of them would save enough.

    Args:
        latency: The latency against the original's.
        target: Percent of the latency to be saved.
        dropped: The dropped blocks.
        shares: Exit of each block -> τ.

    Returns:
        The sentence; empty where the target is met.
    """
    saved = 100 * (1 - latency.ratio)
    missed = f"latency is {saved:.1f} % lower, {target:g} % was asked for"
    if 100 * (1 - latency.low) < target:
        return missed
    total = sum(shares[b.exit] for b in dropped)
    smallest = min(dropped, key=lambda b: shares[b.exit])
    rest = 1 - shares[smallest.exit] / total
    if len(dropped) < 2 or 100 * (1 - latency.high) * rest <= target + 100 * TOLERANCE:
        return ""
    return (
        f"{missed}, and without dropping {smallest.name} it would be about {saved * rest:.1f} %: try again "
        "when the machine is less busy, or with --threads 1"
    )


def _best(
    choice: BlockSelection,
    left: list[Block],
    known: dict[str, float],
    shares: Mapping[str, float],
    probe: Probe,
    how: tuple[int, int],
    device: str,
) -> tuple[Block, Recovery]:
    """Find the block with the lowest score now, and note new scores in `known`. how: steps, batch."""
    steps, batch = how
    order = sorted(left, key=lambda b: known[b.exit])[:MAX_RESCORED]
    scorer = Scorer(
        choice.model,
        order,
        probe,
        feature=choice.feature,
        parameters=choice.weights,
        steps=steps,
        batch=batch,
        device=device,
    )
    found: dict[str, Recovery] = {}
    best: Block | None = None
    for block in order:
        if best is not None and known[best.exit] <= known[block.exit]:
            break
        found[block.exit] = scorer.recover(block)
        known[block.exit] = (found[block.exit].loss - choice.loss) / shares[block.exit]
        if best is None or known[block.exit] < known[best.exit]:
            best = block
    assert best is not None
    return best, found[best.exit]
