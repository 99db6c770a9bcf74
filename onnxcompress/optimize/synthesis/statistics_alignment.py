"""Align a network with its recorded statistics on inputs that are not its training data.

On noise or procedural images the layers of a network do not see what they see on real images: means and
deviations drift from layer to layer. The aligned network brings each channel back to its record
(β, γ) in the convolutions:

    y' = a y + b,   a = |γ| / σ(y),   b = β − a μ(y)        W' = a W,   b₀' = a b₀ + b

The maps (a, b) are computed layer by layer, each on what the aligned earlier layers give it: a BatchNorm
in training mode whose scale and offset are the recorded ones. So each layer gets samples with the
statistics of its real inputs, as in Horton et al. (arXiv 2011.09058, §3.1), and with the correlations
between places and channels that the network itself makes. Student and teacher get the same maps; what a
student learned is mapped back by dividing by a.

Does not handle: recorded tensors that are no output of a convolution with bias (fold BatchNorm first).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from onnxcompress.graph.conv_layers import conv_layers
from onnxcompress.graph.edit import set_values
from onnxcompress.graph.query import read
from onnxcompress.model import Model
from onnxcompress.optimize.executor.network_walk import Batch, NetworkWalk
from onnxcompress.optimize.executor.walk_plan import Step
from onnxcompress.optimize.running_moments import RunningMoments
from onnxcompress.statistics.record import ChannelStatistics, known_statistics

MOST = 16.0
"""Largest factor of a channel: one that needs more counts as dead on these inputs."""


@dataclass
class StatisticsAlignment:
    """The maps that align the outputs of convolutions, by initializer name."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    """Name of the weight -> a, (outputs, 1, 1, 1)."""
    biases: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Name of the bias -> a and b, (outputs,)."""
    own: dict[str, np.ndarray] = field(default_factory=dict)
    """The model's own values while the maps are applied to it."""

    @property
    def names(self) -> list[str]:
        """Names of the initializers that have a map."""
        return [*self.weights, *self.biases]

    def align(self, name: str, value: Tensor) -> Tensor:
        """Map a parameter of the network to that of the aligned network.

        Args:
            name: A weight or bias that has a map.
            value: The value in the network.

        Returns:
            The value in the aligned network, of the same shape.
        """
        if name in self.weights:
            return value * self.weights[name].to(value.device)
        scale, shift = (part.to(value.device) for part in self.biases[name])
        return value * scale + shift

    def apply(self, model: Model) -> None:
        """Align the model, in place.

        Args:
            model: The network.
        """
        tensors = model.graph.tensors()
        for name in (*self.weights, *self.biases):
            self.own[name] = read(tensors[name])
            value = self.align(name, torch.from_numpy(self.own[name].astype(np.float32)))
            set_values(tensors[name], value.cpu().numpy().astype(self.own[name].dtype))
        model.touch()

    def revert(self, model: Model) -> None:
        """Restore the model's own values; layers that no longer exist are left out.

        Args:
            model: The aligned network.
        """
        tensors = model.graph.tensors()
        for name in self.own.keys() & tensors.keys():
            set_values(tensors[name], self.own[name])
        model.touch()

    def restored(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map fitted parameters of the aligned network back to parameters of the network.

        Args:
            values: Initializer -> value in the aligned network.

        Returns:
            Initializer -> value in the network; those without a map stay the same.
        """
        found = dict(values)
        for name in self.weights.keys() & found.keys():
            found[name] = found[name] / self.weights[name].to(found[name])
        for name in self.biases.keys() & found.keys():
            scale, shift = (part.to(found[name]) for part in self.biases[name])
            found[name] = (found[name] - shift) / scale
        return found


def standardize(
    model: Model,
    values: Tensor,
    last: str,
    *,
    batch: int = 32,
    statistics: Mapping[str, ChannelStatistics] | None = None,
    device: str = "cpu",
) -> StatisticsAlignment:
    """Compute the maps that give the network the recorded statistics on given inputs.

    Args:
        model: The network, with one input.
        values: The inputs, (N, …).
        last: The tensor of the trunk at which to end.
        batch: Inputs that run at once.
        statistics: Statistics by tensor; None: what the file knows.
        device: Where torch computes.

    Returns:
        The maps.
    """
    known = known_statistics(model) if statistics is None else statistics
    walk = _Aligner(model, stop=last, batch=batch, device=device, statistics=known)
    walk.pass_through(values, "aligning layers")
    return walk.alignment


@dataclass
class _Aligner(NetworkWalk):
    """Maps the outputs of recorded convolutions, one after the other, in both networks alike."""

    networks: ClassVar[int] = 1
    statistics: Mapping[str, ChannelStatistics] = field(default_factory=dict)
    alignment: StatisticsAlignment = field(default_factory=StatisticsAlignment)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.own = self.maps
        self._layers = conv_layers(self.model, [step.node for step in self.steps])

    def visit(self, step: Step) -> None:
        """Run a node, and map its outputs to its recorded statistics, if it has any.

        Args:
            step: The node.
        """
        layer = self._layers.get(step.outputs[0])
        if layer is None or layer.bias_name is None or layer.output_name not in self.statistics:
            super().visit(step)
            return
        self.each(lambda batch: self.run_teacher(step, batch))
        name = layer.output_name
        moments = RunningMoments()
        for own in self.each(lambda batch: RunningMoments.of(batch.teacher[name], name)):
            moments.merge(own)
        scale, shift = (part.to(self.device) for part in _map(moments, self.statistics[name]))
        self.alignment.weights[layer.weight_name] = scale.reshape(-1, 1, 1, 1)
        self.alignment.biases[layer.bias_name] = scale, shift
        for name in (layer.weight_name, layer.bias_name):
            self.maps[name] = self.alignment.align(name, self.executor.parameters[name])
        self.each(lambda batch: self._align(step, batch, scale, shift))

    def _align(self, step: Step, batch: Batch, scale: Tensor, shift: Tensor) -> None:
        y = batch.teacher[step.outputs[0]]
        shape = (1, -1, *[1] * (y.ndim - 2))
        batch.teacher[step.outputs[0]] = y.mul_(scale.reshape(shape)).add_(shift.reshape(shape))
        self.run_student(step, batch, alike=True)
        self.finish(step, batch)


def _map(moments: RunningMoments, wanted: ChannelStatistics) -> tuple[Tensor, Tensor]:
    """Return a and b of each channel that give values of these moments the wanted statistics, float32."""
    mean = torch.from_numpy(np.asarray(moments.mean))
    deviation = torch.from_numpy(np.sqrt(np.asarray(moments.squares) / moments.count))
    target = torch.from_numpy(wanted.std.copy()).to(deviation)
    scale = torch.where(deviation > 0, target / deviation.clamp_min(1e-30), 1.0)
    scale = torch.where((scale < MOST) & (scale > 1 / MOST), scale, 1.0)
    shift = torch.from_numpy(wanted.mean.copy()).to(mean) - scale * mean
    return scale.float(), shift.float()
