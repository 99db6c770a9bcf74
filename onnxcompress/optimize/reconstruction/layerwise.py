"""Layer-wise reconstruction in one pass: each layer of the student is fitted on the student's own input.

    teacher:  x ─ layers ─> t
    student:  x̂ ─ layers as fitted so far ─> y

Node by node, in the order of the graph, both networks run on the same inputs, and only tensors that a later
node needs are held. A layer is fitted (by the subclass: `quantize`, `prune`) so that Ŵ x̂ + b̂ comes near t.
Where only a residual addition reads the layer, it also makes up for what the other side of the sum lost:
t + (s_teacher − s_student).

The pass goes through the whole network, or from one tensor of its trunk to another (`start`, `stop`).

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
from onnxcompress.graph.query import data_input, is_op, is_output, node_label, value_readers
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.deterministic_threads import in_turn, one_thread_each
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.open_batch import split_images
from onnxcompress.optimize.reconstruction.context import fixed_batch, live_floats, needs, nodes_between
from onnxcompress.optimize.reconstruction.gptq import LayerMoments
from onnxcompress.optimize.reconstruction.patches import PLACES, Patches
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.qdq_plan import Plan, QuantizedLayer

RIDGE = 1e-2
"""λ as a share of the mean of the patches' second moments."""
TARGET_ROWS = 4
"""Patches per weight of an output that the least-squares target takes at least."""
MEMORY = 3 << 30
"""Bytes of the tensors that are held; fewer images are used where they would take more."""
COPIES = 3
"""Copies of each tensor that are held: the teacher's, the student's, and one in work."""
ROWS, ROWS_EACH = 40_000, 100
"""Patches that are used: ROWS, or ROWS_EACH for each column of the matrix where that is more."""


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
class LayerwiseReconstruction(ABC):
    """One pass over the network, whose subclass fits each layer."""

    model: Model
    plan: Plan
    settings: LayerwiseSettings
    twin: StatisticsAlignment = field(default_factory=StatisticsAlignment)
    device: str = "cpu"
    start: str | None = None
    """Name of the tensor of the trunk that is fed; None: the network's one input."""
    stop: str | None = None
    """Name of the tensor of the trunk at which the pass ends; None: the end of the network."""

    def __post_init__(self) -> None:
        self.executor = Executor.from_model(self.model, device=self.device)
        self.topology = Topology(self.model)
        self._teacher: dict[str, Tensor] = {}
        self._student: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        self._count = 0
        self._nodes = nodes_between(self.topology, self.start, self.stop)
        self._needs_of = [needs(node, self.topology) for node in self._nodes]
        for node, needed in zip(self._nodes, self._needs_of, strict=True):
            if not needed:
                raise ModelError(
                    f"{self.model.name}: node {node_label(node)!r} ({node.op}) reads data only inside its "
                    "body, where layers are not followed; export the network without control flow"
                )
        self._last = {name: place for place, needed in enumerate(self._needs_of) for name in needed}
        self._generator = torch.Generator().manual_seed(self.settings.seed)

    @property
    def source(self) -> str:
        """The tensor that is fed."""
        return str(data_input(self.model).name) if self.start is None else self.start

    @one_thread_each()
    def pass_through(
        self, images: Tensor, stage: str, progress: Progress = silent, seen: Tensor | None = None
    ) -> None:
        """Run teacher and student through the network, and fit each layer on the way.

        Args:
            images: Inputs at `source`, (N, …).
            stage: Name of the stage, for `progress`.
            progress: Called with the stage, the nodes done and the nodes in all.
            seen: Inputs of the student at `source`, (N, …); None: the same.

        Raises:
            InputError: A tensor is not finite on these images.
            ModelError: A layer gives values that are not finite, or a tensor does not hold one image after
                the other.
        """
        self._count = count = self.affordable(len(images))
        self._teacher[self.source] = self._student[self.source] = images[:count]
        if seen is not None:
            self._student[self.source] = seen[:count]
        mapped = (*self.twin.weights, *self.twin.biases)
        self._maps = {n: self.twin.align(n, self.executor.parameters[n]) for n in mapped}
        self._own.update(self._maps)
        with torch.no_grad():
            for place, node in enumerate(self._nodes):
                self._step(node, self._needs_of[place])
                for tensor in [
                    t for t in self._teacher if self._last.get(t, -1) <= place and t != self.stop
                ]:
                    del self._teacher[tensor], self._student[tensor]
                progress(stage, place + 1, len(self._nodes))

    @abstractmethod
    def _fit_layer(self, layer: QuantizedLayer, x: Tensor, wanted: Tensor) -> None:
        """Fit the layer and `_set` its parameters. x: the student's input; wanted: the teacher's output."""

    def _seen(self, node: gs.Node, index: int, name: str) -> Tensor:
        """Return the student's tensor as the node reads it at that input."""
        return self._student[name]

    def _on_layer_fitted(self, layer: QuantizedLayer, wanted: Tensor, made: Tensor) -> None:
        """Take note of the outputs of teacher (`wanted`) and student (`made`) once the layer is fitted."""
        return

    def _step(self, node: gs.Node, needs: list[str]) -> None:
        outputs = [t.name for t in node.outputs if not t.is_empty()]
        layer = self.plan.layers.get(id(node))
        if layer is not None:
            self._check_finite(layer.linear.input_name)
        theirs = self._run(outputs, {n: self._teacher[n] for n in needs}, self._maps)
        if layer is not None and not _finite(theirs[outputs[0]]):
            raise ModelError(
                f"{self.model.name}: {node_label(node)!r} ({node.op}) gives values that are not finite; "
                "correct its weights, or the inputs"
            )
        read = {n: self._student[n] for n in needs}
        for index, tensor in enumerate(node.inputs):
            if tensor.name in read:
                read[tensor.name] = self._seen(node, index, tensor.name)
        if layer is not None:
            self._fit_layer(layer, read[layer.linear.input_name], theirs[outputs[0]])
        ours = theirs if self._alike(node, read) else self._run(outputs, read, self._own)
        self._teacher.update(theirs)
        self._student.update(ours)
        if layer is not None:
            self._on_layer_fitted(layer, theirs[outputs[0]], ours[outputs[0]])

    def _alike(self, node: gs.Node, read: dict[str, Tensor]) -> bool:
        """Return whether the student computes what the teacher did: nothing was changed up to here."""
        names = [t.name for t in node.inputs]
        return all(v is self._teacher[n] for n, v in read.items()) and all(
            self._own.get(n) is self._maps.get(n) for n in names
        )

    def _run(
        self, outputs: list[str], feeds: dict[str, Tensor], parameters: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Run batch by batch, each on one thread: sums of a convolution depend on the number of threads."""
        batches = {n: split_images(v, self._count, self.settings.batch) for n, v in feeds.items()}

        def run(index: int) -> dict[str, Tensor]:
            part = {n: of[index] for n, of in batches.items()}
            size = min(self.settings.batch, self._count - index * self.settings.batch)
            with torch.no_grad():  # of each thread
                made = self.executor.run(part, outputs, parameters)
            for name, value in made.items():
                if not value.ndim or len(value) % size:
                    raise ModelError(
                        f"{self.model.name}: tensor {name!r} of shape {list(value.shape)} does not hold one"
                        f" image after the other, of a batch of {size}: such networks are not handled"
                    )
            return made

        self.executor.needed(feeds, outputs)  # once, not by each thread
        parts = list(in_turn(run, len(next(iter(batches.values())))))
        return {n: torch.cat([part[n] for part in parts]) for n in outputs}

    def _check_finite(self, name: str) -> None:
        if not _finite(self._student[name]):
            raise InputError(f"tensor {name!r} is not finite on these images; check --preprocess")

    def _mean_error(self, layer: QuantizedLayer, x: Tensor, wanted: Tensor) -> Tensor:
        """Return the mean error of the fitted layer's output, (outputs,), without aligned statistics."""
        source = layer.linear.input_name
        made = self._run([layer.linear.output_name], {source: x}, self._own)[layer.linear.output_name]
        error = self._unmapped(layer, wanted) - self._unmapped(layer, made)
        return error.mean([axis for axis in range(error.ndim) if axis != 1])

    def _set(self, name: str, value: Tensor) -> None:
        self._own[name] = self.twin.align(name, value) if name in self._maps else value

    def _unmapped(self, layer: QuantizedLayer, y: Tensor, offset: bool = True) -> Tensor:
        """Return the layer's output without aligned statistics."""
        if layer.linear.bias_name not in self.twin.biases:
            return y
        scale, shift = (along(part, y) for part in self.twin.biases[layer.linear.bias_name])
        return (y - shift) / scale if offset else y / scale

    def _wanted(self, layer: QuantizedLayer, y: Tensor) -> Tensor:
        """Return the target of the layer: the teacher's output, and what the other side of a sum lost."""
        lost = self._owed(layer)
        y = self._unmapped(layer, y)
        return y if lost is None or lost.shape != y.shape else y + self._unmapped(layer, lost, offset=False)

    def _owed(self, layer: QuantizedLayer) -> Tensor | None:
        """Return what the other side of a residual addition lost, where nothing else reads the layer."""
        tensor = layer.linear.node.outputs[0]
        readers = value_readers(tensor)
        if len(readers) != 1 or is_output(self.model, tensor) or not is_op(readers[0], "Add"):
            return None
        others = [(i, t) for i, t in enumerate(readers[0].inputs) if t is not tensor]
        if len(others) != 1 or others[0][1].name not in self._student:
            return None
        index, other = others[0]
        return self._teacher[other.name] - self._seen(readers[0], index, other.name)

    def _moments(
        self, layer: QuantizedLayer, cut: Patches, weight: Tensor, x: Tensor, wanted: Tensor
    ) -> LayerMoments:
        """Return the moments of input patches, and their cross moments with the residual of the layer."""
        if layer.linear.bias_name is not None:
            wanted = wanted - along(self.executor.parameters[layer.linear.bias_name], wanted)
        reads, gives = (torch.split(t, self.settings.batch) for t in (x, wanted))
        places = [cut.places(wanted, self._generator, self.settings.places) for _ in reads]
        rows = max(ROWS, ROWS_EACH * weight.shape[2])
        enough = -(-rows // (self.settings.batch * len(places[0])))

        def moments_of(index: int) -> LayerMoments:
            own = LayerMoments.empty(weight)
            with torch.no_grad():  # of each thread
                a, y = cut.take(reads[index], gives[index], places[index])
                own.add(a, y - weight @ a)
            return own

        moments = LayerMoments.empty(weight)
        for own in in_turn(moments_of, min(len(reads), enough)):
            moments.merge(own)
        return moments

    def lost(self, name: str) -> Tensor:
        """Compute the student's error at a tensor, after the pass.

        Args:
            name: Name of a tensor that is still held: the one at which the pass stopped.

        Returns:
            The student's values less the teacher's, (N, …).
        """
        return self._student[name] - self._teacher[name]

    def affordable(self, count: int) -> int:
        """Count the images for which all tensors that are held at a time fit into MEMORY.

        Args:
            count: Images that there are.

        Returns:
            The number of images, a multiple of the batch that the file fixes.
        """
        live = live_floats(self.model, self._nodes, self._last, self.source)
        whole = fixed_batch(self.model)
        return max(1, min(count, MEMORY // (4 * COPIES * live)) // whole) * whole


def _finite(x: Tensor) -> bool:
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
