"""Quantize a network layer by layer: a layer-wise reconstruction whose layers are put on grids.

    student:  x̂ ─ layers on the grid ─> y          every edge of the plan passes its quantizer

A quantizer gets its range when it is first read (`activation_range`); a layer is rounded (`gptq`) so that
Ŵ x̂ + b̂ comes near what it should give.

Does not handle in closed form: ConvTranspose, MatMul of higher rank, convolutions that are not 2-d or pad
automatically: they are rounded to nearest, and their bias is corrected by the mean error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs
from torch import Tensor

from onnxcompress.optimize.executor.walk_plan import Step
from onnxcompress.optimize.reconstruction.activation_range import fake, least_squares, samples
from onnxcompress.optimize.reconstruction.gptq import RATIOS, SWEEPS, Rounded, nearest, reconstruct
from onnxcompress.optimize.reconstruction.layerwise import LayerwiseReconstruction, LayerwiseSettings
from onnxcompress.optimize.reconstruction.patches import matrix, patches_of, stored
from onnxcompress.optimize.reconstruction.ridge import ROUNDING, TARGET_4_BITS, TARGET_ROWS
from onnxcompress.optimize.reconstruction.saturation import SaturationBounds
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.affine_grid import Grid, activation_grid
from onnxcompress.quantization.qdq_plan import Key, QuantizedLayer


@dataclass(frozen=True, kw_only=True)
class Settings(LayerwiseSettings):
    """How to round, and on what."""

    per_channel: bool = True
    storage: str = "uint8"
    """Of activations."""
    small_types: bool = False
    """Activations of 4 bits and fewer in the 4-bit type."""
    symmetric: bool = False
    saturation_safe: bool = False
    """Weights of 8 bits that cannot overflow 16-bit sums (`integers`)."""
    minmax: bool = False
    """Ranges of activations: the samples' ends."""
    repair: bool = True
    """Weights and biases make up for what earlier layers lost on these inputs, too; else a bias makes up
    for the rounding of its own layer's weight alone."""
    ratios: int = RATIOS
    """Clipping ratios that are tried for each scale of a weight."""
    sweeps: int = SWEEPS
    """Sweeps of coordinate descent; 0: weights are rounded to nearest."""


@dataclass
class QuantizationResults:
    """What the pass found, by names of tensors."""

    grids: dict[Key, Grid] = field(default_factory=dict)
    weights: dict[int, Rounded] = field(default_factory=dict)
    """By id of the layer's node."""
    biases: dict[int, Tensor] = field(default_factory=dict)
    """The student's bias, (outputs,)."""
    noise: dict[int, float] = field(default_factory=dict)
    """Of each layer's output: squared error over variance."""


@dataclass
class Quantizer(LayerwiseReconstruction):
    """One run over the network."""

    settings: Settings
    results: QuantizationResults = field(default_factory=QuantizationResults)

    def run(
        self, images: Tensor, progress: Progress = silent, seen: Tensor | None = None
    ) -> QuantizationResults:
        """Quantize the network, or the part of it that the walk goes through.

        Args:
            images: Inputs at `source`, (N, …).
            progress: Called with the stage, the nodes done and the nodes in all.
            seen: Inputs of the student at `source`, (N, …); None: the same.

        Returns:
            The results, with those of earlier parts.
        """
        self.pass_through(images, "quantizing layers", progress, seen)
        return self.results

    def visit(self, step: Step) -> None:
        """Fit the quantizers that the student's node reads for the first time, and go on.

        Args:
            step: The node.
        """
        for index in range(len(step.node.inputs)):
            self.prepare(step.node, index)
        super().visit(step)

    def prepare(self, node: gs.Node, index: int) -> None:
        """Fit the quantizer in front of a node, if there is one that nothing has read yet.

        Args:
            node: The node.
            index: Place among its inputs.
        """
        key = self.plan.edges.get((id(node), index))
        if key is not None and self.plan.root(key) not in self.results.grids:
            self._fit_grid(self.plan.root(key))

    def read(self, node: gs.Node, index: int, value: Tensor) -> Tensor:
        """Pass a tensor through the quantizer in front of a node, if there is one.

        Args:
            node: The node.
            index: Place among its inputs.
            value: The tensor.

        Returns:
            The values on the grid, of the same shape.
        """
        key = self.plan.edges.get((id(node), index))
        return value if key is None else fake(value, self.results.grids[self.plan.root(key)])

    def alters(self, node: gs.Node) -> bool:
        """Return whether there is a quantizer in front of a node.

        Args:
            node: The node.

        Returns:
            Whether any of its inputs passes one.
        """
        return any((id(node), index) in self.plan.edges for index in range(len(node.inputs)))

    def on_layer_fitted(self, layer: QuantizedLayer) -> None:
        """Note the noise of the layer's output.

        Args:
            layer: The layer.
        """
        self.results.noise[id(layer.linear.node)] = self.noise_of(layer)

    def _fit_grid(self, key: Key) -> None:
        """Choose a quantizer's grid by samples of its tensor. key: the quantizer that owns the grid."""
        self.check_finite(key[0])
        s = self.settings
        x = samples([batch.student[key[0]] for batch in self.batches], s.seed)
        storage = s.storage.replace("8", "4") if s.small_types and key[1] <= 4 else s.storage
        if s.minmax:
            ends = float(x.amin()), float(x.amax())
            self.results.grids[key] = activation_grid(*ends, key[1], storage=storage, symmetric=s.symmetric)
        else:
            self.results.grids[key] = least_squares(x, key[1], storage, s.symmetric)

    def fit_layer(self, layer: QuantizedLayer) -> None:
        """Round the layer's weight and correct its bias.

        Args:
            layer: The layer.
        """
        linear, s = layer.linear, self.settings
        weight, shape = matrix(layer, self.executor.parameters[linear.weight_name])
        allowed = SaturationBounds.of(layer, layer.weight_bits, saturation_safe=s.saturation_safe)
        each = layer.per_channel(s.per_channel)
        cut = patches_of(self.model, layer) if s.reconstruct else None
        if cut is None:
            rounded = nearest(weight, allowed, each)
        else:
            moments = self.moments_of(layer, cut, weight)
            fewest = min(layer.weight_bits, 8 if layer.input is None else layer.input[1])
            few = moments.rows < TARGET_ROWS * weight.shape[2]
            target = math.inf if few or not s.repair else TARGET_4_BITS * 2 ** (fewest - 4)
            if not s.repair:
                moments.residual.zero_()
            rounded = reconstruct(
                weight,
                moments,
                allowed,
                each,
                ridge=ROUNDING,
                target=target,
                ratios=s.ratios,
                sweeps=s.sweeps,
            )
        self.results.weights[id(linear.node)] = rounded
        self.set_parameter(linear.weight_name, stored(layer, rounded.weight, shape))
        if linear.bias_name is None:
            return
        bias = self.executor.parameters[linear.bias_name] + rounded.shift.reshape(-1)
        if cut is None and s.reconstruct:
            bias = bias + self.mean_error(layer)
        self.results.biases[id(linear.node)] = bias
        self.set_parameter(linear.bias_name, bias)
