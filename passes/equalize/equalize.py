"""Cross-layer equalization: give the rows of a layer and the columns of its readers equal ranges.

Between a linear layer 2 and its reader 1, `W₁ φ(W₂ x + b₂) + b₁`, with φ(s z) = s φ(z) for s > 0:

    W₂ row c ·= s_c      b₂[c] ·= s_c      W₁ column c /= s_c          leaves the function what it was.

`graph.channel_groups` finds the channels that must have the same scale: pairs, depthwise triples, the
writers and readers of a residual stream or of a Concat. `scales` finds the scales with which weights lose
the least precision under one scale per tensor, for all layers at once, to convergence. Sources: Nagel et
al., Data-Free Quantization through Weight Equalization and Bias Correction (ICCV 2019), §4.1; Horton et
al., Layer-Wise Data-Free CNN Compression (arXiv 2011.09058), §3.2.

A channel group is left alone, with the reason, where one of these holds (`ChannelGroups.unscalable`):
 1. it reaches an operator that does not commute with a scale (Sigmoid, HardSwish, Softmax,
    BatchNormalization: fold it first), one without a rule, an input or output of the model, or the body of
    an If, Loop or Scan;
 2. it reaches a Clip with a bound that is not 0 (ReLU6). `clip="per-channel"` rewrites it exactly as
    min(max(x, s low), s high), with one bound per channel: one more operator, a Min, which onnxruntime does
    not fuse as it does a Clip;
 3. the weight of a writer or reader is computed, shared or of 16 bits, or a writer's bias is computed;
 4. a scaled value would leave the range of its type.

`assumption_free`: layers that meet in such a group, except by 3 and 4, are equalized all the same, and two
Mul nodes with one number per channel, after the writer and before the reader, undo the scales.
`assumption_free_scales` returns such scales for all layers without changing the graph.

Arithmetic is in float64. The record follows: statistics of a tensor are multiplied by its channels' scales.
Does not handle: several scales per tensor; activations: equal weight ranges may make those of activations
less equal (`absorb-bias`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from onnxcompress.account import BeforeAfter, Change, Figures, Refusal
from onnxcompress.graph.channel_groups.groups import ChannelGroups
from onnxcompress.graph.channel_groups.tracer import find_channel_groups
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.model import Model
from onnxcompress.option_fields import option
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.equalize import apply_scales as edits
from onnxcompress.passes.equalize.scales import Balance, Side
from onnxcompress.progress import Progress, silent


@dataclass(frozen=True)
class EqualizeFigures(Figures):
    """The figures of `equalize`."""

    layers: int
    """Number of linear layers."""
    equalized: int
    """Number of groups of layers that were equalized."""
    sweeps: int
    """Number of sweeps over the layers until the scales were found."""
    converged: bool
    """Whether the scales had converged then."""
    largest_scale: float
    """Largest factor by which a channel was scaled."""
    lost_bits: BeforeAfter
    """Binary digits that one scale for a layer's weights costs the average channel."""
    nodes_added: int
    """Number of nodes that compute at run time and were not there before."""
    recorded: int
    """Number of tensors whose record was scaled."""


@dataclass(frozen=True)
class Equalize(Pass):
    """Rescale channels between layers so that weights need fewer bits.

    The outputs stay the same but for rounding. For files that another tool will quantize: `quantize` does
    it itself. Run fold-bn first: what a BatchNorm normalizes is left alone.

    \b
    Example:
      onnxcompress equalize folded.onnx equalized.onnx
    """

    name: ClassVar[str] = "equalize"
    figures: ClassVar[type[Figures]] = EqualizeFigures
    preserves_function: ClassVar[bool] = True

    clip: Literal["keep", "per-channel"] = option(
        "keep",
        "Between layers with a Clip (ReLU6): change nothing, or make it Relu and Min, a bound per channel.",
    )
    assumption_free: bool = option(
        False, "Equalize the other layers, too, with Mul nodes that undo it (slower to run)."
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

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[EqualizeFigures]:
        """Equalize in place; the channel groups that were left alone come back as refusals.

        Args:
            model: The model to change.
            progress: Called with the stage, the sweeps done and the sweeps at most.

        Returns:
            The changes, the channel groups that stay with the reasons, and the figures.
        """
        groups = find_channel_groups(model, scale_clips=self.clip == "per-channel")
        while True:
            shared_scale, per_layer_scale = self._groups(groups)
            balance = Balance(groups, shared_scale, per_layer_scale)
            before = balance.lost_bits()
            balance.solve(progress)
            balance.settle()
            scales = balance.scales(groups.count)
            values, unscalable = edits.new_values(model, groups, balance, scales)
            if not unscalable:
                break
            groups.unscalable |= unscalable
            groups.overflow |= set(unscalable)
        refusals, lost = _refusals(groups, balance), BeforeAfter(before, balance.lost_bits())
        changes: list[Change] = []
        nodes, recorded = _running(model), 0
        if values:
            changes = _changes(groups, balance)
            edits.write_values(model, values)
            changes += edits.write_bounds(model, groups.bounds, scales)
            changes += edits.write_products(model, groups, balance)
            recorded = edits.write_statistics(model, groups, scales)
        figures = _figures(groups, balance, lost, _running(model) - nodes, recorded)
        return PassResult(changes, refusals, figures)

    def _groups(self, groups: ChannelGroups) -> tuple[np.ndarray, np.ndarray]:
        """Mask the channel groups that get one shared scale, and those where each layer gets its own."""
        met = _meeting(groups)
        free = np.ones(groups.count, bool)
        free[list(groups.unscalable)] = False
        per_layer_scale = met & ~free
        for layer in groups.layers:
            if not layer.scalable:
                per_layer_scale[layer.reads] = per_layer_scale[layer.writes] = False
        per_layer_scale[list(groups.overflow)] = False
        return free, per_layer_scale & self.assumption_free


@dataclass(frozen=True)
class LayerScales:
    """The factors of a layer's inputs and outputs, float64: `v_out * (W' (v_in * x) + b')`."""

    inputs: np.ndarray
    """(input channels,)"""
    outputs: np.ndarray
    """(output channels,)"""


def assumption_free_scales(model: Model, *, shared: bool = True) -> dict[str, LayerScales]:
    """Find scales that make weight magnitudes comparable within and between layers of any topology.

    The graph stays as it is. The scales give the equalized weight W' (`equalized_weight`) and the bias b' =
    b / outputs of each layer; zeros of W' are zeros of W. Measured: magnitude pruning across layers loses
    less with shared scales, rounding to one scale per tensor loses less with separate ones.

    Source: Horton et al., Layer-Wise Data-Free CNN Compression (arXiv 2011.09058), §3.2.

    Args:
        model: The model.
        shared: Whether layers that write or read the same channel (a residual stream) get one scale for it,
            which keeps the writers' relative sizes. Otherwise each layer gets its own, as in the source.

    Returns:
        Name of the layer's output tensor -> its scales. Layers whose weight is computed or shared are
        absent.
    """
    groups = find_channel_groups(model)
    met, none = _meeting(groups), np.zeros(groups.count, bool)
    balance = Balance(groups, met, none) if shared else Balance(groups, none, met)
    balance.solve()
    return {
        layer.linear.output_name: LayerScales(np.exp(balance.reads(at)), np.exp(-balance.writes(at)))
        for at, layer in enumerate(groups.layers)
        if layer.own
    }


def equalized_weight(linear: Linear, scales: LayerScales) -> np.ndarray:
    """Compute W' of `assumption_free_scales`: the weight with its scales taken out.

    Args:
        linear: The layer.
        scales: Its scales.

    Returns:
        The new weight in the layout of the stored one, float64.
    """
    return edits.scaled_weight(linear, 1 / scales.outputs, scales.inputs)


def _running(model: Model) -> int:
    """Count the nodes that compute something at run time."""
    return sum(node.op != "Constant" for node in model.graph.nodes)


def _meeting(groups: ChannelGroups) -> np.ndarray:
    """Mask the channel groups that at least one layer writes and at least one layer reads."""
    met = np.zeros((2, groups.count), bool)
    for layer in groups.layers:
        met[0, layer.writes] = met[1, layer.reads] = True
    return np.asarray(met.all(0))


def _sides(stream: list[Side]) -> tuple[list[Side], list[Side]]:
    """Separate writers from readers."""
    return [s for s in stream if not s.reads], [s for s in stream if s.reads]


def _changes(groups: ChannelGroups, balance: Balance) -> list[Change]:
    changes = []
    for stream in balance.streams:
        writers, readers = _sides(stream)
        if any(side.shift[balance.shared_scale[side.labels]].any() for side in stream):
            label = groups.layers[writers[0].layer].linear.label
            count = f"{len(writers)} layer{'s' * (len(writers) > 1)}"
            changes.append(Change(label, f"{count} equalized with {len(readers)} that read the output"))
    return changes


def _refusals(groups: ChannelGroups, balance: Balance) -> list[Refusal]:
    """Refuse each stream with channels that no scale was found for."""
    found = []
    for stream in balance.all_streams:
        writers, readers = _sides(stream)
        if not writers:
            continue
        labels = np.unique(np.concatenate([side.unique for side in writers]))
        unscalable = [
            label
            for label in labels.tolist()
            if label in groups.unscalable and not balance.per_layer_scale[label]
        ]
        reason = groups.unscalable[unscalable[0]] if unscalable else None
        if reason is None or not (readers or groups.untraced.intersection(unscalable)):
            continue
        some = "" if len(unscalable) == len(labels) else f"{len(unscalable)} of {len(labels)} channels "
        behind = f" with {groups.layers[readers[0].layer].linear.label!r}" if readers else ""
        rule = f"{some}not equalized{behind}: {reason.node!r} {reason.rule}"
        found.append(Refusal(groups.layers[writers[0].layer].linear.label, rule, reason.remedy))
    return found


def _figures(
    groups: ChannelGroups, balance: Balance, lost: BeforeAfter, nodes_added: int, recorded: int
) -> EqualizeFigures:
    moved = [s for s in balance.streams if any(side.shift.any() for side in s)]
    shifts = [abs(side.shift).max(initial=0.0) for side in balance.sides]
    return EqualizeFigures(
        layers=len(groups.layers),
        equalized=len(moved),
        sweeps=balance.sweeps,
        converged=balance.converged,
        largest_scale=float(np.exp(max(shifts, default=0.0))),
        lost_bits=lost,
        nodes_added=nodes_added,
        recorded=recorded,
    )
