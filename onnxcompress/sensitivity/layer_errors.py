"""Change one layer, keep the rest of the network, and measure the error of the network's outputs.

    teacher   x ──> layer ──> y ─┬─ the rest ──> t
    changed   x̂ ──> layer' ──> y' ─┘  …        ──> t̂        E (t̂ − t)² / Var t

The teacher is run once, node by node. At a layer, all tensors that later nodes need are at hand; only the
layer itself and the nodes after it run again for each change, fed with these tensors.

 - weight bits: the weight is rounded as `quantize` rounds a layer that reads the teacher's values (`gptq`);
 - activation bits: the layer's input passes a quantizer with the least squared error (`activation_range`);
 - sparsity: the smallest magnitudes of the layer become zero, by the weights as they are in the file.

A third of the inputs is measured on; the others give moments, ranges and bias corrections. On the inputs
for which a layer was rounded, its error comes out far too small where they are few: a Gemm has one row per
image.

Where the layer has a bias, the mean error of each output channel is subtracted from it, as in bias
correction. Layers run in parallel on threads, each with one thread of torch, so results do not depend on
their number. With aligned statistics (`statistics_alignment`) teacher and changed network both have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from onnxcompress.errors import ModelError
from onnxcompress.evaluation.accuracy import agreement, score_output
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.optimize.deterministic_threads import one_thread_each, run_jobs
from onnxcompress.optimize.executor.network_walk import Batch, NetworkWalk
from onnxcompress.optimize.executor.walk_plan import Step, affordable
from onnxcompress.optimize.reconstruction.activation_range import fake, least_squares, samples
from onnxcompress.optimize.reconstruction.context import CalibrationContext, fixed_batch
from onnxcompress.optimize.reconstruction.gptq import nearest, reconstruct
from onnxcompress.optimize.reconstruction.layerwise import along
from onnxcompress.optimize.reconstruction.patches import matrix, patches_of, stored
from onnxcompress.optimize.reconstruction.ridge import ROUNDING, LayerMoments
from onnxcompress.optimize.reconstruction.saturation import SaturationBounds
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.affine_grid import Grid
from onnxcompress.quantization.qdq_plan import QuantizedLayer
from onnxcompress.sensitivity.rows import Row, Variant

COPIES = 4
"""Copies held of the tensors at one place, because several layers are measured at once."""
SHARE = 3
"""One in SHARE inputs is measured on."""


@dataclass(frozen=True)
class Measuring:
    """How layers are changed, and how many at once."""

    per_channel: bool = True
    saturation_safe: bool = False
    """Whether weights keep within bounds that cannot saturate (`saturation.SaturationBounds.of`)."""
    reconstruct: bool = True
    seed: int = 0
    workers: int = 0
    """Layers measured at once; 0: as many as there are threads."""


def layer_errors(
    context: CalibrationContext, variants: Sequence[Variant], how: Measuring, progress: Progress = silent
) -> list[Row]:
    """Measure each variant of each layer of the plan.

    Args:
        context: The network, its layers, and the inputs to measure on.
        variants: The changes to try on each layer.
        how: How layers are changed, and how many at once.
        progress: Called with the stage, the layers done and the layers in all.

    Returns:
        A row for each layer and each variant, in their order.
    """
    rows: list[Row] = []
    walk = _Walk(context.model, batch=context.batch, context=context, how=how)
    with one_thread_each(how.workers):
        for done, found in enumerate(run_jobs(walk.jobs(variants)), 1):
            rows += found
            progress("measuring layers", done, len(context.plan.layers))
    return rows


@dataclass(frozen=True)
class _Batch:
    """Some images, with the teacher's tensors around a layer."""

    images: int
    reads: dict[str, Tensor]
    """Tensors that the layer reads."""
    held: dict[str, Tensor]
    """Tensors that later nodes read, without the layer's output."""
    right: Tensor
    """The layer's output as the teacher computes it."""


@dataclass(frozen=True)
class _Site:
    """A layer, with the teacher's tensors around it."""

    layer: QuantizedLayer
    learned: list[_Batch]
    """Images that rounding, ranges and bias corrections are chosen by."""
    measured: list[_Batch]
    """Images that errors are measured on; all where there are too few for both."""
    outputs: tuple[str, ...]
    """Outputs of the network that are not computed yet."""


@dataclass
class _Walk(NetworkWalk):
    """The run of the teacher, and the runs from each changed layer on."""

    networks: ClassVar[int] = COPIES
    context: CalibrationContext
    how: Measuring

    def __post_init__(self) -> None:
        super().__post_init__()
        model, alignment = self.context.model, self.context.alignment
        self.maps = {n: alignment.align(n, self.executor.parameters[n]) for n in alignment.names}
        self.own = self.maps
        fixed = fixed_batch(model)
        count = max(affordable(self.steps, len(self.context.images), COPIES) // fixed, 1) * fixed
        self.images = self.context.images[:count]
        self.measured = max(count // SHARE // fixed, 1) * fixed
        made = [self.topology.last_floats(t) for t in model.graph.outputs if id(t) in self.topology.data]
        outputs = {t.name: t for t in made if self.topology.is_float(t)}
        if not outputs:
            raise ModelError(
                f"{model.name}: none of its outputs is made of floats, so what a layer loses cannot be "
                "measured; put out a tensor in front of them"
            )
        self._places = {name: self.topology.position(tensor) for name, tensor in outputs.items()}
        self._site: _Site | None = None
        self._targets: dict[str, Tensor] = {}

    def split(self, images: Tensor, seen: Tensor) -> list[Batch]:
        """Split the inputs into batches, each of which is either measured on or not.

        Args:
            images: Inputs of the teacher, (N, …).
            seen: The same.

        Returns:
            The batches; those that are measured on come last.
        """
        place = len(images) - self.measured
        learned = super().split(images[:place], images[:place])
        self._learned = len(learned)
        return [*learned, *super().split(images[place:], images[place:])]

    def jobs(self, variants: Sequence[Variant]) -> Iterator[Callable[[], list[Row]]]:
        """Run the teacher up to each layer of the plan, in the order of the graph.

        Args:
            variants: The changes to try on each layer.

        Yields:
            A job for each layer that measures the variants.
        """
        names = list(self._places)
        found = self.executor.run_batched(
            {self.source: self.images[len(self.images) - self.measured :]},
            names,
            count=self.measured,
            batch=self.batch,
            parameters=self.maps,
        )
        self._targets = {n: v for n, v in found.items() if v.is_floating_point()}
        for _ in self.go(self.images):
            if self._site is not None:
                job, self._site = partial(self.measure, self._site, variants), None
                yield job

    def visit(self, step: Step) -> None:
        """Run a node of the teacher, and keep the tensors around it where it is a layer of the plan.

        Args:
            step: The node.
        """
        layer = self.context.plan.layers.get(id(step.node))
        if layer is None:
            super().visit(step)
            return
        now = self.topology.index[id(step.node)]
        behind = tuple(n for n, at in self._places.items() if at >= now and n in self._targets)
        around = self.each(partial(self._around, step))
        self._site = _Site(layer, around[: self._learned] or around, around[self._learned :], behind)

    def _around(self, step: Step, batch: Batch) -> _Batch:
        """Run the node on a batch; return the tensors in front of it and behind it."""
        reads = {name: batch.teacher[name] for name in step.reads}
        self.run_teacher(step, batch)
        output = step.outputs[0]
        held = {n: v for n, v in batch.teacher.items() if n != output}
        right = batch.teacher[output]
        self.run_student(step, batch, alike=True)
        self.finish(step, batch)
        return _Batch(batch.images, reads, held, right)

    def measure(self, site: _Site, variants: Sequence[Variant]) -> list[Row]:
        """Measure each variant of one layer.

        Args:
            site: The layer.
            variants: The changes to try.

        Returns:
            A row for each variant.
        """
        linear = site.layer.linear
        with torch.no_grad():
            weight, shape = matrix(site.layer, self.executor.parameters[linear.weight_name])
            moments = self._moments(site, weight, variants)
            rows = []
            for one in variants:
                grid, parameters = None, self.maps
                if one.kind == "activation_bits":
                    x = samples([part.reads[linear.input_name] for part in site.learned], self.how.seed)
                    grid = least_squares(x, int(one.value), "uint8", False)
                else:
                    new = (
                        self._pruned(site.layer, weight, one)
                        if one.kind == "sparsity"
                        else self._rounded(site.layer, weight, moments, one)
                    )
                    name, new = linear.weight_name, stored(site.layer, new, shape)
                    parameters = self.maps | {
                        name: self.context.alignment.align(name, new) if name in self.maps else new
                    }
                rows.append(
                    self._row(site, one, weight.numel(), partial(self._wrong, linear, grid, parameters))
                )
        return rows

    def _wrong(
        self, linear: Linear, grid: Grid | None, parameters: Mapping[str, Tensor], part: _Batch
    ) -> Tensor:
        """Return the changed layer's output on a batch."""
        reads = part.reads
        if grid is not None:
            reads = reads | {linear.input_name: fake(reads[linear.input_name], grid)}
        return self.executor.run(reads, [linear.output_name], parameters)[linear.output_name]

    def _row(self, site: _Site, one: Variant, parameters: int, wrong: Callable[[_Batch], Tensor]) -> Row:
        """Run the nodes after the changed layer, and compare the network's outputs."""
        linear = site.layer.linear
        shift: Tensor | None = None
        if linear.bias_name is not None:
            off = [part.right - wrong(part) for part in site.learned]
            axes = [axis for axis in range(off[0].ndim) if axis != 1]
            rows = sum(own.numel() // own.shape[1] for own in off)
            shift = (torch.stack([own.double().sum(axes) for own in off]).sum(0) / rows).float()
        parts = []
        for part in site.measured:
            y = wrong(part)
            feeds = part.held | {linear.output_name: y if shift is None else y + along(shift, y)}
            parts.append(self.executor.run(feeds, site.outputs, self.maps))
        found = {name: torch.cat([own[name] for own in parts]) for name in site.outputs}
        total = 0.0
        for name, value in found.items():
            target = self._targets[name].double()
            square = (value.double() - target).square().mean()
            total += float(square / target.var(correction=0).clamp_min(1e-12))
        error = total / max(len(self._targets), 1)
        return Row(
            linear.label,
            linear.node.op,
            linear.weight_name,
            parameters,
            one.kind,
            one.value,
            error if math.isfinite(error) else float("inf"),
            self._changed(self._targets | found),
        )

    def _changed(self, found: Mapping[str, Tensor]) -> float | None:
        """Return the share of inputs whose top-1 class changes, by the first output that has scores."""
        count = self.measured
        right = score_output({n: v.numpy() for n, v in self._targets.items()}, count)
        wrong = score_output({n: found[n].numpy() for n in self._targets}, count)
        return None if right is None or wrong is None else 1 - agreement(right, wrong)

    def _pruned(self, layer: QuantizedLayer, weight: Tensor, one: Variant) -> Tensor:
        """Set the smallest magnitudes of a weight to zero; of equal ones the first."""
        own = self.executor.parameters[layer.linear.weight_name]
        plain, _ = matrix(layer, self.context.plain.get(layer.linear.weight_name, own))
        order = plain.abs().flatten().argsort(stable=True)
        new = weight.flatten().clone()
        new[order[: round(one.value * weight.numel())]] = 0
        return new.reshape(weight.shape)

    def _rounded(
        self, layer: QuantizedLayer, weight: Tensor, moments: LayerMoments | None, one: Variant
    ) -> Tensor:
        """Round a weight to its grid."""
        allowed = SaturationBounds.of(layer, int(one.value), saturation_safe=self.how.saturation_safe)
        each = layer.per_channel(self.how.per_channel)
        if moments is None:
            return nearest(weight, allowed, each).weight
        found = reconstruct(weight, moments, allowed, each, ridge=ROUNDING, target=math.inf)
        return found.weight

    def _moments(self, site: _Site, weight: Tensor, variants: Sequence[Variant]) -> LayerMoments | None:
        """Accumulate moments of the layer's input; None where the rounding needs none."""
        cut = patches_of(self.context.model, site.layer)
        wanted = self.how.reconstruct and any(v.kind == "weight_bits" for v in variants)
        if cut is None or not wanted:
            return None
        generator = torch.Generator().manual_seed(self.how.seed)
        moments = LayerMoments.empty(weight)
        for part in site.learned:
            places = cut.places(part.right, generator)
            a, y = cut.take(part.reads[site.layer.linear.input_name], part.right, places)
            moments.add(a, torch.zeros_like(y))
        moments.check_finite(site.layer.linear.label)
        return moments
