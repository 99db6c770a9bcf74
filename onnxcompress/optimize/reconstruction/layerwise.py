"""Layer-wise reconstruction in one walk: each layer of the student is fitted on the student's own input.

    teacher:  x ─ layers ─> t
    student:  x̂ ─ layers as fitted so far ─> y

Node by node (`network_walk`) both networks run on the same inputs. A layer is fitted (by the subclass:
`quantize`, `prune`, `residual_refit`) so that Ŵ x̂ + b̂ comes near t. Where only a residual addition reads
the layer, it also makes up for what the other side of the sum lost: t + (s_teacher − s_student).
Sources: layer-wise reconstruction, Horton et al. (arXiv 2011.09058) §3.3; the asymmetric target, Luo et
al., ThiNet (ICCV 2017) and Dong et al. (NeurIPS 2017).

With aligned statistics (`statistics_alignment`) both networks run with the same maps, y' = a y + b₀. A
layer is fitted without them: the map of each channel is undone on both sides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnxcompress.errors import InputError, ModelError
from onnxcompress.graph.query import is_op, is_output, value_readers
from onnxcompress.optimize.executor.network_walk import Batch, NetworkWalk
from onnxcompress.optimize.executor.walk_plan import Step
from onnxcompress.optimize.reconstruction.patches import PLACES
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.quantization.qdq_plan import Plan, QuantizedLayer


@dataclass(frozen=True, kw_only=True)
class LayerwiseSettings:
    """Settings of every layer-wise reconstruction."""

    reconstruct: bool = True
    batch: int = 32
    """Images that go through at once."""
    seed: int = 0
    places: int = PLACES
    """Places at which an image gives a patch, at most."""


@dataclass
class LayerwiseReconstruction(NetworkWalk, ABC):
    """One walk through the network, whose subclass fits each layer."""

    plan: Plan
    """Layers of the student."""
    settings: LayerwiseSettings
    alignment: StatisticsAlignment = field(default_factory=StatisticsAlignment)

    def __post_init__(self) -> None:
        self.batch = self.settings.batch
        super().__post_init__()
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        self.maps = {n: self.alignment.align(n, self.executor.parameters[n]) for n in self.alignment.names}
        self.own = dict(self.maps)
        self._theirs = {n: step.node for step in self.steps for n in step.outputs}

    def teacher_node(self, node: gs.Node) -> gs.Node:
        """Find the teacher's node that makes the same tensors as the student's.

        Args:
            node: A node of the student.

        Returns:
            The node; the same one where both are one network.
        """
        return self._theirs.get(node.outputs[0].name, node)

    @abstractmethod
    def fit_layer(self, layer: QuantizedLayer) -> None:
        """Fit the layer and `set_parameter` its parameters.

        Args:
            layer: The layer, whose inputs and targets `inputs` and `targets` give.
        """

    def on_layer_fitted(self, layer: QuantizedLayer) -> None:
        """Take note of the outputs of both networks once the layer is fitted.

        Args:
            layer: The layer.
        """
        return

    def visit(self, step: Step) -> None:
        """Run a node of both networks, and fit it in between where it is a layer.

        Args:
            step: The node.

        Raises:
            InputError: What a layer reads is not finite on these images.
            ModelError: A layer gives values that are not finite.
        """
        if not self.is_fitted(step):
            super().visit(step)
            return
        layer = self.plan.layers[id(step.own)]
        self.check_finite(layer.linear.input_name)
        alike = self.reads_alike(step, self.batches[0])
        self.each(lambda batch: self.run_teacher(step, batch))
        if not all(self.each(lambda batch: _is_finite(batch.teacher[layer.linear.output_name]))):
            raise ModelError(
                f"{self.model.name}: {layer.linear.label!r} ({layer.linear.node.op}) gives values that are "
                "not finite; correct its weights, or the inputs"
            )
        sum_of = self._sum_behind(layer)
        if sum_of is not None and self._is_there(*sum_of):
            self.prepare(*sum_of)
        self.fit_layer(layer)
        self.each(lambda batch: self.run_student(step, batch, alike))
        self.on_layer_fitted(layer)
        self.each(lambda batch: self.finish(step, batch))

    def prepare(self, node: gs.Node, index: int) -> None:
        """Get ready to `read` an input of a node.

        Args:
            node: The student's node.
            index: Place among its inputs; the tensor is there.
        """
        return

    def is_fitted(self, step: Step) -> bool:
        """Return whether the node is a layer of the plan.

        Args:
            step: The node.

        Returns:
            Whether `fit_layer` is called for it.
        """
        return id(step.own) in self.plan.layers

    def check_finite(self, name: str) -> None:
        """Check that a tensor of the student is finite.

        Args:
            name: Its name.

        Raises:
            InputError: It is not.
        """
        if not all(self.each(lambda batch: _is_finite(batch.student[name]))):
            raise InputError(f"tensor {name!r} is not finite on these images; check --preprocess")

    def input_of(self, layer: QuantizedLayer, batch: Batch) -> Tensor:
        """Return what the student's layer reads.

        Args:
            layer: The layer.
            batch: A batch in front of it.

        Returns:
            The values, (N, …).
        """
        return self.read(layer.linear.node, layer.linear.data_at, batch.student[layer.linear.input_name])

    def target_of(self, layer: QuantizedLayer, batch: Batch) -> Tensor:
        """Return what the layer is to give: the teacher's output, and what the other side of a sum lost.

        Args:
            layer: The layer.
            batch: A batch that the teacher has run.

        Returns:
            The target without aligned statistics, (N, outputs, …).
        """
        y = self.unaligned(layer, self.teacher_value(layer.linear.output_name, batch.teacher))
        lost = self._owed(layer, batch)
        return y if lost is None or lost.shape != y.shape else y + self.unaligned(layer, lost, offset=False)

    def unaligned(self, layer: QuantizedLayer, y: Tensor, offset: bool = True) -> Tensor:
        """Convert outputs of a layer to those without aligned statistics.

        Args:
            layer: The layer.
            y: Its outputs, (N, outputs, …).
            offset: Whether they are values, and not differences of values.

        Returns:
            The outputs of the same shape.
        """
        if layer.linear.bias_name not in self.alignment.biases:
            return y
        scale, shift = (along(part.to(y), y) for part in self.alignment.biases[layer.linear.bias_name])
        return (y - shift) / scale if offset else y / scale

    def _owed(self, layer: QuantizedLayer, batch: Batch) -> Tensor | None:
        """Return what the other side of a residual addition lost, where nothing else reads the layer."""
        sum_of = self._sum_behind(layer)
        if sum_of is None:
            return None
        add, index = sum_of
        if not self._is_there(add, index):
            return self.lost_ahead(add, index, batch)
        name = self.teacher_node(add).inputs[index].name
        if name not in batch.teacher:
            return None
        theirs = self.teacher_value(name, batch.teacher)
        ours = self.read(add, index, batch.student[add.inputs[index].name])
        return None if ours is theirs else theirs - ours

    def lost_ahead(self, add: gs.Node, index: int, batch: Batch) -> Tensor | None:
        """Return what the student lost at an input of an addition that was not computed yet.

        Args:
            add: The addition.
            index: Place among its inputs.
            batch: A batch in front of it.

        Returns:
            The teacher's values less the student's; None: a later layer makes up for that.
        """
        return None

    def _is_there(self, node: gs.Node, index: int) -> bool:
        return node.inputs[index].name in self.batches[0].student

    def _sum_behind(self, layer: QuantizedLayer) -> tuple[gs.Node, int] | None:
        """Return the addition that alone reads the layer, with the place of its other input."""
        tensor = layer.linear.node.outputs[0]
        readers = value_readers(tensor)
        if len(readers) != 1 or is_output(self.model, tensor) or not is_op(readers[0], "Add"):
            return None
        index = 0 if readers[0].inputs[1] is tensor else 1
        other = readers[0].inputs[index]
        return None if other is tensor or isinstance(other, gs.Constant) else (readers[0], index)

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Give the student a fitted parameter.

        Args:
            name: Name of the initializer.
            value: Its value without aligned statistics.
        """
        value = value.to(self.device)
        self.own[name] = self.alignment.align(name, value) if name in self.maps else value

    def mean_error(self, layer: QuantizedLayer) -> Tensor:
        """Measure the mean error of the fitted layer's output.

        Args:
            layer: The layer, whose weight is set already.

        Returns:
            Target less output, without aligned statistics, (outputs,).
        """

        def sums(batch: Batch) -> tuple[Tensor, int]:
            name = layer.linear.output_name
            feeds = {layer.linear.input_name: self.input_of(layer, batch)}
            made = self.own_executor.run(feeds, [name], self.own)[name]
            error = self.unaligned(layer, batch.teacher[name]) - self.unaligned(layer, made)
            axes = [axis for axis in range(error.ndim) if axis != 1]
            return error.double().sum(axes), error.numel() // error.shape[1]

        totals, counts = zip(*self.each(sums), strict=True)
        return torch.stack(totals).sum(0).div(sum(counts)).float()

    def noise_of(self, layer: QuantizedLayer) -> float:
        """Measure the squared error of the fitted layer's output, over the variance of the teacher's.

        Args:
            layer: The layer, which both networks have run.

        Returns:
            The ratio.
        """
        name = layer.linear.output_name

        def sums(batch: Batch) -> Tensor:
            wanted, made = batch.teacher[name].float(), batch.student[name].float()
            norms = [torch.linalg.vector_norm(own).double().square() for own in (made - wanted, wanted)]
            return torch.stack([*norms, wanted.sum().double(), norms[0].new_tensor(wanted.numel())])

        error, second, first, count = torch.stack(self.each(sums)).sum(0).tolist()
        return float(error / max(second - first**2 / count, 1e-12 * count))

    def lost(self, name: str) -> Tensor:
        """Compute the student's error at a tensor, after the walk.

        Args:
            name: Name of the tensor at which the walk stopped.

        Returns:
            The student's values less the teacher's, (N, …).
        """
        return torch.cat([b.student[name] - b.teacher[name] for b in self.all_batches if name in b.student])


def _is_finite(x: Tensor) -> bool:
    """Return whether all values are finite; the extremes pass on a NaN, and take no memory."""
    return bool(torch.stack(torch.aminmax(x)).isfinite().all())


def along(vector: Tensor, like: Tensor) -> Tensor:
    """Reshape a vector of channels to broadcast along axis 1.

    Args:
        vector: One value for each channel, (C,).
        like: A tensor with the channels on axis 1.

    Returns:
        The vector, (1, C, 1, …).
    """
    return vector.reshape(1, -1, *[1] * (like.ndim - 2))
