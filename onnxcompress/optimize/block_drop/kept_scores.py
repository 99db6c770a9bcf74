"""Latency shares and recoverabilities of blocks, computed or taken from an earlier run that was killed.

Each block's recoverability is kept as soon as it is known: a run that was killed scores the other blocks.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from onnxcompress.graph.blocks import Block
from onnxcompress.optimize.block_drop.recoverability import Scorer
from onnxcompress.optimize.intermediate_results import Parts, find_kept, keep
from onnxcompress.progress import Progress
from onnxcompress.runtime.block_latency import Share, noisy


def latency_shares(
    blocks: Sequence[Block],
    measure: Callable[[], Mapping[str, Share]],
    undisturbed: Callable[[], bool],
    context: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Share]:
    """Return the latency share of each block, measured now or earlier on this machine.

    Shares of a disturbed clock are not kept: the next run is to measure anew.

    Args:
        blocks: The blocks.
        measure: Measures the shares, by exits of the blocks.
        undisturbed: Whether, once they are measured, nothing else on the machine disturbed the clock.
        context: What they depend on: the model and how it runs, as JSON values.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The shares by exits.
    """
    kind, stage = "latency shares", "measuring latency shares"
    exits = [block.exit for block in blocks]
    parts: Parts = partial(dict, context, blocks=exits, machine=platform.node())
    found = find_kept(kind, parts)
    if found is not None:
        return {exit: Share(*row) for exit, row in zip(exits, found["rows"].tolist(), strict=True)}
    progress(stage, 0, 1)
    shares = dict(measure())
    progress(stage, 1, 1)
    if undisturbed() and not noisy(shares):
        rows = [(share.value, share.low, share.high) for share in (shares[exit] for exit in exits)]
        keep(kind, parts, {"rows": np.array(rows, np.float64)})
    return shares


def recoverabilities(
    blocks: Sequence[Block],
    scorer: Callable[[], Scorer],
    context: Mapping[str, Any],
    progress: Progress,
) -> dict[str, float]:
    """Return the recoverability of each block, computed now or by an earlier run.

    Args:
        blocks: The blocks.
        scorer: Makes what scores them; it is called where a block is left to be scored.
        context: What all scores depend on: the model, the feature and the images, as JSON values.
        progress: Called with the stage, the blocks done and the blocks in all.

    Returns:
        The recoverabilities by exits.
    """
    kind = "recoverability"
    parts: dict[str, Parts] = {block.exit: partial(dict, context, block=block.exit) for block in blocks}
    found = {exit: find_kept(kind, own) for exit, own in parts.items()}
    losses = {exit: float(values["loss"]) for exit, values in found.items() if values is not None}
    left = [block for block in blocks if block.exit not in losses]
    for block, recovery in zip(left, scorer().recover_each(left) if left else (), strict=True):
        losses[block.exit] = recovery.loss
        values = {"loss": np.array(recovery.loss, np.float64)}
        keep(kind, parts[block.exit], values)
        progress("scoring blocks", len(losses), len(blocks))
    return {block.exit: losses[block.exit] for block in blocks}
