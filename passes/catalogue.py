"""The passes, in the order in which a pipeline would use them. Importing this imports none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    pass


class Entry(NamedTuple):
    """Where a pass is, and what it does in one line."""

    name: str
    module: str
    cls: str
    summary: str


CATALOGUE: tuple[Entry, ...] = (
    Entry("fold-bn", "fold_bn", "FoldBatchNorm", "Fold BatchNorm into the layers beside it."),
    Entry("calibrate", "calibrate", "Calibrate", "Estimate statistics where no BatchNorm knows them."),
    Entry("equalize", "equalize", "Equalize", "Rescale channels between layers for fewer bits."),
    Entry("absorb-bias", "absorb_bias", "AbsorbBias", "Move high biases into the layers behind."),
    Entry("correct-bias", "correct_bias", "CorrectBias", "Give back what other weights changed in means."),
    Entry("drop-blocks", "drop_blocks", "DropBlocks", "Drop residual blocks to meet a latency."),
    Entry("prune", "prune", "Prune", "Set weights to zero and make up for them with the others."),
    Entry("quantize", "quantize", "Quantize", "Quantize weights and activations to few bits."),
    Entry("fp16", "fp16", "HalfPrecision", "Compute in half precision where it does no harm."),
)
