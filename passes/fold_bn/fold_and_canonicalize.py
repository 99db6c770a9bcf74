"""The preparation of layer-wise passes: shared weights copied, BatchNorm folded, a canonical form."""

from __future__ import annotations

from onnxcompress.account import Change
from onnxcompress.formatting import counted
from onnxcompress.graph.canonicalize import canonicalize
from onnxcompress.graph.shared_weights import copy_shared_weights
from onnxcompress.model import Model
from onnxcompress.passes.fold_bn.fold_bn import FoldBatchNorm


def fold_and_canonicalize(model: Model, copy_shared: bool = False) -> list[Change]:
    """Fold BatchNorm and canonicalize the graph (`graph.canonicalize`) in place; the outputs stay the same.

    Args:
        model: The model to change.
        copy_shared: Copy weights that layers share also where they are not small (`graph.shared_weights`).

    Returns:
        The changes, for the result of the pass.
    """
    changes = copy_shared_weights(model, asked=copy_shared)
    folded = FoldBatchNorm().apply(model).measured.folded
    changes += [Change(model.name, f"{counted(folded, 'BatchNorm')} folded")] * bool(folded)
    return changes + canonicalize(model)
