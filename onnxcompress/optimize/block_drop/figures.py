"""The figures that `drop-blocks` measured."""

from __future__ import annotations

from dataclasses import dataclass

from onnxcompress.account import Figures
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome
from onnxcompress.runtime.block_latency import Additivity, LatencyChange, Share


@dataclass(frozen=True)
class BlockRow:
    """A block of the original network, and its scores with all other blocks in place.

    The scores are None where the blocks to drop were named: then none is scored.
    """

    name: str
    exit: str
    """The tensor that leaves the block."""
    dropped: bool
    latency_share: Share | None = None
    """Latency share τ, as measured."""
    recoverability: float | None = None
    """Recoverability R: relative squared error of the features that adapters cannot recover."""
    score: float | None = None
    """R over τ, with τ corrected for a noisy clock."""


@dataclass(frozen=True)
class DropBlocksFigures(Figures):
    """The figures of `drop-blocks`."""

    feature: str
    """The tensor at which the networks before and after are matched."""
    preprocess: str
    """Preprocessing of the inputs; empty where they are no images."""
    latency: LatencyChange
    """Latency after dropping, against the original's."""
    blocks: tuple[BlockRow, ...]
    """All blocks, in the order of the network."""
    noisy_latency: bool | None = None
    """Whether shares of multiply-accumulates replace latency shares; None: no shares were needed."""
    order: tuple[str, ...] | None = None
    """Names of the dropped blocks in the order of dropping; None: the options named the blocks."""
    choosing_loss: float | None = None
    """Relative squared error of the features after the choice, before refitting."""
    feature_error: float | None = None
    """Relative squared error of the features after refitting and fine-tuning, on inputs kept aside from
    both; None: nothing was dropped."""
    tuning: TuningOutcome | None = None
    """Which state of fine-tuning was kept; None: there was none."""
    additivity: Additivity | None = None
    """Saving predicted from the latency shares; None: nothing was dropped, or no shares were measured."""
