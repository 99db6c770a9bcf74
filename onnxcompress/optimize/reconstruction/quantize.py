"""Quantize a network layer by layer: a layer-wise reconstruction whose layers are put on grids.

    student:  x̂ ─ layers on the grid ─> y          every edge of the plan passes its quantizer

A quantizer gets its range when it is first read (`activation_range`); a layer is rounded (`gptq`) so that
Ŵ x̂ + b̂ comes near what it should give.

Does not handle in closed form: ConvTranspose, MatMul of higher rank, convolutions that are not 2-d or pad
automatically: they are rounded to nearest, and their bias is corrected by the mean error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnxcompress.graph.query import is_op, is_output, producer
from onnxcompress.graph.self_gated import gated_output
from onnxcompress.optimize.executor.network_walk import Batch
from onnxcompress.optimize.executor.walk_plan import Step
from onnxcompress.optimize.reconstruction.activation_range import fake, least_squares, samples
from onnxcompress.optimize.reconstruction.gptq import RATIOS, SWEEPS, Rounded, nearest, reconstruct
from onnxcompress.optimize.reconstruction.layer_moments import moments_of
from onnxcompress.optimize.reconstruction.layerwise import LayerwiseReconstruction, LayerwiseSettings
from onnxcompress.optimize.reconstruction.patches import matrix, patches_of, stored
from onnxcompress.optimize.reconstruction.range_behind import (
    IMAGES,
    LOGIT,
    ends_behind,
    fit_ends,
    headroom,
    reaches_sigmoid,
)
from onnxcompress.optimize.reconstruction.ridge import ROUNDING, TARGET_4_BITS, TARGET_ROWS
from onnxcompress.optimize.reconstruction.saturation import SaturationBounds
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.affine_grid import Grid, activation_grid
from onnxcompress.quantization.qdq_plan import STREAM_BITS, Key, QuantizedLayer


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
    generic_inputs: bool = False
    """The inputs know nothing of the training data: a layer's errors on them are not made up for behind it,
    and ranges have headroom (`range_behind`)."""
    minmax: bool = False
    """Ranges of activations: the samples' ends."""
    repair: bool = True
    """Weights and biases make up for what earlier layers lost on these inputs, too; else a bias makes up
    for the rounding of its own layer's weight alone."""
    damping: float = 1.0
    """Factor of the target's λ, where weights make up for what earlier layers lost."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self._read_by_teacher: dict[int, Tensor] = {}
        self._tensors = self.model.graph.tensors()
        self._depths, before = dict[str, float](), 0
        for node in self.topology.order:
            depth = before / max(len(self.plan.layers), 1)
            self._depths.update((tensor.name, depth) for tensor in node.outputs)
            before += id(node) in self.plan.layers

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
        layer = self.plan.layers.get(id(step.own))
        if layer is not None and self.settings.generic_inputs:
            name = layer.linear.input_name
            self._read_by_teacher = {id(batch): batch.teacher[name] for batch in self.batches}
        super().visit(step)
        self._read_by_teacher = {}

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

    def input_of(self, layer: QuantizedLayer, batch: Batch) -> Tensor:
        """Return what the layer is fitted on: with generic inputs what the teacher's layer reads.

        Args:
            layer: The layer.
            batch: A batch in front of it.

        Returns:
            The values, (N, …).
        """
        if self.settings.generic_inputs:
            return self._read_by_teacher[id(batch)]
        return super().input_of(layer, batch)

    def target_of(self, layer: QuantizedLayer, batch: Batch) -> Tensor:
        """Return what the layer is to give: with generic inputs what the teacher's layer gives.

        Args:
            layer: The layer.
            batch: A batch that the teacher has run.

        Returns:
            The target without aligned statistics, (N, outputs, …).
        """
        if self.settings.generic_inputs:
            return self.unaligned(layer, batch.teacher[layer.linear.output_name])
        return super().target_of(layer, batch)

    def _fit_grid(self, key: Key) -> None:
        """Choose a quantizer's grid by samples of its tensor. key: the quantizer that owns the grid."""
        self.check_finite(key[0])
        self.results.grids[key] = self._fitted_grid(*key)

    def _fitted_grid(self, name: str, bits: int) -> Grid:
        s, tensor = self.settings, self._tensors[name]
        width = "4" if s.small_types and bits <= 4 else "8" if bits <= 8 else "16"
        storage = s.storage.replace("8", width)

        def grid(low: float, high: float) -> Grid:
            return activation_grid(low, high, bits, storage=storage, symmetric=s.symmetric)

        if bits >= STREAM_BITS and is_op(producer(tensor), "Sigmoid", "HardSigmoid", "Softmax"):
            return grid(0, 1)
        x = samples([batch.student[name] for batch in self.batches], s.seed)
        low, high = float(x.amin()), float(x.amax())
        if s.minmax or (s.generic_inputs and not tensor.inputs):
            return grid(low, high)
        ends = ends_behind(self.model, self.plan, tensor)
        gated = not is_output(self.model, tensor) and gated_output(tensor) is not None
        if ends != [name] and (s.generic_inputs or gated):
            low, high = self._ends(name, ends, grid, min(low, 0.0), max(high, 0.0))
        else:
            found = least_squares(x, bits, storage, s.symmetric)
            if not s.generic_inputs:
                return found
            low, high = found.bounds
        if s.generic_inputs:
            high *= headroom(self._depths[name])
            if reaches_sigmoid(tensor):
                low, high = min(low, -LOGIT), max(high, LOGIT)
        return grid(low, high)

    def _ends(
        self, name: str, ends: list[str], grid: Callable[[float, float], Grid], low: float, high: float
    ) -> tuple[float, float]:
        """Return the ends with the least error behind the readers, on a few images."""
        others = [end for end in ends if end != name]

        def run(x: Tensor) -> list[Tensor]:
            found = self.own_executor.run({name: x}, others, self.own)
            return [x if end == name else found[end] for end in ends]

        return fit_ends(self._few_values(name), grid, run, low, high)

    def _few_values(self, name: str) -> Tensor:
        """Return a tensor's values for a few images, evenly spread."""
        values = [batch.student[name] for batch in self.batches]
        step, start, parts = -(-sum(map(len, values)) // IMAGES), 0, []
        for part in values:
            parts.append(part[-start % step :: step])
            start += len(part)
        return torch.cat(parts)

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
            moments = moments_of(self, layer, cut, weight)
            fewest = min(layer.weight_bits, 8 if layer.input is None else layer.input[1])
            few = s.generic_inputs or moments.rows < TARGET_ROWS * weight.shape[2]
            target = s.damping * TARGET_4_BITS * 2 ** (fewest - 4)
            target = math.inf if few or not s.repair else target
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
