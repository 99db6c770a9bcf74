"""The repair of a network that lost channels: layers refitted in closed form, then all fine-tuned.

As for a network that lost blocks (`block_drop.repair`), but every layer behind a cut is fitted to those of
the whole network's outputs that are left, and the features are compared in the channels that are left. The
layers behind the features are refitted once more when these have been fine-tuned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnxcompress.graph.channel_removal import Kept
from onnxcompress.graph.edit import unique_name
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop.repair import MAX_BATCH, REFIT_IMAGES, Repair
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.open_batch import small_batch
from onnxcompress.optimize.executor.walk_plan import Step
from onnxcompress.optimize.reconstruction.finetune import Finetuned
from onnxcompress.optimize.reconstruction.held_out import HeldOut
from onnxcompress.optimize.reconstruction.patches import patches_of
from onnxcompress.optimize.reconstruction.residual_refit import MAX_FAN_IN, RefitSettings, ResidualRefit
from onnxcompress.optimize.reconstruction.ridge import TARGET_MADE, TARGET_REAL
from onnxcompress.quantization.qdq_plan import Bits, Plan, QuantizedLayer, make_plan

FLOATS = ("float16", "float32", "float64")
"""Types of weights that are refitted."""


@dataclass
class ChannelRefit(ResidualRefit):
    """Refits a student to the teacher that it lacks channels of; both use the same names of tensors."""

    kept: Mapping[str, Kept] = field(default_factory=dict)
    """What the student has of the teacher's tensors, where it lacks channels."""

    def is_fitted(self, step: Step) -> bool:
        """Return whether the node is a layer behind the first cut.

        Args:
            step: The node.

        Returns:
            Whether what it reads differs from what the teacher's reads.
        """
        if id(step.own) not in self.plan.layers:  # what other nodes of the teacher read may be gone
            return False
        there = self.batches[0]
        return any(there.student[name] is not there.teacher[name] for name in step.reads)

    def alters(self, node: gs.Node) -> bool:
        """Return whether a node computes something else than the teacher's although it reads the same.

        Args:
            node: The student's node.

        Returns:
            Whether its output lost channels.
        """
        return any(tensor.name in self.kept for tensor in node.outputs)

    def teacher_value(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """Return the channels of a tensor of the teacher that the student has.

        Args:
            name: Name of the tensor.
            values: The teacher's tensors.

        Returns:
            The values, of the shape of the student's tensor.
        """
        stays = self.kept.get(name)
        if stays is None:
            return values[name]
        return values[name].index_select(stays.axis, torch.from_numpy(stays.index).to(values[name].device))


def refittable(model: Model) -> dict[int, QuantizedLayer]:
    """Find the layers that can be refitted.

    Args:
        model: The student.

    Returns:
        Convolutions and matrix products with weights of their own, by id of the node.
    """
    return {
        key: layer
        for key, layer in make_plan(model, Bits(8, None, None), types=FLOATS).layers.items()
        if patches_of(model, layer) is not None
        and layer.linear.view(layer.linear.weight)[0, 0].size <= MAX_FAN_IN
    }


@dataclass(frozen=True)
class ChannelRepair(Repair):
    """Refits and fine-tunes a student, the network without the channels that were cut."""

    kept: Mapping[str, Kept]
    """What is left of the tensors that lost channels."""

    def _refit(self, batch: int) -> dict[str, Tensor]:
        return self._refit_layers(batch, refittable(self.model))

    def _finetune(
        self, student: Executor, start: dict[str, Tensor], held_out: HeldOut, batch: int
    ) -> Finetuned:
        tuned = super()._finetune(student, start, held_out, batch)
        weights = start | tuned.values
        topology = self.model.analysis(Topology)
        place = topology.position(self.model.graph.tensors()[self.matched.feature[0]])
        self._store(weights)
        behind = {k: x for k, x in refittable(self.model).items() if topology.index[k] > place}
        if behind:
            weights |= self._refit_layers(small_batch(self.model, MAX_BATCH, self.device), behind)
        return replace(tuned, values=weights)

    def _refit_layers(self, batch: int, layers: dict[int, QuantizedLayer]) -> dict[str, Tensor]:
        """Refit layers of the student, from the weights that the model has now."""
        ridge = TARGET_REAL if self.inputs.gathered.real else TARGET_MADE
        settings = RefitSettings(batch=batch, seed=self.options.seed, ridge=ridge)
        refit = ChannelRefit(
            self.whole, Plan(layers), settings, student=self.model, device=self.device, kept=self.kept
        )
        return refit.run(self.inputs.images[:REFIT_IMAGES], self.progress)


def with_kept_channels(
    whole: Model, names: Iterable[str], kept: Mapping[str, Kept]
) -> tuple[Model, dict[str, str]]:
    """Give the whole network tensors with the channels of others that are left.

    Args:
        whole: The network with all its channels; it stays as it is.
        names: Names of the tensors.
        kept: What is left of the tensors that lost channels.

    Returns:
        The network, a copy where any of the tensors lost channels, and the name of each in it.
    """
    found = {name: name for name in names}
    if found.keys().isdisjoint(kept):
        return whole, found
    own = whole.copy()
    for name in found.keys() & kept.keys():
        stays, source = kept[name], own.graph.tensors()[name]
        index = gs.Constant(unique_name(own, f"{name}_kept"), stays.index.astype(np.int64))
        target = gs.Variable(unique_name(own, f"{name}_left"), source.dtype)
        own.graph.nodes.append(
            gs.Node("Gather", attrs={"axis": stays.axis}, inputs=[source, index], outputs=[target])
        )
        own.touch()
        found[name] = str(target.name)
    return own, found
