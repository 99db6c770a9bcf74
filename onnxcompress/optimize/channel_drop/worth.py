"""What a channel is worth: the error that its loss leaves after the layers that read it are refitted.

Let a reader have weights W and its input patches the centred second moments H = E[(x − x̄)(x − x̄)ᵀ] + λ I.
Taking the columns c of a channel away, with the others refitted to the least squares, costs

    tr(W_c [(H⁻¹)_cc]⁻¹ W_cᵀ)        W −= W_c [(H⁻¹)_cc]⁻¹ (H⁻¹)_c:    H⁻¹ −= (H⁻¹)_:c [(H⁻¹)_cc]⁻¹ (H⁻¹)_c:

the structured form of Optimal Brain Surgeon (Hassibi & Stork, 1993; Meng et al., OSSCAR, 2024). With the
updates the costs of channels that go one after the other add up to the cost of all of them. Biases take up
the means. A group's cost is the sum over the layers that read it. Errors of different layers are compared
by what they do to the outputs f: with random v, E_v[(∂ vᵀf/∂y · δ)²] = ‖∂f/∂y · δ‖², so that the mean
squares of gradients say what an error of each output costs, those at different places taken as unrelated.
Each channel of an output is measured by its own size.

A layer with more than MAX_FAN_IN columns, and one whose patches are not cut, is looked at as if it saw each
tap of its kernel apart: with the second moments of its input's channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxcompress.graph.channel_groups.cut_tracer import CutGroups
from onnxcompress.graph.channel_groups.groups import ChannelGroup, LabelledLayer, Labels
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.model import Model
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction.patches import patches_of
from onnxcompress.optimize.reconstruction.ridge import LayerMoments, least_squares
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.qdq_plan import QuantizedLayer

MAX_FAN_IN = 1152
"""Columns of a layer's matrix up to which taps are told apart: the work grows with their cube."""
PLACES = 64
"""Places at which an image gives a patch, at most."""
ROUNDS = 64
"""Times that the channels of a group are priced anew, at most."""


@dataclass(frozen=True)
class Reader:
    """A group of a layer that reads channels."""

    labels: Labels
    """Labels of the columns, (F,)."""
    weight: np.ndarray
    """(O, F), rows times the square root of what an error costs there."""
    inverse: np.ndarray
    """H⁻¹, (F, F)."""
    mean: np.ndarray
    """Mean of the columns, (F,)."""
    linear: Linear
    group: int
    """Which group of the layer it is."""


class _Measured:
    """What is summed up of a layer while images go through."""

    def __init__(self, model: Model, layer: LabelledLayer, tensors: Mapping[str, Labels]) -> None:
        linear = layer.linear
        self.layer = layer
        self.axes = [_channel_axis(tensors[name]) for name in (linear.input_name, linear.output_name)]
        view = linear.view(linear.weight)
        self.patches = patches_of(model, QuantizedLayer(linear, 8, None))
        if self.patches is None or view[0, 0].size > MAX_FAN_IN:
            self.patches = None
        fan = view.shape[2] * (1 if self.patches is None else view.shape[3])
        self.moments = LayerMoments.empty(torch.zeros(len(view), 1, fan))
        self.slopes = torch.zeros(linear.outputs, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor, slope: Tensor | None, generator: torch.Generator) -> None:
        """Add a batch: the layer's input, its output, and the gradient with respect to the output."""
        if slope is not None:
            others = [axis for axis in range(slope.ndim) if axis != self.axes[1]]
            self.slopes += slope.double().square().sum(others).cpu()
        if self.patches is not None:
            places = self.patches.places(y, generator, PLACES)
            columns, _ = self.patches.take(x, y, places)
        else:
            flat = x.movedim(self.axes[0], 1).flatten(2) if x.ndim > 2 else x[..., None]
            places = torch.randperm(flat.shape[2], generator=generator)[:PLACES].to(flat.device)
            columns = flat.index_select(2, places).movedim(1, 0).flatten(1)
            columns = columns.reshape(self.layer.linear.groups, -1, columns.shape[1])
        columns = columns.float().cpu()
        self.moments.add(columns, columns.new_zeros(len(columns), 1, columns.shape[2]))

    def readers(self, energy: float, ridge: float) -> list[Reader]:
        """Finish: one reader for each group of the layer."""
        linear = self.layer.linear
        self.moments.check_finite(linear.label)
        weight = linear.view(linear.weight).astype(np.float64)  # (G, O, I, taps)
        cost = np.sqrt(self.slopes.numpy() / energy).reshape(len(weight), -1, 1, 1)
        weight = weight * cost
        labels = self.layer.reads.reshape(len(weight), -1)
        if self.patches is None:
            weight = weight.swapaxes(2, 3).reshape(len(weight), -1, weight.shape[2])
        else:
            labels = labels.repeat(weight.shape[3], 1)
            weight = weight.reshape(*weight.shape[:2], -1)
        empty = torch.zeros(len(weight), 1, weight.shape[2])
        _, second = least_squares(empty, self.moments, ridge=ridge, target=float("inf"))
        inverse = np.linalg.inv(second.numpy())
        parts = zip(labels, weight, inverse, self.moments.mean.numpy(), strict=True)
        return [Reader(*part, linear, group) for group, part in enumerate(parts)]


def _channel_axis(labels: Labels) -> int:
    return next((axis for axis, size in enumerate(labels.shape) if size > 1), 1)


def measure_readers(
    model: Model,
    groups: CutGroups,
    images: Tensor,
    source: str,
    features: Sequence[str],
    *,
    ridge: float,
    batch: int,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[Reader]:
    """Measure the layers that read channels that can be cut, and what their errors cost.

    Args:
        model: The whole network.
        groups: Its channels.
        images: Inputs as the network takes them, (N, …).
        source: Name of the input.
        features: Names of the tensors whose errors count, each as much as the others.
        ridge: λ of H, as a share of its mean diagonal.
        batch: Images that run at once.
        seed: Random seed of the places and of v.
        device: Where torch computes.
        progress: Called with the stage, the images done and the images in all.

    Returns:
        The readers.
    """
    channels = groups.channels
    free = np.concatenate([group.group.labels for group in groups.free])
    layers = [_Measured(model, x, channels.tensors) for x in channels.layers if _reads_some(x, free)]
    if not layers:
        return []
    executor = Executor.from_model(model, device=device)
    inputs, outputs = (
        [getattr(m.layer.linear, at) for m in layers] for at in ("input_name", "output_name")
    )
    parameters = None
    if not images.is_floating_point():  # then slopes begin at the weights
        parameters = {n: p.clone().requires_grad_() for n, p in executor.parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    energy, weights = 0.0, dict[str, Tensor]()
    for start in range(0, len(images), batch):
        x = images[start : start + batch].to(device).clone()
        if x.is_floating_point():
            x.requires_grad_()
        made = executor.run({source: x}, list(dict.fromkeys([*inputs, *outputs, *features])), parameters)
        projected = torch.zeros((), device=device)
        for name in features:
            wanted = made[name].float()  # sums of squares overflow in half precision
            if name not in weights:
                weights[name] = output_weights(
                    wanted.detach(), any(t.name == name for t in model.graph.outputs)
                )
            energy += float((wanted.detach() * weights[name]).double().square().sum())
            signs = weights[name] * torch.randn(wanted.shape, generator=generator).to(device)
            projected = projected + (wanted * signs).sum()
        slopes = torch.autograd.grad(projected, [made[n] for n in outputs], allow_unused=True)
        with torch.no_grad():
            for m, name, output, slope in zip(layers, inputs, outputs, slopes, strict=True):
                m.add(made.get(name, x).detach(), made[output].detach(), slope, generator)
        progress("measuring channels", min(start + batch, len(images)), len(images))
    return [reader for m in layers for reader in m.readers(max(energy, 1e-30), ridge)]


def output_weights(features: Tensor, answers: bool) -> Tensor:
    """Weigh a tensor so that its energy is 1 for an image; in an answer each of its channels counts alike.

    In a detector's output scores lie beside boxes that are a thousand times as large.

    Args:
        features: Values of the tensor, (N, …).
        answers: Whether it is an output of the network.

    Returns:
        What its values are multiplied by; it broadcasts. 0 for a tensor that is 0 for all images.
    """
    weights = features.new_ones(())
    if answers and features.ndim > 1:
        others = [axis for axis in range(features.ndim) if axis != 1]
        sizes = features.square().mean(others, keepdim=True).sqrt()
        weights = 1 / sizes.clamp_min(1e-6 * float(sizes.max()) + 1e-30)
    energy = float((features * weights).square().sum()) / len(features)
    return torch.as_tensor(weights / energy**0.5 if energy > 0 else torch.zeros_like(weights))


def _reads_some(layer: LabelledLayer, free: Labels) -> bool:
    """Return whether a layer reads channels that can be cut, and still computes its outputs without them.

    A depthwise one does not: it goes with the channel.
    """
    goes = layer.linear.groups > 1 and np.isin(layer.reads, layer.writes).any()
    return bool(np.isin(layer.reads, free).any()) and not goes


@dataclass(frozen=True)
class Removal:
    """The channels of a group in the order in which they go, the least worth first."""

    labels: np.ndarray
    """(channels,)"""
    costs: np.ndarray
    """Cost of losing the first n of them, (channels,); n = 0 costs 0."""


def is_unread(group: ChannelGroup) -> bool:
    """Return whether nothing depends on the channels of a group: no layer reads them but with weights of 0.

    Args:
        group: The group; a grouped layer whose inputs and outputs belong to it only passes them on.

    Returns:
        True where they cost nothing. Others without a cost are those of which no gradient tells.
    """
    for member in group.members:
        linear = member.layer.linear
        if member.side == "inputs" and linear.groups == 1:
            columns = linear.view(linear.weight)[0][:, member.channels.reshape(-1)]
            if columns.any():
                return False
    return True


class _Part:
    """The columns of a reader that belong to a group, as channels are taken away."""

    def __init__(self, reader: Reader, labels: Labels) -> None:
        order = np.argsort(reader.labels, kind="stable")
        found = np.searchsorted(reader.labels, labels, sorter=order)
        copies = int((reader.labels == labels[0]).sum())
        columns = order[found[:, None] + np.arange(copies)]  # of each channel, (channels, copies)
        self.columns = np.arange(columns.size).reshape(columns.shape)
        self.weight = reader.weight[:, columns.reshape(-1)]
        self.inverse = reader.inverse[np.ix_(columns.reshape(-1), columns.reshape(-1))]

    def prices(self, channels: np.ndarray) -> np.ndarray:
        """Compute what each channel costs by itself, (channels,)."""
        at = self.columns[channels]
        blocks = self.inverse[at[:, :, None], at[:, None, :]]
        rows = self.weight[:, at].transpose(1, 2, 0)
        return np.asarray((rows * np.linalg.solve(blocks, rows)).sum(axis=(1, 2)))

    def remove(self, channel: int) -> float:
        """Take a channel away, refit the others, and return what that costs."""
        at = self.columns[channel]
        spread = np.linalg.solve(self.inverse[np.ix_(at, at)], self.inverse[at])
        own = self.weight[:, at]
        cost = float((own @ np.linalg.solve(self.inverse[np.ix_(at, at)], own.T)).trace())
        self.weight = self.weight - own @ spread
        self.inverse = self.inverse - self.inverse[:, at] @ spread
        return max(cost, 0.0)


def removal_by_refit(group: ChannelGroup, readers: Sequence[Reader]) -> Removal:
    """Order the channels of a group by the error that their loss leaves.

    Args:
        group: The group.
        readers: All readers of the network.

    Returns:
        The order, with relative squared errors of the features as costs.
    """
    parts = [_Part(r, group.labels) for r in readers if np.isin(group.labels[0], r.labels)]
    left, order, costs = np.arange(len(group.labels)), [], [0.0]
    several = -(-len(left) // ROUNDS)
    while len(left) > 1:
        prices = sum((part.prices(left) for part in parts), np.zeros(len(left)))
        for channel in left[np.argsort(prices, kind="stable")[: min(several, len(left) - 1)]].tolist():
            costs.append(costs[-1] + sum(part.remove(channel) for part in parts))
            order.append(channel)
        left = np.setdiff1d(left, order)
    return Removal(group.labels[[*order, *left]], np.array(costs))


def removal_by_norm(group: ChannelGroup, *, readers: bool) -> Removal:
    """Order the channels of a group by the squared norm of their weights, relative to its mean.

    With the readers this is the group norm of Torch-Pruning (Fang et al., DepGraph, CVPR 2023), on weights
    that BatchNorm is folded into; without them the magnitude of filters (Li et al., ICLR 2017).

    Args:
        group: The group.
        readers: Whether weights of the layers that read a channel count, or only those that compute it.

    Returns:
        The order, with the sums of relative norms as costs.
    """
    norms = np.zeros(len(group.labels))
    for member in (m for m in group.members if readers or m.side == "outputs"):
        linear = member.layer.linear
        view = np.square(linear.view(linear.weight).astype(np.float64))
        axes = (2, 3) if member.side == "outputs" else (1, 3)
        norms += view.sum(axis=axes).reshape(-1)[member.channels].sum(axis=1)
    order = np.argsort(norms, kind="stable")
    shares = norms[order] / max(norms.mean(), 1e-30)
    return Removal(group.labels[order], np.concatenate([[0.0], np.cumsum(shares)[:-1]]))
