"""The preparation that the layer-wise passes share: BatchNorm folded, the graph in canonical form."""

from __future__ import annotations

from onnxcompress.account import Change
from onnxcompress.graph.canonicalize import canonicalize
from onnxcompress.model import Model
from onnxcompress.passes.fold_bn.fold_bn import FoldBatchNorm


def fold_and_canonicalize(model: Model) -> list[Change]:
    """Fold BatchNorm and canonicalize the graph (`graph.canonicalize`) in place; the outputs stay the same.

    Args:
        model: The model to change.

    Returns:
        The changes, for the result of the pass.
    """
    folded = FoldBatchNorm().apply(model).measured.folded
    changes = [Change(model.name, f"{folded} BatchNorms folded")] if folded else []
    return changes + canonicalize(model)
