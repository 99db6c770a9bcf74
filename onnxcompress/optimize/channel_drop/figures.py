"""The figures of `drop-channels`."""

from __future__ import annotations

from dataclasses import dataclass

from onnxcompress.account import BeforeAfter, Figures
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome
from onnxcompress.runtime.block_latency import LatencyChange


@dataclass(frozen=True)
class ChannelGroupRow:
    """A group of channels that can be cut, and what was cut of it."""

    name: str
    channels: int
    """Channels before; several that must go together count as one."""
    kept: int
    parameters: int
    """Weights of the original network that belong to its channels."""
    macs: int
    """Multiply-accumulates of the original network that belong to its channels."""
    error: float | None = None
    """Relative error of the outputs that losing the cut channels was predicted to leave; with
    another criterion than `refit` the sum of the relative norms of their weights; None: none was cut."""


@dataclass(frozen=True)
class DropChannelsFigures(Figures):
    """The figures of `drop-channels`."""

    feature: str
    """The tensor at which the networks before and after are matched."""
    preprocess: str
    """Preprocessing of the inputs; empty where they are no images."""
    latency: LatencyChange
    """Latency after cutting, against the original's."""
    groups: tuple[ChannelGroupRow, ...]
    """All groups that can be cut, in the order of the network."""
    macs: BeforeAfter | None = None
    """Multiply-accumulates for one image; None: sizes are open."""
    parameters: BeforeAfter | None = None
    """Parameters of the model as it was given, and of the result."""
    feature_error: float | None = None
    """Relative squared error of the features after refitting and fine-tuning, on inputs kept aside from
    both; None: nothing was cut."""
    tuning: TuningOutcome | None = None
    """Which state of fine-tuning was kept; None: there was none."""
