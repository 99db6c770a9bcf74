"""Prune a network by layer-wise reconstruction: layers get zeros, and new values for what stays.

`Trials` goes through the teacher and tries some sparsities on each layer alone. `output_costs` estimates
what each would do to the network's output f. With random v, independent for each image and output,

    E (∂(Σ v f)/∂W · ΔW)² = Σ over images |Δf|²        to first order in ΔW

so that one backward pass gives one sample of the cost of all layers, sparsities and rows at a time; errors
that are alike at all places of an image add up in it, as they do in the network. `Sparsifier` then prunes:
mask and values by least squares (`admm_mask`), on the student's input.

Does not handle in closed form: ConvTranspose, MatMul of higher rank, convolutions that are not 2-d or pad
automatically: their smallest magnitudes become 0, and their bias is corrected by the mean error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from onnxcompress.graph.query import producer
from onnxcompress.optimize.deterministic_threads import in_turn
from onnxcompress.optimize.reconstruction.admm_mask import MaskChoice, Problem
from onnxcompress.optimize.reconstruction.layer_moments import moments_of
from onnxcompress.optimize.reconstruction.layerwise import LayerwiseReconstruction, LayerwiseSettings
from onnxcompress.optimize.reconstruction.patches import matrix, patches_of, stored
from onnxcompress.optimize.reconstruction.ridge import (
    TARGET_REAL,
    TARGET_ROWS,
    LayerMoments,
    least_squares,
)
from onnxcompress.optimize.reconstruction.sparsity_pattern import UNSTRUCTURED, Pattern
from onnxcompress.quantization.qdq_plan import QuantizedLayer

LEVELS = (0.3, 0.5, 0.65, 0.8, 0.9, 0.95)
"""Sparsities that are tried."""
TYPICAL = 2
"""Index of the level at which the weights of rows are estimated."""
TRIAL_STEPS, TRIAL_REFITS = 6, 5
"""`steps` and `refits` of `Problem.approximate` in a trial."""
PROBES = 64
"""Backward passes with random v."""
PROBED = 8
"""Images of a probe."""
PROBE_BYTES = 3 << 26
"""Memory of the tensors that a probe computes at once; it goes through the network in pieces if need be."""
SPREAD = 20.0
"""Largest ratio of a row's weight to the layer's mean, and of the mean to a row's weight."""


@dataclass(frozen=True)
class Trial:
    """The effect of pruning a layer on the teacher's input, at each of LEVELS."""

    weight: Tensor
    """Ŵ − W, (levels, groups, outputs, fan)"""
    bias: Tensor
    """(levels, groups, outputs)"""
    error: Tensor
    """Mean square at the layer's outputs, (levels, groups, outputs)."""


@dataclass
class Trials(LayerwiseReconstruction):
    """Tries LEVELS on the layers named, without changing the network."""

    networks: ClassVar[int] = 1
    names: frozenset[str] = frozenset()
    found: dict[str, Trial] = field(default_factory=dict)

    @property
    def outputs(self) -> list[str]:
        """Outputs of the network that depend on its input; in place of an ArgMax or the like its inputs."""
        found: dict[str, None] = {}
        pending = [t for t in self.model.graph.outputs if id(t) in self.topology.data]
        while pending:
            tensor = pending.pop(0)
            maker = producer(tensor)
            if (
                maker is not None
                and not isinstance(tensor.dtype, int)
                and np.dtype(tensor.dtype).kind in "iub"
            ):
                pending += [t for t in maker.inputs if id(t) in self.topology.data]
            else:
                found[tensor.name] = None
        return list(found)

    def fit_layer(self, layer: QuantizedLayer) -> None:
        """Try the sparsities on a layer.

        Args:
            layer: The layer.
        """
        cut = patches_of(self.model, layer)
        if cut is None or layer.linear.weight_name not in self.names:
            return
        weight, shape = matrix(layer, self.executor.parameters[layer.linear.weight_name])
        moments = moments_of(self, layer, cut, weight)
        goal, h = _quadratic(weight, moments, math.inf)
        problem = Problem.of(goal, h, torch.ones(weight.shape[:2]))
        inverse = problem.inverse()

        def solved(index: int) -> Tensor:
            choice = MaskChoice(kept(weight.numel(), LEVELS[index]), math.prod(shape[3:]))
            with torch.no_grad():  # of each thread
                return problem.approximate(choice, inverse, steps=TRIAL_STEPS, refits=TRIAL_REFITS)

        changes, biases, errors = [], [], []
        for new in in_turn(solved, len(LEVELS)):
            off = new - goal
            changes.append(off.float())
            biases.append(moments.shift(weight, new).float())
            errors.append(((off @ h) * off).sum(2))
        self.found[layer.linear.weight_name] = Trial(
            torch.stack(changes), torch.stack(biases), torch.stack(errors)
        )


@dataclass(frozen=True)
class Costs:
    """The cost of pruning each layer, by name of its weight."""

    levels: dict[str, list[float]]
    """Squared error of the network's output at each of LEVELS."""
    rows: dict[str, Tensor]
    """Weight of each row's error, (groups, outputs), about 1."""


def output_costs(trials: Trials, images: Tensor, behind: Tensor | None = None) -> Costs:
    """Estimate what pruning each layer does to the network's output, by PROBES backward passes.

    Args:
        trials: The trials, after their pass.
        images: Inputs at the trials' source, (N, …).
        behind: Values at the tensor at which the trials stop, (N, …), where the layers behind have inputs
            of their own: errors at that tensor are then weighed as those inputs weigh them.

    Returns:
        The costs of the layers that were tried.
    """
    executor = trials.executor
    layers = [layer for layer in trials.plan.layers.values() if layer.linear.weight_name in trials.found]
    sums = {n: torch.zeros(len(LEVELS), dtype=torch.float64) for n in trials.found}
    rows = {n: torch.zeros_like(t.error[0]) for n, t in trials.found.items()}
    names = [
        n for layer in layers for n in (layer.linear.weight_name, layer.linear.bias_name) if n is not None
    ]
    maps = trials.maps
    size = min(PROBED, len(images)) if trials.settings.batch >= PROBED else trials.settings.batch

    piece = size if size < PROBED else max(1, PROBE_BYTES // (4 * sum(step.made for step in trials.steps)))

    def probed(probe: int) -> dict[str, Tensor]:
        def some(values: Tensor) -> Tensor:
            """Images from all over."""
            start = probe * max(len(values) // PROBES, size) % max(len(values) - size + 1, 1)
            return values[start : start + size]

        generator = torch.Generator().manual_seed(PROBES * trials.settings.seed + probe)
        leaves = {n: maps.get(n, executor.parameters[n]).detach().clone().requires_grad_() for n in names}
        given, slopes = {**maps, **leaves}, dict[str, Tensor]()
        for part in range(0, size, piece):
            feeds = {trials.source: some(images)[part : part + piece]}
            if trials.stop is None or behind is None:
                total = _random_sum(executor.run(feeds, trials.outputs, given), generator)
            else:
                place = some(behind)[part : part + piece].clone().requires_grad_()
                made = _random_sum(executor.run({trials.stop: place}, trials.outputs), generator)
                (slope,) = torch.autograd.grad(made, place)
                total = (slope * executor.run(feeds, [trials.stop], given)[trials.stop]).sum()
            found = torch.autograd.grad(
                total, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
            slopes = {
                n: slopes[n] + own if n in slopes else own for n, own in zip(leaves, found, strict=True)
            }
        return slopes

    for slopes in in_turn(probed, PROBES):
        for layer in layers:
            trial = trials.found[layer.linear.weight_name]
            slope = _undone(trials, layer.linear.weight_name, slopes[layer.linear.weight_name])
            change = (matrix(layer, slope)[0] * trial.weight).sum(3)
            if layer.linear.bias_name is not None:
                offset = _undone(trials, layer.linear.bias_name, slopes[layer.linear.bias_name])
                change = change + offset.reshape(change.shape[1:]) * trial.bias
            sums[layer.linear.weight_name] += change.sum((1, 2)).double().square() / (PROBES * size)
            rows[layer.linear.weight_name] += change[TYPICAL].double().square()
    worth = {n: _worth(rows[n] / trials.found[n].error[TYPICAL].clamp_min(1e-12)) for n in rows}
    return Costs({n: v.tolist() for n, v in sums.items()}, worth)


def _random_sum(made: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Return Σ v f, with outputs in units of their deviation."""
    total = torch.zeros(())
    for value in made.values():
        if value.is_floating_point():
            v = torch.randn(value.shape, generator=generator).to(value)
            spread = value.detach().std().clamp_min(1e-12) if value.numel() > 1 else value.new_ones(())
            total = total + (v * value).sum() / spread
    return total


def _undone(trials: Trials, name: str, slope: Tensor) -> Tensor:
    """Convert a gradient of an aligned parameter to one of the network's own parameter."""
    if name in trials.alignment.weights:
        return slope * trials.alignment.weights[name]
    return slope * trials.alignment.biases[name][0] if name in trials.alignment.biases else slope


def _worth(rows: Tensor) -> Tensor:
    """Return the weights of rows from few samples: the square root, within bounds."""
    return (rows / rows.mean().clamp_min(1e-30)).clamp(1 / SPREAD, SPREAD).sqrt()


@dataclass(frozen=True, kw_only=True)
class Settings(LayerwiseSettings):
    """How to prune."""

    pattern: Pattern = UNSTRUCTURED
    sparsity: Mapping[str, float] = field(default_factory=dict)
    """Name of the weight -> share of zeros; other layers stay dense, but make up for errors, too."""
    rows: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Sparsifier(LayerwiseReconstruction):
    """Prunes the network in one pass."""

    settings: Settings
    results: dict[str, Tensor] = field(default_factory=dict)
    """Parameters of the layers, by name."""
    noise: dict[str, float] = field(default_factory=dict)
    """Name of the weight -> squared error of the layer's output, over its variance."""

    def fit_layer(self, layer: QuantizedLayer) -> None:
        """Choose the layer's zeros, and refit what stays.

        Args:
            layer: The layer.
        """
        weight, shape = matrix(layer, self.executor.parameters[layer.linear.weight_name])
        cut = patches_of(self.model, layer)
        share = self.settings.sparsity.get(layer.linear.weight_name)
        pattern = self.settings.pattern if share is not None else UNSTRUCTURED
        choice = MaskChoice(kept(weight.numel(), share or 0.0), math.prod(shape[3:]), pattern)
        if cut is None:
            new, shift = torch.where(choice.mask(weight.abs()), weight, 0.0), None
        else:
            moments = moments_of(self, layer, cut, weight)
            new = self._solved(layer, weight, moments, None if share is None else choice)
            shift = moments.shift(weight, new).float()
        self._note(layer.linear.weight_name, stored(layer, new.float(), shape))
        if layer.linear.bias_name is not None:
            bias = self.executor.parameters[layer.linear.bias_name]
            off = self.mean_error(layer) if shift is None else shift.reshape(-1)
            self._note(layer.linear.bias_name, bias + off)

    def _solved(
        self, layer: QuantizedLayer, weight: Tensor, moments: LayerMoments, choice: MaskChoice | None
    ) -> Tensor:
        """Return the least squares target, with the chosen weights at zero."""
        few = moments.rows < TARGET_ROWS * weight.shape[2]
        goal, h = _quadratic(weight, moments, math.inf if few else TARGET_REAL)
        if choice is None:
            return goal
        rows = self.settings.rows.get(layer.linear.weight_name)
        return Problem.of(goal, h, torch.ones(weight.shape[:2]) if rows is None else rows).solve(choice)

    def _note(self, name: str, value: Tensor) -> None:
        self.results[name] = value
        self.set_parameter(name, value)

    def on_layer_fitted(self, layer: QuantizedLayer) -> None:
        """Note the noise of the layer's output.

        Args:
            layer: The layer.
        """
        self.noise[layer.linear.weight_name] = self.noise_of(layer)


def _quadratic(weight: Tensor, moments: LayerMoments, target: float) -> tuple[Tensor, Tensor]:
    """Return W*, and H with smaller off-diagonal entries the fewer patches there are for each column.

    On few patches (a classifier has one an image) a few wrong weights elsewhere can make the output right.
    """
    goal, h = least_squares(weight, moments, ridge=TARGET_REAL, target=target)
    fan = weight.shape[2]
    diagonal = torch.diag_embed(h.diagonal(dim1=1, dim2=2))
    return goal, h.lerp(diagonal, fan / (fan + moments.rows))


def kept(size: int, sparsity: float) -> int:
    """Count the weights of a layer that stay.

    Args:
        size: Number of weights.
        sparsity: Share of zeros, from 0 to 1.

    Returns:
        The count, at least 1.
    """
    return max(1, round((1 - sparsity) * size))
