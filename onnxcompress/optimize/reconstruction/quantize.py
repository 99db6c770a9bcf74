"""Quantize a network layer by layer: a `course` whose layers are put on grids.

    student:  x̂ ─ layers on the grid ─> y          every edge of the plan passes its quantizer

A quantizer gets its range when it is first read (`ranges`); a layer is rounded (`rounding`) so that
Ŵ x̂ + b̂ comes near what it should give.

Does not handle in closed form: ConvTranspose, MatMul of higher rank, convolutions that are not 2-d or pad
automatically: they are rounded to nearest, and their bias is corrected by the mean error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnxcompress.optimize.deterministic_threads import in_turn
from onnxcompress.optimize.reconstruction.activation_range import fake, least_squares, samples
from onnxcompress.optimize.reconstruction.gptq import RATIOS, SWEEPS, Rounded, nearest, reconstruct
from onnxcompress.optimize.reconstruction.layerwise import (
    TARGET_ROWS,
    LayerwiseReconstruction,
    LayerwiseSettings,
)
from onnxcompress.optimize.reconstruction.patches import matrix, patches_of, stored
from onnxcompress.optimize.reconstruction.saturation import SaturationBounds
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.affine_grid import Grid, activation_grid
from onnxcompress.quantization.qdq_plan import Key, QuantizedLayer

RIDGE = 0.1
"""λ of the rounding, as a share of the mean of the patches' second moments."""
TARGET = 1.0
"""λ of the least-squares target at 4 bits, doubled with each bit: the less there is to repair, the more
made inputs mislead."""


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
        """images: (N, …) at `source`. seen: what the student reads there; None: the same."""
        self.pass_through(images, "quantizing layers", progress, seen)
        return self.results

    def _seen(self, node: gs.Node, index: int, name: str) -> Tensor:
        key = self.plan.edges.get((id(node), index))
        if key is None:
            return self._student[name]
        grid = self._grid(key)
        parts = torch.split(self._student[name], self.settings.batch)

        def rounded(index: int) -> Tensor:
            with torch.no_grad():  # of each thread
                return fake(parts[index], grid)

        return torch.cat(list(in_turn(rounded, len(parts))))

    def _on_layer_fitted(self, layer: QuantizedLayer, wanted: Tensor, made: Tensor) -> None:
        error = (made - wanted).square().mean()
        self.results.noise[id(layer.linear.node)] = float(error / wanted.var().clamp_min(1e-12))

    def _grid(self, key: Key) -> Grid:
        key = self.plan.root(key)
        if key not in self.results.grids:
            self._check_finite(key[0])
            x = samples(self._student[key[0]], self.settings.seed)
            s = self.settings
            storage = s.storage.replace("8", "4") if s.small_types and key[1] <= 4 else s.storage
            if s.minmax:
                ends = float(x.amin()), float(x.amax())
                found = activation_grid(*ends, key[1], storage=storage, symmetric=s.symmetric)
            else:
                found = least_squares(x, key[1], storage, s.symmetric)
            self.results.grids[key] = found
        return self.results.grids[key]

    def _fit_layer(self, layer: QuantizedLayer, x: Tensor, wanted: Tensor) -> None:
        """Round the layer's weight and correct its bias. x: what it reads; wanted: the teacher's output."""
        weight, shape = matrix(layer, self.executor.parameters[layer.linear.weight_name])
        s = self.settings
        allowed = SaturationBounds.of(layer, layer.weight_bits, saturation_safe=s.saturation_safe)
        each = layer.per_channel(s.per_channel)
        cut = patches_of(self.model, layer) if s.reconstruct else None
        if cut is None:
            found = nearest(weight, allowed, each)
        else:
            moments = self._moments(layer, cut, weight, x, self._wanted(layer, wanted))
            fewest = min(layer.weight_bits, 8 if layer.input is None else layer.input[1])
            few = moments.rows < TARGET_ROWS * weight.shape[2]
            target = math.inf if few or not s.repair else TARGET * 2 ** (fewest - 4)
            if not s.repair:
                moments.residual.zero_()
            found = reconstruct(
                weight, moments, allowed, each, ridge=RIDGE, target=target, ratios=s.ratios, sweeps=s.sweeps
            )
        self.results.weights[id(layer.linear.node)] = found
        self._set(layer.linear.weight_name, stored(layer, found.weight, shape))
        if layer.linear.bias_name is None:
            return
        bias = self.executor.parameters[layer.linear.bias_name] + found.shift.reshape(-1)
        if cut is None and s.reconstruct:
            bias = bias + self._mean_error(layer, x, wanted)
        self.results.biases[id(layer.linear.node)] = bias
        self._set(layer.linear.bias_name, bias)
