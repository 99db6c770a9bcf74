"""What the loss of channels costs at the outputs, measured with the layers that read them refitted.

The closed form of `worth` takes errors at different places of a map for unrelated. In front of a global
pool they are not: what a channel says of the whole image is missed at every place alike, and the mean over
all places does not take it off. So the costs of a group are scaled to errors of the outputs that are
measured, on inputs kept aside, at some of its widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from onnxcompress.model import Model
from onnxcompress.optimize.channel_drop.worth import Reader, Removal, output_weights
from onnxcompress.optimize.executor import Executor


@dataclass(frozen=True)
class OutputErrors:
    """Errors of the outputs without channels, on inputs kept aside."""

    executor: Executor
    """The whole network."""
    readers: Sequence[Reader]
    batches: Sequence[Tensor]
    source: str
    """Name of the input."""
    wanted: Sequence[dict[str, Tensor]]
    """For each batch, name -> value of the tensors whose errors count."""
    weights: dict[str, Tensor]
    """Name -> what an error of each is multiplied by."""

    @staticmethod
    def of(
        model: Model,
        readers: Sequence[Reader],
        images: Tensor,
        source: str,
        features: Sequence[str],
        *,
        batch: int,
        device: str = "cpu",
    ) -> OutputErrors:
        """Run the whole network.

        Args:
            model: The whole network.
            readers: The layers that read channels, from `measure_readers`.
            images: Inputs as the network takes them, (N, …).
            source: Name of the input.
            features: Names of the tensors whose errors count, each as much as the others.
            batch: Images that run at once.
            device: Where torch computes.

        Returns:
            What measures errors.
        """
        executor = Executor.from_model(model, device=device)
        batches = [part.to(device) for part in torch.split(images, batch)]
        with torch.no_grad():
            wanted = [executor.run({source: x}, features) for x in batches]
        weights = {
            name: output_weights(values.float(), any(t.name == name for t in model.graph.outputs))
            for name, values in wanted[0].items()
        }
        return OutputErrors(executor, readers, batches, source, wanted, weights)

    def without(self, gone: np.ndarray) -> float:
        """Measure the error that is left when channels are lost and the layers that read them refitted.

        Args:
            gone: Labels of the channels.

        Returns:
            The squared error of the outputs relative to their squares.
        """
        weights = _refitted(self.readers, gone, self.executor)
        error, energy = 0.0, 0.0
        for x, wanted in zip(self.batches, self.wanted, strict=True):
            with torch.no_grad():
                found = self.executor.run({self.source: x}, list(wanted), weights)
            for name, values in wanted.items():
                own = self.weights[name]
                energy += float((values.float() * own).double().square().sum())
                error += float(((found[name].float() - values.float()) * own).double().square().sum())
        return error / max(energy, 1e-30)

    def rescale(self, removal: Removal, lost: Iterable[int]) -> Removal:
        """Scale the costs of a group to errors that are measured.

        Args:
            removal: The order in which the channels of a group go.
            lost: Numbers of lost channels at which the error is measured.

        Returns:
            The same order. Between the numbers the scale changes evenly; costs never fall.
        """
        places = sorted(n for n in set(lost) if removal.costs[n] > 0)
        if not places:
            return removal
        scales = [self.without(removal.labels[:n]) / removal.costs[n] for n in places]
        costs = removal.costs * np.interp(np.arange(len(removal.costs)), places, scales)
        return replace(removal, costs=np.maximum.accumulate(costs))


def _refitted(readers: Sequence[Reader], gone: np.ndarray, executor: Executor) -> dict[str, Tensor]:
    """Compute weights and biases of the layers that lose columns, the other columns refitted.

    Args:
        readers: The layers that read channels.
        gone: Labels of the channels.
        executor: The network, which has the biases.

    Returns:
        Initializer -> value of its own shape, with zeros where columns are lost.
    """
    weights, offsets = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for reader in readers:
        columns = np.flatnonzero(np.isin(reader.labels, gone))
        if not len(columns):
            continue
        linear = reader.linear
        weight = weights.setdefault(linear.weight_name, linear.weight.astype(np.float64))
        own = linear.view(weight)[reader.group]  # (O, I, taps)
        apart = own.shape[1] == len(reader.labels)  # each tap is looked at by itself
        rows = (own.swapaxes(1, 2) if apart else own).reshape(-1, len(reader.labels))
        block = reader.inverse[columns]
        new = rows - rows[:, columns] @ np.linalg.solve(block[:, columns], block)
        new[:, columns] = 0
        missing = ((rows - new) @ reader.mean).reshape(len(own), -1).sum(1)  # before `own`, seen by `rows`
        shape = own.shape
        own[...] = new.reshape(shape[0], shape[2], shape[1]).swapaxes(1, 2) if apart else new.reshape(shape)
        if linear.bias_name is not None:
            change = offsets.setdefault(linear.bias_name, np.zeros(linear.outputs))
            change.reshape(linear.groups, -1)[reader.group] += missing
    values = {name: torch.from_numpy(weight).float() for name, weight in weights.items()}
    for name, change in offsets.items():
        old = executor.parameters[name]
        values[name] = old + torch.from_numpy(change).to(old)
    return values
