"""Align a network with its recorded statistics on inputs that are not its training data.

On noise or procedural images the layers of a network do not see what they see on real images: means and
deviations drift from layer to layer. A twin of the network brings each channel back to its record (β, γ) in
the convolutions:

    y' = a y + b,   a = |γ| / σ(y),   b = β − a μ(y)        W' = a W,   b₀' = a b₀ + b

The maps (a, b) are computed layer by layer, each on what the twin's earlier layers give it: a BatchNorm in
training mode whose scale and offset are the recorded ones. So each layer gets samples with the statistics
of its real inputs, as in Horton et al. (arXiv 2011.09058, §3.1), and with the correlations between places
and channels that the network itself makes. Student and teacher get the same maps; what a student learned is
mapped back by dividing by a.

Does not handle: recorded tensors that are no output of a convolution with bias (fold BatchNorm first).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from onnxcompress.graph.conv_layers import conv_layers
from onnxcompress.graph.edit import set_values
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.graph.query import read
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.open_batch import split_images
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

    def align(self, name: str, value: Tensor) -> Tensor:
        """Map a parameter of the network to that of its twin.

        Args:
            name: A weight or bias that has a map.
            value: The value in the network.

        Returns:
            The value in the twin, of the same shape.
        """
        if name in self.weights:
            return value * self.weights[name].to(value.device)
        scale, shift = (part.to(value.device) for part in self.biases[name])
        return value * scale + shift

    def apply(self, model: Model) -> None:
        """Turn the model into its twin, in place.

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
            model: The twin.
        """
        tensors = model.graph.tensors()
        for name in self.own.keys() & tensors.keys():
            set_values(tensors[name], self.own[name])
        model.touch()

    def restored(self, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map parameters that a twin learned back to parameters of the network.

        Args:
            learned: Initializer -> value in the twin.

        Returns:
            Initializer -> value in the network; those without a map stay the same.
        """
        found = dict(learned)
        for name in self.weights.keys() & found.keys():
            found[name] = found[name] / self.weights[name].to(found[name])
        for name in self.biases.keys() & found.keys():
            scale, shift = (part.to(found[name]) for part in self.biases[name])
            found[name] = (found[name] - shift) / scale
        return found


def standardize(
    model: Model,
    executor: Executor,
    values: Tensor,
    last: str,
    *,
    batch: int = 32,
    statistics: Mapping[str, ChannelStatistics] | None = None,
) -> StatisticsAlignment:
    """Compute the maps that give the network the recorded statistics on given inputs.

    Args:
        model: The network, with one input.
        executor: The executor of the model.
        values: The inputs, (N, …).
        last: The tensor of the trunk at which to end.
        batch: Inputs that run at once.
        statistics: Statistics by tensor; None: what the file knows.

    Returns:
        The maps.
    """
    known = known_statistics(model) if statistics is None else statistics
    twin = StatisticsAlignment()
    now: dict[str, Tensor] = {}
    topology = Topology(model)
    layers = conv_layers(model)
    count = len(values)
    with torch.no_grad():
        for start, end in pairwise(topology.trunk()):
            for node in topology.between(start, end):
                layer = layers.get(node.outputs[0].name)
                if layer is None or layer.bias_name is None or layer.output_name not in known:
                    continue
                out = _run(executor, start.name, layer.output_name, split_images(values, count, batch), now)
                _map(twin, layer, out, known[layer.output_name])
                for name in (layer.weight_name, layer.bias_name):
                    now[name] = twin.align(name, executor.parameters[name])
            if end.name == last:
                break
            values = _run(executor, start.name, end.name, split_images(values, count, batch), now)
    return twin


def _run(
    executor: Executor, start: str, end: str, batches: Sequence[Tensor], now: Mapping[str, Tensor]
) -> Tensor:
    return torch.cat([executor.run({start: part}, [end], now)[end] for part in batches])


def _map(twin: StatisticsAlignment, layer: Linear, out: Tensor, wanted: ChannelStatistics) -> None:
    """Add the map that gives `out` (N, C, …) the wanted statistics."""
    axes = [axis for axis in range(out.ndim) if axis != 1]
    variance, mean = torch.var_mean(out.double(), axes, correction=0)
    deviation = variance.sqrt()
    target = torch.from_numpy(wanted.std.copy()).to(deviation)
    scale = torch.where(deviation > 0, target / deviation.clamp_min(1e-30), 1.0)
    scale = torch.where((scale < MOST) & (scale > 1 / MOST), scale, 1.0)
    shift = torch.from_numpy(wanted.mean.copy()).to(mean) - scale * mean
    assert layer.bias_name is not None
    twin.weights[layer.weight_name] = scale.float().reshape(-1, 1, 1, 1)
    twin.biases[layer.bias_name] = scale.float(), shift.float()
