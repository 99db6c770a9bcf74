"""Choose blocks one after the other, scoring what is left again after each drop.

The publication scores once and drops the lowest (PRACTISE §3.2). Scores are no sum: which block can be
spared depends on those that are gone. So after each drop the marginal score of what remains,

    s(B | D) = (R(D ∪ B) − R(D)) / τ(B)

(τ = 1 where the target is a number of blocks) is measured again, lazily: losses rarely shrink as more is
dropped, so a block whose last known score is above the best new one need not be looked at (Minoux 1978,
Accelerated greedy algorithms).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from onnxcompress.graph.block_removal import drop_block
from onnxcompress.graph.blocks import Block, find_blocks
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop.recoverability import BATCH, STEPS, Probe, Recovery, Scorer
from onnxcompress.progress import Progress, silent

LOOKS = 6
"""Blocks that are scored again after a drop, at most."""


@dataclass
class Choice:
    """The student as it grows smaller."""

    model: Model
    feature: str
    """The tensor that stands for the original's features."""
    dropped: list[Block] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Adapters of the dropped blocks, folded."""
    loss: float = 0.0
    """R of all that was dropped."""


def choose(
    model: Model,
    scores: Mapping[str, float],
    shares: Mapping[str, float],
    probe: Probe,
    enough: Callable[[Choice], bool],
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    device: str = "cpu",
    progress: Progress = silent,
    expected: int = 0,
) -> Choice:
    """Drop blocks from `model`, in place, until `enough` or none is left.

    scores: first score R / τ by the block's exit; shares: τ by exit, above 0; both for all blocks. steps:
    of adapter training a look; batch: images that run at once, at most.
    """
    choice = Choice(model, probe.feature)
    known = dict(scores)
    while not enough(choice):
        left = [b for b in find_blocks(model).blocks if b.exit in known]
        if not left:
            break
        block, recovery = _best(choice, left, known, shares, probe, (steps, batch), device)
        instead = drop_block(model, block)
        choice.feature = instead.get(choice.feature, choice.feature)
        choice.dropped.append(block)
        choice.weights.update(recovery.weights)
        choice.loss = recovery.loss
        del known[block.exit]
        progress("choosing blocks", len(choice.dropped), max(expected, len(choice.dropped)))
    return choice


def _best(
    choice: Choice,
    left: list[Block],
    known: dict[str, float],
    shares: Mapping[str, float],
    probe: Probe,
    how: tuple[int, int],
    device: str,
) -> tuple[Block, Recovery]:
    """The block with the lowest score now; `known` learns what is measured. how: steps, batch."""
    steps, batch = how
    order = sorted(left, key=lambda b: known[b.exit])[:LOOKS]
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
