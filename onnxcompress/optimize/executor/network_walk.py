"""A walk through teacher and student, node by node on the same inputs, in bounded memory.

    teacher:  x ─ node ─ node ─> t
    student:  x̂ ─ node ─ node ─> y        other parameters, or without some of the nodes

Images go in batches, and of each batch only the tensors that a later node needs are held: a tensor is freed
as soon as the batch has passed its last reader. As long as both networks read the same tensors with the
same parameters, they share the results.

Where tensors are large, not all images are held. The nodes between two places at which the tensors of all
images fit into memory are a section: as many batches as fit go through it node by node (these are what a
subclass fits on), and the others follow, each through the whole section at once. So the first layers of a
network are fitted on fewer images than the last ones, which have far fewer places in each image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import ClassVar, TypeVar

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnxcompress.errors import ModelError
from onnxcompress.graph.query import data_input
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.deterministic_threads import in_turn
from onnxcompress.optimize.device import release_memory
from onnxcompress.optimize.executor.executor import Executor
from onnxcompress.optimize.executor.walk_plan import Section, Step, plan_steps, sections
from onnxcompress.progress import Progress, silent

T = TypeVar("T")


@dataclass(eq=False)
class Batch:
    """Some images, with their tensors that later nodes need, by name."""

    images: int
    teacher: dict[str, Tensor]
    student: dict[str, Tensor]


@dataclass
class NetworkWalk:
    """One walk from a network's input, or a tensor of its trunk, to another tensor of the trunk.

    A subclass says what is done at a node (`visit`), and how the student reads a tensor (`read`).
    """

    model: Model
    """The teacher, with one input."""
    _: KW_ONLY
    student: Model | None = None
    """The same network without some of its nodes; None: with all of them."""
    start: str | None = None
    """Name of the tensor of the trunk that is fed; None: the network's one input."""
    stop: str | None = None
    """Name of the tensor of the trunk at which the walk ends; None: the end of the network."""
    batch: int = 32
    """Images that run at once."""
    device: str = "cpu"
    networks: ClassVar[int] = 2
    """Networks whose tensors differ; 1: the student is the teacher to the end."""

    def __post_init__(self) -> None:
        self.executor = Executor.from_model(self.model, device=self.device)
        self.topology = self.model.analysis(Topology)
        self.own_executor, own = self.executor, self.topology
        if self.student is not None:
            self.own_executor = Executor.from_model(self.student, device=self.device)
            own = self.student.analysis(Topology)
        self.steps = plan_steps(self.model, self.topology, own, self.start, self.stop)
        self.maps: dict[str, Tensor] = {}
        """Parameters of both networks that differ from the file's."""
        self.own: dict[str, Tensor] = {}
        """Parameters of the student that differ from the file's."""
        self.batches: list[Batch] = []
        """The batches that go node by node now."""
        self.all_batches: list[Batch] = []

    @property
    def source(self) -> str:
        """The tensor that is fed."""
        return str(data_input(self.model).name) if self.start is None else self.start

    def visit(self, step: Step) -> None:
        """Run a node of both networks for the batches that go node by node.

        Args:
            step: The node.
        """
        self.each(lambda batch: self.advance(step, batch))

    def read(self, node: gs.Node, index: int, value: Tensor) -> Tensor:
        """Return a tensor of the student as its node reads it.

        Args:
            node: The student's node.
            index: Place among its inputs.
            value: The tensor.

        Returns:
            What is read, of the same shape.
        """
        return value

    def teacher_value(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """Return what the student should have of a tensor of the teacher.

        Args:
            name: Name of the tensor.
            values: The teacher's tensors.

        Returns:
            The tensor; a subclass whose student lacks channels leaves these out.
        """
        return values[name]

    def alters(self, node: gs.Node) -> bool:
        """Return whether `read` changes anything that a node reads.

        Args:
            node: The student's node.

        Returns:
            False in this class.
        """
        return False

    def pass_through(
        self, images: Tensor, stage: str, progress: Progress = silent, seen: Tensor | None = None
    ) -> None:
        """Go through the network.

        Args:
            images: Inputs at `source`, (N, …).
            stage: Name of the stage, for `progress`.
            progress: Called with the stage, the nodes done and the nodes in all.
            seen: Inputs of the student at `source`, (N, …); None: the same.

        Raises:
            ModelError: A tensor does not hold one image after the other.
        """
        for done, _ in enumerate(self.go(images, seen), 1):
            progress(stage, done, len(self.steps))

    def go(self, images: Tensor, seen: Tensor | None = None) -> Iterator[Step]:
        """Go through the network as `pass_through` does, node by node.

        Args:
            images: Inputs at `source`, (N, …).
            seen: Inputs of the student at `source`, (N, …); None: the same.

        Yields:
            Each node once it was visited.

        Raises:
            ModelError: A tensor does not hold one image after the other.
        """
        count = len(images)
        self.all_batches = self.split(images, images if seen is None else seen)
        for section in sections(self.steps, count, self.networks):
            many = section.images // self.batch if section.images < count else len(self.all_batches)
            self.batches = self.all_batches[: max(1, many)]
            for step in section.steps:
                self.visit(step)
                yield step
            if section.steps[-1].behind:
                self.each(partial(self._follow, section), self.all_batches[len(self.batches) :])
        release_memory()

    def each(self, work: Callable[[Batch], T], batches: Sequence[Batch] | None = None) -> list[T]:
        """Call a function for each of the batches that go node by node, some beside each other.

        Args:
            work: Called with a batch, without gradients.
            batches: Other batches to go through.

        Returns:
            The results in the order of the batches.
        """
        through = self.batches if batches is None else batches

        def run(index: int) -> T:
            with torch.no_grad():  # a setting of each thread
                return work(through[index])

        return list(in_turn(run, len(through), self.device))

    def advance(self, step: Step, batch: Batch) -> None:
        """Run a node of both networks on a batch.

        Args:
            step: The node.
            batch: The batch; what no later node needs is freed.
        """
        alike = self.reads_alike(step, batch)
        self.run_teacher(step, batch)
        self.run_student(step, batch, alike)
        self.finish(step, batch)

    def reads_alike(self, step: Step, batch: Batch) -> bool:
        """Return whether the student's node reads what the teacher's does: nothing differed up to here.

        Args:
            step: The node.
            batch: A batch in front of it.

        Returns:
            Whether both read the very same tensors.
        """
        own = step.own
        if own is None or step.own_reads != step.reads or self.alters(own):
            return False
        return all(batch.student[name] is batch.teacher[name] for name in step.reads)

    def run_teacher(self, step: Step, batch: Batch) -> None:
        """Run a node of the teacher, and free what it alone still needed.

        Args:
            step: The node.
            batch: The batch, whose tensors change.
        """
        feeds = {name: batch.teacher[name] for name in step.reads}
        for name in step.done.intersection(feeds):
            del batch.teacher[name]
        batch.teacher |= self._run(self.executor, feeds, step.outputs, self.maps, batch.images)

    def run_student(self, step: Step, batch: Batch, alike: bool = False) -> None:
        """Run a node of the student, and free what it alone still needed.

        Args:
            step: The node.
            batch: The batch, whose tensors change.
            alike: Whether it reads what the teacher's node does.
        """
        if step.own is None:
            return
        alike &= all(self.own.get(t.name) is self.maps.get(t.name) for t in step.own.inputs)
        feeds = {} if alike else {n: self._read(step.own, batch, n) for n in step.own_reads}
        for name in step.own_done.intersection(step.own_reads):
            del batch.student[name]
        if alike:
            batch.student |= {name: batch.teacher[name] for name in step.outputs}
        else:
            batch.student |= self._run(self.own_executor, feeds, step.outputs, self.own, batch.images)

    def finish(self, step: Step, batch: Batch) -> None:
        """Free what no later node needs, once both networks have run the node.

        Args:
            step: The node.
            batch: The batch, whose tensors change.
        """
        for name in step.done:
            batch.teacher.pop(name, None)
        for name in step.own_done:
            batch.student.pop(name, None)

    def _follow(self, section: Section, batch: Batch) -> None:
        for step in section.steps:
            self.advance(step, batch)

    def _read(self, node: gs.Node, batch: Batch, name: str) -> Tensor:
        """Return a tensor of the student as the node reads it."""
        places = [index for index, tensor in enumerate(node.inputs) if tensor.name == name]
        value = batch.student[name]
        return self.read(node, places[-1], value) if places else value

    def split(self, images: Tensor, seen: Tensor) -> list[Batch]:
        """Split the inputs into batches.

        Args:
            images: Inputs of the teacher, (N, …).
            seen: Inputs of the student; where it is `images`, both share the parts.

        Returns:
            The batches in order.
        """
        batches = []
        for start in range(0, len(images), self.batch):
            theirs = images[start : start + self.batch].to(self.device)
            ours = theirs if seen is images else seen[start : start + self.batch].to(self.device)
            batches.append(Batch(len(theirs), {self.source: theirs}, {self.source: ours}))
        return batches

    def _run(
        self,
        executor: Executor,
        feeds: dict[str, Tensor],
        outputs: list[str],
        parameters: dict[str, Tensor],
        images: int,
    ) -> dict[str, Tensor]:
        made = executor.run(feeds, outputs, parameters)
        for name, value in made.items():
            rows = isinstance(value, Tensor)  # pieces of a Split are not looked at
            if rows and images > 1 and (not value.ndim or len(value) % images):
                raise ModelError(
                    f"{self.model.name}: tensor {name!r} of shape {list(value.shape)} does not hold one "
                    f"image after the other, of a batch of {images}: such networks are not handled"
                )
        return made
