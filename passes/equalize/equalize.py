"""Cross-layer equalization: give the rows of a layer and the columns of its readers equal ranges.

Between a linear layer 2 and its reader 1, `W₁ φ(W₂ x + b₂) + b₁`, with φ(s z) = s φ(z) for s > 0:

    W₂ row c ·= s_c      b₂[c] ·= s_c      W₁ column c /= s_c          leaves the function what it was.

`_equalize_flow` finds which channels must have the same scale: pairs, depthwise triples, the writers and
readers of a residual stream or of a Concat. `_equalize_solve` finds the scales that give weights the best
precision for one scale per tensor, of all layers at once, to convergence. Sources: Nagel et al.,
Data-Free Quantization through Weight Equalization and Bias Correction (ICCV 2019), §4.1; Horton et al.,
Layer-Wise Data-Free CNN Compression (arXiv 2011.09058), §3.2.

A channel group is left alone, with the reason, where (the code names it a bar):
 1. it reaches an operator that no scale passes (Sigmoid, HardSwish, Softmax, BatchNormalization: fold it
    first), one without a rule, an input or output of the model, or the body of an If, Loop or Scan;
 2. it reaches a Clip to a bound that is not 0 (ReLU6). `clip="per-channel"` makes min(max(x, s low), s
    high) of it, which is exact, with one bound for each channel in a Min: one more operator, which
    onnxruntime does not fuse as it does a Clip;
 3. the weight of a writer or reader is computed, shared or of 16 bits, or a writer's bias is computed;
 4. a scaled value would leave the range of its type.

`assumption_free`: layers that meet in such a group, 3 and 4 apart, are equalized all the same, and a Mul
of one number for each channel behind the writer, and one before the reader, undo it.
`assumption_free_scales` gives such scales for all layers without changing the graph.

Arithmetic is in float64. The record follows: statistics of a tensor are multiplied by its channels' scales.
Does not handle: several scales per tensor; activations: equal weight ranges may make those of activations
less equal (`absorb-bias`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from onnxcompress.account import Change, Refusal
from onnxcompress.graph.channel_groups.groups import Flow
from onnxcompress.graph.channel_groups.tracer import trace
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.graph.query import node_label
from onnxcompress.model import Model
from onnxcompress.option_fields import option
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.equalize import apply_scales as edits
from onnxcompress.passes.equalize.scales import Balance, Side
from onnxcompress.progress import Progress, silent


@dataclass(frozen=True)
class Equalize(Pass):
    """Rescale channels between layers so that weights need fewer bits.

    The outputs stay the same but for rounding. Run fold-bn first: what a BatchNorm normalizes is left
    alone.

    \b
    Example: onnxcompress equalize folded.onnx equalized.onnx
    """

    name: ClassVar[str] = "equalize"
    preserves_function: ClassVar[bool] = True

    clip: Literal["keep", "per-channel"] = option(
        "keep",
        "Between layers with a Clip (ReLU6): change nothing, or make it Relu and Min, a bound per channel.",
    )
    assumption_free: bool = option(
        False, "Equalize the other layers, too, with Mul nodes that undo it (slower to run)."
    )

    def apply(self, model: Model, progress: Progress = silent) -> PassResult:
        """Equalize in place; what was left alone comes back as refusals.

        `measured`: `layers`; streams `equalized`; `sweeps` until the scales `converged`; `largest_scale`;
        `lost_bits` before and after: what one scale for a layer's weights costs the mean channel, in
        binary digits; `nodes_added`; `recorded`, tensors whose statistics followed.
        """
        flow = trace(model, scale_clips=self.clip == "per-channel")
        while True:
            tied, loose = self._groups(flow)
            balance = Balance(flow, tied, loose)
            before = balance.lost_bits()
            balance.solve(progress)
            balance.settle()
            scales = balance.scales(flow.count)
            values, barred = edits.new_values(model, flow, balance, scales)
            if not barred:
                break
            flow.barred |= barred
            flow.overflow |= set(barred)
        result = PassResult(refusals=_refusals(flow, balance))
        result.measured = _account(flow, balance, before)
        if values:
            nodes = _running(model)
            result.changes = _changes(flow, balance)
            edits.write_values(model, values)
            result.changes += edits.write_bounds(model, flow.bounds, scales)
            result.changes += edits.write_products(model, flow, balance)
            result.measured["recorded"] = edits.write_statistics(model, flow, scales)
            result.measured["nodes_added"] = _running(model) - nodes
        return result

    def _groups(self, flow: Flow) -> tuple[np.ndarray, np.ndarray]:
        """Masks over channel groups: those with one scale, and those where each layer gets its own."""
        met = _meeting(flow)
        free = np.ones(flow.count, bool)
        free[list(flow.barred)] = False
        loose = met & ~free
        for layer in flow.layers:
            if not layer.scalable:
                loose[layer.reads] = loose[layer.writes] = False
        loose[list(flow.overflow)] = False
        return free, loose & self.assumption_free


@dataclass(frozen=True)
class LayerScales:
    """What a layer's inputs and outputs are multiplied by: `v_out * (W' (v_in * x) + b')`, float64."""

    inputs: np.ndarray
    """(input channels,)"""
    outputs: np.ndarray
    """(output channels,)"""


def assumption_free_scales(model: Model, *, shared: bool = True) -> dict[str, LayerScales]:
    """Scales that make magnitudes of weights comparable within and between layers, whatever lies between.

    By name of the layer's output tensor; the graph stays as it is. Layers whose weight is computed or
    shared are absent. W' is `equalized_weight`, b' is b / outputs; zeros of W' are zeros of W.

    `shared`: layers that write or read the same channel (a residual stream) have one scale for it there, so
    the writers' relative sizes stay. Else each layer has its own, as Horton et al. have it. Measured with
    magnitude pruning across layers, shared scales lose less; with weights rounded to one scale per tensor,
    own ones.
    """
    flow = trace(model)
    met, none = _meeting(flow), np.zeros(flow.count, bool)
    balance = Balance(flow, met, none) if shared else Balance(flow, none, met)
    balance.solve()
    return {
        layer.name: LayerScales(np.exp(balance.reads(at)), np.exp(-balance.writes(at)))
        for at, layer in enumerate(flow.layers)
        if layer.own
    }


def equalized_weight(linear: Linear, scales: LayerScales) -> np.ndarray:
    """W' of `assumption_free_scales`: the weight as stored, in float64, with its scales taken out."""
    return edits.scaled_weight(linear, 1 / scales.outputs, scales.inputs)


def _running(model: Model) -> int:
    """Nodes that compute something at run time."""
    return sum(node.op != "Constant" for node in model.graph.nodes)


def _meeting(flow: Flow) -> np.ndarray:
    """Mask over channel groups: those that some layer writes and some layer reads."""
    met = np.zeros((2, flow.count), bool)
    for layer in flow.layers:
        met[0, layer.writes] = met[1, layer.reads] = True
    return np.asarray(met.all(0))


def _sides(stream: list[Side]) -> tuple[list[Side], list[Side]]:
    """Writers and readers."""
    return [s for s in stream if not s.reads], [s for s in stream if s.reads]


def _changes(flow: Flow, balance: Balance) -> list[Change]:
    changes = []
    for stream in balance.streams:
        writers, readers = _sides(stream)
        if any(side.shift[balance.tied[side.labels]].any() for side in stream):
            label = node_label(flow.layers[writers[0].layer].linear.node)
            count = f"{len(writers)} layer{'s' * (len(writers) > 1)}"
            changes.append(Change(label, f"{count} equalized with {len(readers)} that read the output"))
    return changes


def _refusals(flow: Flow, balance: Balance) -> list[Refusal]:
    """One for each stream with channels that neither kind of scale was found for."""
    found = []
    for stream in balance.all_streams:
        writers, readers = _sides(stream)
        if not writers:
            continue
        labels = np.unique(np.concatenate([side.unique for side in writers]))
        barred = [label for label in labels.tolist() if label in flow.barred and not balance.loose[label]]
        bar = flow.barred[barred[0]] if barred else None
        if bar is None or not (readers or flow.ended.intersection(barred)):
            continue
        some = "" if len(barred) == len(labels) else f"{len(barred)} of {len(labels)} channels "
        behind = f" with {node_label(flow.layers[readers[0].layer].linear.node)!r}" if readers else ""
        rule = f"{some}not equalized{behind}: {bar.node!r} {bar.rule}"
        found.append(Refusal(node_label(flow.layers[writers[0].layer].linear.node), rule, bar.remedy))
    return found


def _account(flow: Flow, balance: Balance, before: float) -> dict[str, Any]:
    moved = [s for s in balance.streams if any(side.shift.any() for side in s)]
    shifts = [abs(side.shift).max(initial=0.0) for side in balance.sides]
    return {
        "layers": len(flow.layers),
        "equalized": len(moved),
        "sweeps": balance.sweeps,
        "converged": balance.converged,
        "largest_scale": float(np.exp(max(shifts, default=0.0))),
        "lost_bits": {"before": before, "after": balance.lost_bits()},
        "nodes_added": 0,
        "recorded": 0,
    }
