"""BatchNorm folded, and the graph in the form that layer-wise passes work on."""

from __future__ import annotations

from onnxcompress.account import Change
from onnxcompress.graph.canonicalize import canonicalize
from onnxcompress.model import Model
from onnxcompress.passes.fold_bn.fold_bn import FoldBatchNorm


def fold_and_canonicalize(model: Model) -> list[Change]:
    """Fold BatchNorm, then rewrite the graph (`graph.canonicalize`), in place; the outputs stay.

    Returns:
        What changed, for the account of a pass.
    """
    folded = FoldBatchNorm().apply(model).measured["folded"]
    changes = [Change(model.name, f"{folded} BatchNorms folded")] if folded else []
    return changes + canonicalize(model)
