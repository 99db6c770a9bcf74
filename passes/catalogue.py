"""The passes, in the order a pipeline would use them; importing this module imports none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    pass


class Entry(NamedTuple):
    """Where a pass is defined, and its one-line description."""

    name: str
    module: str
    cls: str
    summary: str


CATALOGUE: tuple[Entry, ...] = (
    Entry("fold-bn", "fold_bn", "FoldBatchNorm", "Fold BatchNorm into the layers beside it."),
    Entry("calibrate", "calibrate", "Calibrate", "Estimate statistics that no BatchNorm holds."),
    Entry("equalize", "equalize", "Equalize", "Rescale channels between layers for fewer bits."),
    Entry("absorb-bias", "absorb_bias", "AbsorbBias", "Move high biases into the next layers."),
    Entry("correct-bias", "correct_bias", "CorrectBias", "Correct biases for shifted output means."),
    Entry("drop-blocks", "drop_blocks", "DropBlocks", "Drop residual blocks to meet a latency target."),
    Entry("drop-channels", "drop_channels", "DropChannels", "Cut channels to meet a latency target."),
    Entry("prune", "prune", "Prune", "Set weights to zero and refit the others."),
    Entry("quantize", "quantize", "Quantize", "Quantize weights and activations to few bits."),
    Entry("fp16", "fp16", "HalfPrecision", "Compute in half precision where accuracy allows."),
)
