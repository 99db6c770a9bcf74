"""The passes, in the order in which a pipeline would use them. Importing this imports none of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from onnxcompress.passing import Pass


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
    Entry("drop-blocks", "drop_blocks", "DropBlocks", "Drop residual blocks to meet a latency."),
)


def load_pass(name: str) -> type[Pass]:
    """The class of a pass. Raises KeyError where there is none of that name."""
    entry = {e.name: e for e in CATALOGUE}[name]
    found: type[Pass] = getattr(import_module(f"onnxcompress.passes.{entry.module}"), entry.cls)
    return found
