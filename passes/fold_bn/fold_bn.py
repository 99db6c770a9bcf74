"""Fold BatchNorm into the linear layer before or after it, and record the statistics that it holds.

With the BatchNorm `n(x) = s x + t` per channel (`graph.batch_norm`; s = gamma / sqrt(variance + epsilon),
t = beta - mean s) and a linear layer with weight W and bias b (`graph.linear_layer`), all in float64:

    backward    n(W x + b) = (s W) x + (s b + t)                       s along the output channels
                n((W x + b) + a) = (s W) x + (s (b + a) + t)           an Add of a constant a in between
    forward     W n(x) + b = (W s) x + (b + W t)                       s along the input channels,
                                                                       W t summed over the kernel's taps

Backward is into the layer before the BatchNorm, forward into the layer after it. The layer's bias takes the
offset (Gemm: alpha stays, `beta C` becomes C). A MatMul has no bias: the BatchNorm node turns into an Add,
or an Add beside the MatMul takes the offset. Sources: Krishnamoorthi, arXiv 1806.08342, §3.2; Horton et
al., arXiv 2011.09058, §3.1 for the record; the ONNX operator specification for the layouts.

Legality (1 to 5 in `graph.batch_norm`, 6 and 7 in `graph.linear_layer`); every other BatchNorm stays, with
the reason:
 8. nothing else reads the tensors between layer and BatchNorm: there is no second consumer (nodes in the
    bodies of If, Loop and Scan count), and none of them is a graph output;
 9. the layer has as many channels as the BatchNorm;
10. no other node reads the weight (reading its shape is allowed), or `copy_shared` permits a copy of it (a
    shared bias is always replaced by a bias of the layer's own);
11. the bias is a constant, where it has to change;
12. the new values are finite in the layer's type;
13. forward: the layer does not pad with zeros (they would not be normalized), or t = 0; all taps of a
    ConvTranspose reach every output (1x1, stride 1), or t = 0; a Gemm does not transpose its input.
    A Flatten from axis 1 may lie in between;
14. forward: no channel's mean is more than 64 deviations from zero. A BatchNorm subtracts the mean first;
    folded, the layer sums terms of that size, and the rounding errors of the large terms remain in the
    small difference.

A BatchNorm is folded backward where possible, else forward, repeatedly until none folds any more. Backward,
the layer's output takes the name of the BatchNorm's output, so graph outputs and the record stay valid.
Forward, that tensor disappears: the record then holds the layer's new input, with the stored mean and
deviation. Does not handle: BatchNorm inside the bodies of If, Loop and Scan and inside functions, or across
Transpose, Reshape, pooling, Concat, Relu. A BatchNorm without a linear layer beside it stays as it is: one
node is its cheapest form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.account import Change, Figures, Refusal
from onnxcompress.formatting import counted
from onnxcompress.graph.batch_norm import is_batch_norm, read_batch_norm
from onnxcompress.graph.query import DEFAULT_DOMAINS, is_op, node_label, producer
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model
from onnxcompress.option_fields import option
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.fold_bn import into_following, into_preceding
from onnxcompress.progress import Progress, silent
from onnxcompress.statistics.record import (
    ChannelStatistics,
    known_statistics,
    read_record,
    write_present,
)


@dataclass(frozen=True)
class FoldBatchNormFigures(Figures):
    """The figures of `fold-bn`."""

    folded: int
    """Number of BatchNorms that were folded."""
    left: int
    """Number of BatchNorms that stay."""
    recorded: int
    """Number of tensors in the record of statistics."""


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNorm into the convolutions and matrix products beside it.

    The outputs stay the same but for rounding. The mean and deviation of each BatchNorm's output are
    recorded in the file, for passes that have no other data.

    \b
    Example:
      onnxcompress fold-bn net.onnx folded.onnx
    """

    name: ClassVar[str] = "fold-bn"
    figures: ClassVar[type[Figures]] = FoldBatchNormFigures
    preserves_function: ClassVar[bool] = True

    copy_shared: bool = option(
        False,
        "Copy a weight that several layers share, so that a BatchNorm behind one of them can be folded.",
    )

    def preview(self, model: Model, progress: Progress = silent) -> list[Refusal]:
        """List what would be left alone: the pass is quick enough to be run on a copy.

        Args:
            model: The model; it stays as it is.
            progress: Called with the expected work, with no steps.

        Returns:
            What would be left alone, with the reasons.
        """
        return list(self.apply(model.copy()).refusals)

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[FoldBatchNormFigures]:
        """Fold every BatchNorm of the main graph that can be folded; the others come back as refusals.

        Args:
            model: The model to change.
            progress: Called with the stage, the BatchNorms folded and the BatchNorms in all.

        Returns:
            The changes, the BatchNorms that stay with the reasons, and the figures.
        """
        inside = list(_in_bodies(model))
        nodes = [node for node in model.graph.nodes if is_batch_norm(node)]
        before = read_record(model)
        record = known_statistics(model)
        work = _Folding(model, self.copy_shared, record)
        refusals = inside + _fold_all(work, nodes, progress)
        write_present(model, record)
        changes = work.changes
        figures = FoldBatchNormFigures(len(changes), len(refusals), len(record))
        if not changes and record.keys() != before.keys():
            changes = [Change(model.name, f"recorded the statistics of {counted(len(record), 'tensor')}")]
        return PassResult(changes, refusals, figures)


@dataclass
class _Folding:
    """The state of one application of the pass."""

    model: Model
    copy_shared: bool
    record: dict[str, ChannelStatistics]
    changes: list[Change] = field(default_factory=list)
    ranks: dict[str, int] | None = field(default=None)

    def rank(self, tensor: gs.Tensor) -> int | None:
        """Look up the rank of a tensor; folding changes no rank, and ranks are inferred when first needed.

        Args:
            tensor: A tensor of the graph.

        Returns:
            Its number of axes, or None where it is unknown.
        """
        if is_op(producer(tensor), "Flatten", "Gemm"):
            return 2
        if self.ranks is None:
            self.ranks = {name: len(shape) for name, shape in tensor_shapes(self.model).items()}
        return self.ranks.get(tensor.name)


def _fold_all(work: _Folding, nodes: list[gs.Node], progress: Progress) -> list[Refusal]:
    """Fold until nothing folds any more; return the reasons of those that stay."""
    total = len(nodes)
    while True:
        refusals, left = [], []
        for node in nodes:
            refusal = _fold(work, node)
            if refusal is None:
                progress("folding", len(work.changes), total)
                continue
            refusals.append(refusal)
            left.append(node)
        if len(left) == len(nodes):
            return refusals
        nodes = left


def _fold(work: _Folding, node: gs.Node) -> Refusal | None:
    """Fold one BatchNorm backward or forward, or return the reason against it."""
    norm = read_batch_norm(work.model, node)
    if isinstance(norm, Refusal):
        return norm
    label, source, output = node_label(node), node.inputs[0], node.outputs[0].name
    between = {source.name} | {t.name for n in source.inputs if is_op(n, "Add") for t in n.inputs}
    behind = into_preceding.fold(work.model, norm, work.copy_shared, work.rank)
    if isinstance(behind, str):
        work.changes.append(Change(label, behind))
        for name in between:  # these tensors are gone, or scaled
            work.record.pop(name, None)
        return None
    ahead = into_following.fold(work.model, norm, work.copy_shared, work.rank)
    if isinstance(ahead, str):
        work.changes.append(Change(label, ahead))
        work.record.pop(output, None)
        if source.name not in work.record or work.record[source.name].estimated:
            std = np.sqrt(np.maximum(norm.variance, 0))
            work.record[source.name] = ChannelStatistics(norm.mean.astype("float32"), std.astype("float32"))
        return None
    return behind or ahead or _lone(node)


def _lone(node: gs.Node) -> Refusal:
    origin = producer(node.inputs[0])
    readers = " and ".join(sorted({n.op for n in node.outputs[0].outputs})) or "nothing else"
    before = f"follows {origin.op} {node_label(origin)!r}" if origin else "follows an input"
    return Refusal(node_label(node), f"no linear layer is beside it: it {before}, {readers} reads it")


def _in_bodies(model: Model) -> Iterator[Refusal]:
    """Refuse the BatchNorms inside subgraphs and functions."""
    for graph in model.graph.subgraphs(recursive=True):
        for node in filter(is_batch_norm, graph.nodes):
            rule = f"it is inside {graph.name!r}, the body of an If, Loop or Scan"
            yield Refusal(node_label(node), rule, "fold before the control flow is exported")
    for function in model.functions:
        for inner in function.node:
            if inner.op_type == "BatchNormalization" and inner.domain in DEFAULT_DOMAINS:
                rule = f"it is inside the function {function.name!r}"
                yield Refusal(inner.name or inner.output[0], rule, "inline it with onnx.inliner")
