"""Better the set of blocks that was chosen step by step for a latency: fewer of them, or others.

A step takes the block with the lowest s(B | D), which may save more than the target still needs, and no
later step takes it back. So once the target is reached, blocks that it does not need are put back, and the
sets that promise less loss (`subsets`) are scored as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from onnxcompress.errors import OptionError
from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import Block
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop.recoverability import Probe
from onnxcompress.optimize.block_drop.selection import TOLERANCE, BlockSelection, choose_these
from onnxcompress.optimize.block_drop.subsets import cheapest_sets
from onnxcompress.progress import Progress, silent

TRIED = 4
"""Other sets of blocks that are scored as a whole, at most."""


@dataclass(frozen=True)
class Refinement:
    """Betters a choice of blocks that saves a target."""

    whole: Model
    """The network with all its blocks."""
    blocks: Sequence[Block]
    """The blocks that may be dropped, in order."""
    losses: Mapping[str, float]
    """Exit of each block -> R of the block alone."""
    shares: Mapping[str, float]
    """Exit of each block -> τ; only their relative sizes matter."""
    target: float
    """Part of the latency to be saved."""
    probe: Probe
    """Images, with the original network's features."""
    saving: Callable[[Model], float]
    """Measures the part of the latency that a network saves."""
    batch: int
    """Images that run at once, at most."""
    device: str = "cpu"
    progress: Progress = silent

    def better(self, choice: BlockSelection, saved: float) -> BlockSelection:
        """Put back blocks that are not needed, then try other sets.

        Args:
            choice: The blocks as chosen step by step.
            saved: Part of the latency that they save, as measured.

        Returns:
            The choice with the lowest loss of those that save the target.
        """
        scale = saved / sum(self.shares[b.exit] for b in choice.dropped)
        needed = spared(choice.dropped, self.shares, saved, self.target, self._saving_of)
        if len(needed) < len(choice.dropped):
            choice = self._scored(needed)
        sets = self._promising(choice, scale)
        for done, blocks in enumerate(sets):
            self.progress("trying sets of blocks", done, len(sets))
            with suppress(OptionError):  # one of them is a block only while another is there
                trial = self._scored(blocks)
                if trial.loss < choice.loss and self.saving(trial.model) >= self.target:
                    choice = trial
        self.progress("trying sets of blocks", len(sets), max(len(sets), 1))
        return choice

    def _promising(self, choice: BlockSelection, scale: float) -> list[list[Block]]:
        """List the sets whose blocks lose less, each alone, than those of the choice, the best first."""
        losses = [self.losses[b.exit] for b in self.blocks]
        shares = [scale * self.shares[b.exit] for b in self.blocks]
        limit = sum(self.losses[b.exit] for b in choice.dropped)
        found = cheapest_sets(losses, shares, self.target, TRIED)
        return [
            [self.blocks[i] for i in places] for places in found if sum(losses[i] for i in places) < limit
        ]

    def _scored(self, blocks: Sequence[Block]) -> BlockSelection:
        return choose_these(self.whole.copy(), blocks, self.probe, batch=self.batch, device=self.device)

    def _saving_of(self, blocks: Sequence[Block]) -> float:
        model = self.whole.copy()
        try:
            drop_blocks(model, [b.exit for b in blocks])
        except OptionError:  # one of them is a block only while another is gone
            return 0.0
        return self.saving(model)


def spared(
    order: Sequence[Block],
    shares: Mapping[str, float],
    saved: float,
    target: float,
    measure: Callable[[Sequence[Block]], float],
) -> list[Block]:
    """Keep only the blocks that the target needs dropped: others are taken back, those dropped last first.

    Shares are estimates. That they are too small shows only when the whole is measured, and then more
    blocks are gone than need be. A block is taken back where the rest, measured, still saves the target.

    Args:
        order: Blocks in the order in which they were dropped.
        shares: Exit of each block -> τ; only their relative sizes matter here.
        saved: Part of the latency that all of `order` saves, as measured.
        target: Part of the latency to be saved.
        measure: Measures the part of the latency that dropping just these blocks saves.

    Returns:
        The blocks that stay dropped, in the same order.
    """
    needed = list(order)
    for block in reversed(order):
        each = saved / sum(shares[b.exit] for b in needed)
        rest = [b for b in needed if b is not block]
        if not rest or saved - each * shares[block.exit] < target - TOLERANCE:
            continue
        without = measure(rest)
        if without >= target:
            needed, saved = rest, without
    return needed
