"""Refit the convolutions behind a dropped block, one after the other, in closed form.

The student lacks blocks of the teacher, so the two differ from the first dropped block on. Each convolution
behind it is fitted as in every layer-wise reconstruction: to what the teacher computes there, on what the
student's already refitted layers feed it. Where only a residual addition reads it, it also makes up for
what the stream lost, so the error does not pile up. A refitted weight contains any adapter beside it.

Does not handle: convolutions with automatic padding, with shared weights, or wider than MAX_FAN_IN.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_graphsurgeon as gs
from torch import Tensor

from onnxcompress.graph.conv_layers import conv_layers
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.executor.network_walk import Batch
from onnxcompress.optimize.executor.walk_plan import Step
from onnxcompress.optimize.reconstruction.layer_moments import fold_moments_of
from onnxcompress.optimize.reconstruction.layerwise import LayerwiseReconstruction, LayerwiseSettings
from onnxcompress.optimize.reconstruction.patches import matrix, patches_of, stored
from onnxcompress.optimize.reconstruction.ridge import (
    FOLDS,
    TARGET_REAL,
    choose_target,
    least_squares,
    merged,
)
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.qdq_plan import Plan, QuantizedLayer

MAX_FAN_IN = 2304
"""Inputs per group × kernel size from which on a layer is left to fine-tuning: the solve is cubic in it."""
PLACES = 128
"""Places at which an image gives a patch, at most."""


@dataclass(frozen=True, kw_only=True)
class RefitSettings(LayerwiseSettings):
    """How to refit, and on what."""

    places: int = PLACES
    ridge: float = TARGET_REAL
    """λ of the regression, at least, as a share of the variance of what a layer reads."""


@dataclass
class ResidualRefit(LayerwiseReconstruction):
    """Refits a student to the teacher that it lacks blocks of; both use the same names of tensors."""

    settings: RefitSettings
    results: dict[str, Tensor] = field(default_factory=dict)
    """Initializer -> refitted value."""

    @staticmethod
    def of(
        teacher: Model, student: Model, feature: str, settings: RefitSettings, device: str = "cpu"
    ) -> ResidualRefit:
        """Prepare to refit all layers up to a tensor.

        Args:
            teacher: The network with all its blocks.
            student: The network without some of them.
            feature: Name of the teacher's tensor up to which layers are refitted.
            settings: How to refit.
            device: Where torch computes.

        Returns:
            What refits them.
        """
        layers = {
            id(layer.node): QuantizedLayer(layer, 8, None)
            for layer in conv_layers(student).values()
            if layer.view(layer.weight)[0, 0].size <= MAX_FAN_IN
        }
        trunk = [str(tensor.name) for tensor in teacher.analysis(Topology).trunk()]
        stop = feature if feature in trunk else trunk[-1]
        return ResidualRefit(teacher, Plan(layers), settings, student=student, stop=stop, device=device)

    def run(self, images: Tensor, progress: Progress = silent) -> dict[str, Tensor]:
        """Refit the layers behind the first dropped block, in order.

        Args:
            images: Inputs of the network, (N, …).
            progress: Called with the stage, the nodes done and the nodes in all.

        Returns:
            Initializer -> refitted value.
        """
        self.pass_through(images, "refitting layers", progress)
        return self.results

    def is_fitted(self, step: Step) -> bool:
        """Return whether the node is a layer behind the first dropped block.

        Args:
            step: The node.

        Returns:
            Whether what it reads differs from what the teacher's reads.
        """
        return super().is_fitted(step) and not self.reads_alike(step, self.batches[0])

    def fit_layer(self, layer: QuantizedLayer) -> None:
        """Replace the layer's weight and bias by the least squares target.

        Args:
            layer: The layer.
        """
        linear = layer.linear
        cut = patches_of(self.model, layer)
        assert cut is not None
        own = self.own_executor.parameters[linear.weight_name]
        weight, shape = matrix(layer, own)
        folds = fold_moments_of(self, layer, cut, weight, FOLDS)
        moments, weight, offset = merged(folds), weight.to(own.device), linear.bias_name is not None
        target = max(self.settings.ridge, choose_target(weight, folds, bias=offset))
        new, _ = least_squares(weight, moments, ridge=0.0, target=target, bias=offset)
        self._note(linear.weight_name, stored(layer, new.to("cpu", own.dtype), shape).to(own.device))
        if linear.bias_name is not None:
            bias = self.own_executor.parameters[linear.bias_name]
            self._note(linear.bias_name, bias + moments.shift(weight, new).reshape(-1).to(bias.dtype))

    def lost_ahead(self, add: gs.Node, index: int, batch: Batch) -> Tensor | None:
        """Compute what the student lost at an input of an addition: a projection, which has few weights.

        Args:
            add: The addition.
            index: Place among its inputs.
            batch: A batch in front of it.

        Returns:
            The teacher's values less the student's.
        """
        theirs, ours = self.teacher_node(add).inputs[index].name, add.inputs[index].name
        wanted = self.teacher_value(theirs, self.executor.run(batch.teacher, [theirs], self.maps))
        return wanted - self.own_executor.run(batch.student, [ours], self.own)[ours]

    def _note(self, name: str, value: Tensor) -> None:
        self.results[name] = value
        self.set_parameter(name, value)
