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
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onnxcompress.evaluation.accuracy import agreement, score_output
from onnxcompress.graph.query import data_input
from onnxcompress.graph.topology import Topology
from onnxcompress.optimize.deterministic_threads import one_thread_each, worker_count
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.open_batch import split_images
from onnxcompress.optimize.reconstruction.activation_range import fake, least_squares, samples
from onnxcompress.optimize.reconstruction.context import CalibrationContext, fixed_batch, live_floats, needs
from onnxcompress.optimize.reconstruction.gptq import LayerMoments, nearest, reconstruct
from onnxcompress.optimize.reconstruction.layerwise import along
from onnxcompress.optimize.reconstruction.patches import matrix, patches_of, stored
from onnxcompress.optimize.reconstruction.quantize import RIDGE
from onnxcompress.optimize.reconstruction.saturation import SaturationBounds
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.qdq_plan import QuantizedLayer
from onnxcompress.sensitivity.rows import Row, Variant

MEMORY = 3 << 30
"""Bytes of the teacher's tensors held at once; fewer inputs are used where they would take more."""
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


@one_thread_each()
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
    workers = how.workers or worker_count()
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[list[Row]]] = deque()
    rows: list[Row] = []
    total, done = len(context.plan.layers), 0
    try:
        walk = _Walk(context, how)
        for site in walk.sites():
            waiting.append(pool.submit(walk.measure, site, variants))
            while len(waiting) > workers:  # each result still holds tensors
                rows += waiting.popleft().result()
                done += 1
                progress("measuring layers", done, total)
        while waiting:
            rows += waiting.popleft().result()
            done += 1
            progress("measuring layers", done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    return rows


@dataclass(frozen=True)
class _Site:
    """A layer, with the teacher's tensors around it."""

    layer: QuantizedLayer
    reads: dict[str, Tensor]
    """Tensors that the layer reads."""
    held: dict[str, Tensor]
    """Tensors that later nodes read, without the layer's output."""
    right: Tensor
    """The layer's output as the teacher computes it."""
    outputs: tuple[str, ...]
    """Outputs of the network that are not computed yet."""


@dataclass
class _Walk:
    """The run of the teacher, and the runs from each changed layer on."""

    context: CalibrationContext
    how: Measuring
    _targets: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model, twin = self.context.model, self.context.twin
        self.executor = Executor.from_model(model)
        mapped = (*twin.weights, *twin.biases)
        self.maps = {n: twin.align(n, self.executor.parameters[n]) for n in mapped}
        self.topology = Topology(model)
        data = self.topology.data
        self.nodes = [n for n in self.topology.order if any(id(t) in data for t in n.outputs)]
        self.needs = [needs(node, self.topology) for node in self.nodes]
        self.last = {name: place for place, needed in enumerate(self.needs) for name in needed}
        fixed = fixed_batch(model)
        live = live_floats(model, self.nodes, self.last, data_input(model).name)
        count = max(min(len(self.context.images), MEMORY // (4 * COPIES * live)) // fixed, 1) * fixed
        self.images = self.context.images[:count]
        measured = max(count // SHARE // fixed, 1) * fixed
        self.learned = slice(0, count - measured or count)
        self.measured = slice(count - measured, count)

    def sites(self) -> Iterator[_Site]:
        """Run the teacher up to each layer of the plan, in the order of the graph.

        Yields:
            The layers with the teacher's tensors.
        """
        model = self.context.model
        outputs = [t for t in model.graph.outputs if id(t) in self.topology.data]
        held = {data_input(model).name: self.images}
        with torch.no_grad():
            found = self.run([t.name for t in outputs], held, {})
        self._targets = {n: self._part(v) for n, v in found.items() if v.is_floating_point()}
        places = {t.name: self.topology.position(t) for t in outputs if t.name in self._targets}
        for place, node in enumerate(self.nodes):
            reads = {n: held[n] for n in self.needs[place]}
            made = [t.name for t in node.outputs if not t.is_empty()]
            with torch.no_grad():
                held |= self.run(made, reads, {})
            held = {n: v for n, v in held.items() if self.last.get(n, -1) > place or n in made}
            layer = self.context.plan.layers.get(id(node))
            if layer is not None:
                right = held[layer.linear.output_name]
                later = {n: v for n, v in held.items() if n != layer.linear.output_name}
                now = self.topology.index[id(node)]
                behind = tuple(n for n, at in places.items() if at >= now)
                site = _Site(layer, reads, later, right, behind)
                self._plan(site)
                yield site
            held = {n: v for n, v in held.items() if self.last.get(n, -1) > place}

    def _plan(self, site: _Site) -> None:
        """Plan the executor's runs for this layer in the current thread; worker threads only run them."""
        self.executor.needed(site.reads, [site.layer.linear.output_name])
        self.executor.needed([*site.held, site.layer.linear.output_name], site.outputs)

    def measure(self, site: _Site, variants: Sequence[Variant]) -> list[Row]:
        """Measure each variant of one layer.

        Args:
            site: The layer.
            variants: The changes to try.

        Returns:
            A row for each variant.
        """
        layer = site.layer
        with torch.no_grad():
            weight, shape = matrix(layer, self.executor.parameters[layer.linear.weight_name])
            moments = self._moments(site, weight, variants)
            rows = []
            for one in variants:
                reads, parameters = site.reads, {}
                if one.kind == "activation_bits":
                    name = layer.linear.input_name
                    reads = reads | {name: self._quantized(reads[name], int(one.value))}
                else:
                    zeros = one.kind == "sparsity"
                    new = (
                        self._pruned(layer, weight, one)
                        if zeros
                        else self._rounded(layer, weight, moments, one)
                    )
                    parameters = {layer.linear.weight_name: stored(layer, new, shape)}
                wrong = self.run([layer.linear.output_name], reads, parameters)[layer.linear.output_name]
                rows.append(self._row(site, one, weight.numel(), wrong))
        return rows

    def _row(self, site: _Site, one: Variant, parameters: int, wrong: Tensor) -> Row:
        """Run the nodes after the changed layer, and compare the network's outputs."""
        layer = site.layer
        if layer.linear.bias_name is not None:
            off = (site.right - wrong)[self.learned]
            error = off.mean([axis for axis in range(wrong.ndim) if axis != 1])
            wrong = wrong + along(error, wrong)
        feeds = {n: self._part(v) for n, v in (site.held | {layer.linear.output_name: wrong}).items()}
        found = self.run(site.outputs, feeds, {}, self.measured.stop - self.measured.start)
        total = 0.0
        for name, value in found.items():
            target = self._targets[name].double()
            off = (value.double() - target).square().mean()
            total += float(off / target.var(correction=0).clamp_min(1e-12))
        error_ = total / max(len(self._targets), 1)
        return Row(
            layer.linear.label,
            layer.linear.node.op,
            layer.linear.weight_name,
            parameters,
            one.kind,
            one.value,
            error_ if math.isfinite(error_) else float("inf"),
            self._changed(self._targets | found),
        )

    def _changed(self, found: Mapping[str, Tensor]) -> float | None:
        """Return the share of inputs whose top-1 class changes, by the first output that has scores."""
        count = self.measured.stop - self.measured.start
        right = score_output({n: v.numpy() for n, v in self._targets.items()}, count)
        wrong = score_output({n: found[n].numpy() for n in self._targets}, count)
        return None if right is None or wrong is None else 1 - agreement(right, wrong)

    def _quantized(self, x: Tensor, bits: int) -> Tensor:
        grid = least_squares(samples(x[self.learned], self.how.seed), bits, "uint8", False)
        return fake(x, grid)

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
        found = reconstruct(weight, moments, allowed, each, ridge=RIDGE, target=math.inf)
        return found.weight

    def _moments(self, site: _Site, weight: Tensor, variants: Sequence[Variant]) -> LayerMoments | None:
        """Accumulate moments of the layer's input; None where the rounding needs none."""
        cut = patches_of(self.context.model, site.layer)
        wanted = self.how.reconstruct and any(v.kind == "weight_bits" for v in variants)
        if cut is None or not wanted:
            return None
        x = site.reads[site.layer.linear.input_name]
        generator = torch.Generator().manual_seed(self.how.seed)
        moments = LayerMoments.empty(weight)
        for start in range(0, self.learned.stop, self.context.batch):
            part = slice(start, min(start + self.context.batch, self.learned.stop))
            a, y = cut.take(x[part], site.right[part], cut.places(site.right, generator))
            moments.add(a, torch.zeros_like(y))
        return moments

    def _part(self, values: Tensor) -> Tensor:
        """Of a tensor of all images, that of those which are measured on."""
        rows = len(values) // len(self.images)
        return values[rows * self.measured.start : rows * self.measured.stop]

    def run(
        self,
        outputs: Sequence[str],
        feeds: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        count: int | None = None,
    ) -> dict[str, Tensor]:
        """Run the executor in batches.

        Args:
            outputs: Names of the tensors to compute.
            feeds: Name -> value of the tensors to start from, (N, …).
            parameters: Initializers to replace, by name, as values of the network without aligned
                statistics.
            count: Images that the feeds hold; None: all.

        Returns:
            Name -> value of the outputs, (N, …).
        """
        twin = self.context.twin
        own = {n: twin.align(n, v) if n in self.maps else v for n, v in parameters.items()}
        total, size = count or len(self.images), self.context.batch
        split = {n: split_images(v, total, size) for n, v in feeds.items()}
        parts = []
        for batch in zip(*split.values(), strict=True):
            part = dict(zip(split, batch, strict=True))
            parts.append(self.executor.run(part, list(outputs), self.maps | own))
        return {n: torch.cat([part[n] for part in parts]) for n in outputs}
