"""High-bias absorption: move the part of a bias that the activation never cuts off into the next layers.

Let layer 2 feed layer 1 through Relu, and let the record say that channel c of z = W₂ x + b₂ has mean β and
deviation γ. Where z is (nearly) never below c = max(0, β − nγ), relu(z) = relu(z − c) + c, so

    b₂ −= c        b₁ += W₁ c (summed over the taps of the kernel)        record: mean −= c

leaves the function (nearly) what it was, and the activation's range [0, β + nγ] becomes [0, 2 nγ] or less.
After equalization some channels have biases many times their deviation, and the one scale of the tensor has
to cover them. Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction
(ICCV 2019), §4.1.3, where n = 3. What may lie between the layers:

    no activation       (nothing, pools, …) exact, and c = min(0, β + nγ) serves negative channels, too
    Relu and its kin    (LeakyRelu, PRelu, Max with 0) exact above c: for 99.9 % of a Gaussian with n = 3
    Clip to [0, h]      (or Min with h) channels with β + nγ > h stay as they are

Legality; every other bias stays, with the reason:
 1. every path from z ends in a linear layer with a constant bias (a MatMul gets an Add); no tensor in
    between is a graph output or read in the body of an If, Loop or Scan; adding a constant to the input of
    an operator on the path adds the same constant to its output;
 2. no layer pads its input with zeros: the zeros would have to become −c, and ONNX cannot pad with one
    number per channel. `approximate` counts all taps at the border, too, as the paper does: exact inside
    the image, wrong where the kernel reaches over the border;
 3. all taps of a ConvTranspose reach every output (1×1, stride 1): otherwise the sum depends on the
    position;
 4. z is the output of Conv, ConvTranspose or Gemm, or of an Add of one number for each channel;
 5. the new values are finite in the layer's type.
Does not handle: sums of two tensors (the residual stream): what is taken from one writer reaches all later
readers through all later activations; BatchNormalization: fold it first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np

from onnxcompress.account import Change, Figures, Refusal
from onnxcompress.errors import OptionError
from onnxcompress.graph import layer_params
from onnxcompress.graph.channel_groups.groups import ChannelGroups
from onnxcompress.graph.channel_groups.tracer import find_channel_groups
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.edit import set_constant
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.graph.query import node_label, per_channel
from onnxcompress.model import Model
from onnxcompress.option_fields import option
from onnxcompress.passes.absorb_bias.paths import Path, follow
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.fold_bn import into_following
from onnxcompress.progress import Progress, silent
from onnxcompress.statistics.record import ChannelStatistics, read_record, write_record

NEGLIGIBLE = 1e-3
"""Share of a mean too small to be worth moving; what rounding leaves after a first run is far below."""


@dataclass(frozen=True)
class AbsorbBiasFigures(Figures):
    """The figures of `absorb-bias`."""

    layers: int
    """Number of layers whose bias was moved."""
    channels: int
    """Number of their channels whose bias was moved."""
    largest: float
    """Largest amount that was moved, in units of the layer's output."""
    approximated: int
    """Number of the layers for which the move is inexact at the border."""


@dataclass(frozen=True)
class AbsorbBias(Pass):
    """Move high biases into the next layers, so that activations need a smaller range.

    For files that another tool will quantize. Needs statistics: of BatchNorms that fold-bn recorded,
    or from calibrate. Best after equalize.

    \b
    Example:
      onnxcompress absorb-bias equalized.onnx absorbed.onnx
    """

    name: ClassVar[str] = "absorb-bias"
    figures: ClassVar[type[Figures]] = AbsorbBiasFigures

    deviations: float = option(
        3.0,
        "How far below its mean a channel may reach, in standard deviations; fewer move more and are "
        "less exact.",
    )
    approximate: bool = option(
        False, "Also move biases into layers that pad with zeros; inexact at the border."
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

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[AbsorbBiasFigures]:
        """Absorb high biases in place; layers whose high bias has to stay come back as refusals.

        Args:
            model: The model to change; it needs recorded statistics.
            progress: Called with the stage, the tensors done and the tensors in all.

        Returns:
            The changes, the layers that stay with the reasons, and the figures.

        Raises:
            OptionError: `deviations` is negative or not finite.
        """
        if not 0 <= self.deviations < np.inf:
            raise OptionError(f"--deviations {self.deviations}: expected 0 or more")
        record, groups = read_record(model), find_channel_groups(model)
        tensors = [t for node in model.graph.nodes for t in node.outputs if t.name in record]
        work = _Absorption(model, groups, record)
        for at, tensor in enumerate(tensors):
            progress("absorbing", at + 1, len(tensors))
            known = record[tensor.name]
            path = follow(model, groups, tensor, self.approximate)
            if isinstance(path, Refusal):
                if self.shift(known).any():
                    work.refusals.append(path)
            elif path is not None and len(path.labels) == len(known.mean):
                self._give(path, work)
        if work.changes:
            write_record(model, record)
        return PassResult(work.changes, work.refusals, work.figures())

    def shift(self, known: ChannelStatistics, path: Path | None = None) -> np.ndarray:
        """Compute how much of each channel's bias can be moved (Nagel et al., §4.1.3).

        Args:
            known: Statistics of the layer's output.
            path: The path to the layers that would take it; None: assume that it goes through a Relu.

        Returns:
            The amount for each channel, (channels,), float64; 0 where the bias stays.
        """
        mean, reach = known.mean.astype(np.float64), self.deviations * known.std.astype(np.float64)
        found = np.maximum(0.0, mean - reach)
        if path is not None and not path.rectified:
            found += np.minimum(0.0, mean + reach)
        if path is not None:
            found[mean + reach - np.minimum(found, 0.0) > path.ceiling] = 0.0
        found[np.abs(found) <= NEGLIGIBLE * np.abs(mean)] = 0.0
        return found

    def _give(self, path: Path, work: _Absorption) -> None:
        """Move the biases along one path, if there are any to move."""
        record, groups = work.record, work.groups
        known = record[path.tensor.name]
        shift = self.shift(known, path)
        if not shift.any() or not path.readers:
            return
        label = node_label(path.writer)
        edits = _edits(work.model, path, shift)
        if edits is None:  # rule 5
            rule = "its high bias stays: a bias would leave the range of its type"
            work.refusals.append(Refusal(label, rule, "convert the model to a wider type"))
            return
        for edit in edits:
            edit()
        for name in path.between:
            if name in record and name in groups.tensors:
                _follow(record, name, groups, path, shift)
        count = f"{len(path.readers)} layer{'s' * (len(path.readers) > 1)}"
        work.changes.append(Change(label, f"high biases given to {count}"))
        work.moved.append(shift)
        work.approximated += path.padded or any(reader.pads for reader in path.readers)


@dataclass
class _Absorption:
    """The state of one application of the pass."""

    model: Model
    groups: ChannelGroups
    record: dict[str, ChannelStatistics]
    changes: list[Change] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    moved: list[np.ndarray] = field(default_factory=list)
    """What each layer's bias lost, (channels,) each."""
    approximated: int = 0

    def figures(self) -> AbsorbBiasFigures:
        """Sum up what was moved so far.

        Returns:
            The figures of the pass.
        """
        channels = sum(int(np.count_nonzero(shift)) for shift in self.moved)
        largest = max((float(np.abs(shift).max()) for shift in self.moved), default=0.0)
        return AbsorbBiasFigures(len(self.moved), channels, largest, self.approximated)


def _edits(model: Model, path: Path, shift: np.ndarray) -> list[Callable[[], object]] | None:
    """List the edits of the writer and its readers, or None where a value would not be finite."""
    found: list[Callable[[], object]] = []
    if path.linear is not None:
        found.append(_moved(model, path.linear, -shift))
    else:
        node, at = path.writer, path.constant_at
        constant = constant_value(model, node.inputs[at])
        assert constant is not None
        number = per_channel(constant, path.rank, len(shift))
        assert number is not None
        with np.errstate(over="ignore"):
            new = (number - shift).reshape(-1, *[1] * (path.rank - 2)).astype(constant.dtype)
        if not np.isfinite(new).all():
            return None
        found.append(partial(set_constant, model, node, at, new, f"{node.inputs[at].name}_absorbed"))
    for reader in path.readers:
        gets = reader.layer.linear.response(path.along(reader.layer.reads, shift))
        found.append(_moved(model, reader.layer.linear, gets))
    return None if any(edit is _impossible for edit in found) else found


def _moved(model: Model, layer: Linear, by: np.ndarray) -> Callable[[], object]:
    """Return the edit that adds one number per channel to a layer's output."""
    if not layer.takes_bias:
        finite = np.isfinite(layer_params.stored(by, layer)).all()
        return partial(into_following.add_behind, model, layer, by) if finite else _impossible
    bias = layer_params.bias(model, layer)
    assert bias is not None
    offset = layer_params.stored(bias + layer.spread(by), layer)
    return (
        partial(layer_params.set_bias, model, layer, offset) if np.isfinite(offset).all() else _impossible
    )


def _impossible() -> None:
    raise AssertionError


def _follow(
    record: dict[str, ChannelStatistics], name: str, groups: ChannelGroups, path: Path, shift: np.ndarray
) -> None:
    """Shift the recorded mean of a tensor on the path."""
    known, labels = record[name], groups.tensors[name]
    if labels.ndim > 1 and labels.shape[1] == labels.size == len(known.mean):
        record[name] = known.shifted(-path.along(labels.reshape(-1), shift))
