"""An ONNX graph run by torch: a pure function of parameters and inputs, differentiable.

    run(feeds, outputs, parameters) -> outputs

Feeds may name any tensor of the graph, so that a prefix that never changes can be computed once and fed;
outputs may name any tensor, and only the nodes between the two run. What depends on no input (constants,
the shape and pad computations that exporters leave) is computed once. Shape arithmetic stays on the host.

Floating types: with dtype=None each tensor has the model's own type. With a dtype given, all floating
tensors on the device have it: parameters, constants, feeds, and the results of casts to any floating type.
Under torch.autocast, feeds and parameters are taken as they are.

Operators without a kernel here (control flow, recurrent layers) are run in onnxruntime (`runtime_node`).

Does not handle: sequences (except for the pieces of a split), strings, training mode (except
BatchNormalization's, where it is asked for), custom domains, and element types that torch cannot compute
with (8-bit floats, 4-bit integers).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnxcompress.graph.reshape_targets import batch_free_targets
from onnxcompress.optimize.deterministic_threads import in_turn
from onnxcompress.optimize.device import autocast, laid_out
from onnxcompress.optimize.executor.ops.dtypes import convert
from onnxcompress.optimize.executor.ops.registry import ExecutionError, UnsupportedOp
from onnxcompress.optimize.executor.output_rows import OutputRows
from onnxcompress.optimize.executor.plan import Plan, Planner, Step
from onnxcompress.optimize.executor.program import Binding, Kind, Program, explained
from onnxcompress.optimize.executor.shape_feeds import ShapeFeeds

if TYPE_CHECKING:
    from onnxcompress.model import Model

__all__ = ["ExecutionError", "Executor", "Rows", "UnsupportedOp"]

OLDEST_OPSET = 7
T = TypeVar("T")


class Rows(Protocol):
    """Values of many images: a tensor, or a set of images that are normalized when they are read."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Tensor: ...


class Executor:
    """A graph as it is when the executor is made; later edits of the graph do not reach it.

    Several threads may run it at once.

    `parameters` has every floating initializer of rank 1 or more that a node reads as a tensor, by name, on
    `device`, in `dtype`, without gradient. Initializers read only as numbers (the scales of a Resize) and
    those of rank 0 are constants.
    """

    def __init__(
        self,
        graph: gs.Graph,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
        opset: int | None = None,
        targets: Mapping[int, np.ndarray] | None = None,
        training: bool = False,
    ) -> None:
        """Take a snapshot of the graph.

        Args:
            graph: The graph.
            device: Where tensors lie, except shape arithmetic.
            dtype: Type of all floating tensors; None: the model's own types.
            opset: Operator set of the graph, from 7; None: as the graph says.
            targets: Targets of Reshape nodes, by id of the node, in place of the constants that they read.
            training: Whether a BatchNormalization in training mode may run; its outputs depend on all of
                the batch.

        Raises:
            UnsupportedOp: The operator set is below 7. Operators that cannot be run raise only when a run
                needs them.
        """
        opset = int(graph.opset if opset is None else opset)
        if opset < OLDEST_OPSET:
            raise UnsupportedOp(
                f"the graph is of opset {opset}; {OLDEST_OPSET} and later can be run. "
                "Convert it with onnx.version_converter"
            )
        self.device, self.dtype = torch.device(device), dtype
        self._plans: dict[tuple[frozenset[str], tuple[str, ...]], Plan] = {}
        self._planning = threading.Lock()
        self._shape_feeds: ShapeFeeds | None = None
        # Tensors made under inference_mode could not take part in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            self._program = Program.of(graph, opset, training)
            self._program.reshape_to(targets or {})
            self._binding = Binding(self._program, self.device, dtype)
            self.parameters: dict[str, Tensor] = {
                name: laid_out(convert(value, self.device, dtype))
                for name, value in self._program.constants.items()
                if name in self._program.weights
            }

    @classmethod
    def from_model(
        cls,
        model: Model,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
        training: bool = False,
    ) -> Executor:
        """Make the executor of a model's graph.

        Targets of Reshape nodes hold for any number of images (`reshape_targets`).

        Args:
            model: The model.
            device: Where tensors lie, except shape arithmetic.
            dtype: Type of all floating tensors; None: the model's own types.
            training: Whether a BatchNormalization in training mode may run.

        Returns:
            The executor.

        Raises:
            UnsupportedOp: The operator set is below 7.
        """
        targets = batch_free_targets(model)
        executor = cls(
            model.graph, device=device, dtype=dtype, opset=model.opset, targets=targets, training=training
        )
        executor._shape_feeds = ShapeFeeds(executor._program, model, executor.run)
        return executor

    def run(
        self,
        feeds: Mapping[str, Tensor],
        outputs: Sequence[str],
        parameters: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Compute tensors of the graph from other tensors.

        Args:
            feeds: Name -> value of the tensors to start from.
            outputs: Names of the tensors to compute.
            parameters: Name -> value of initializers to replace.

        Returns:
            Name -> value of the outputs, on the device; results of shape arithmetic lie on the host.

        Raises:
            ExecutionError: A tensor is missing, or a node fails on its inputs.
            UnsupportedOp: A node that is needed cannot be run.
        """
        given = dict(feeds)
        replaced: Mapping[str, Tensor] = parameters or {}
        for name in replaced:
            if name not in self.parameters:  # a constant, for example of rank 0
                given[name] = replaced[name]
        if self._shape_feeds and (missing := self._shape_feeds.missing(given, outputs)):
            given |= self._shape_feeds.stand_ins(given, missing)
        plan = self._plan(given, outputs)
        if self._binding.fixed_shapes:
            self._check_shapes({**given, **replaced})
        dtype = None if self._autocast() else self.dtype
        values = plan.initial.copy()
        for name, slot, on_device in plan.fed:
            tensor = given[name]
            values[slot] = convert(tensor, self.device, dtype) if on_device else tensor.cpu()
        for name, slot in plan.parameters:
            tensor = replaced.get(name, self.parameters[name])
            values[slot] = convert(tensor, self.device, dtype)
        given.clear()
        _execute(plan.steps, values)
        return {name: values[slot] for name, slot in plan.outputs}

    def map_batches(
        self,
        feeds: Mapping[str, Rows],
        outputs: Sequence[str],
        work: Callable[[dict[str, Tensor]], T],
        *,
        count: int,
        batch: int,
        parameters: Mapping[str, Tensor] | None = None,
        mixed: bool = False,
    ) -> Generator[T, None, None]:
        """Run batch after batch, without gradients, and call a function on the outputs of each.

        Batches run beside each other, each on one thread, so results do not depend on the number of
        threads. No more outputs are held than batches are under way.

        Args:
            feeds: Name -> values of the tensors to start from, (count times the rows of an image, …).
            outputs: Names of the tensors to compute.
            work: Called with name -> value of the outputs of a batch; it may empty the mapping.
            count: Images that the feeds hold.
            batch: Images that run at once; the last batch may be smaller.
            parameters: Name -> value of initializers to replace.
            mixed: Whether to compute in the device's fast lower precision (`device.autocast`).

        Yields:
            What `work` returned, in the order of the batches.
        """

        def run(index: int) -> T:
            own = slice(index * batch, min((index + 1) * batch, count))
            part = {
                name: values[len(values) // count * own.start : len(values) // count * own.stop]
                for name, values in feeds.items()
            }
            with torch.no_grad():  # a setting of each thread
                if not mixed:
                    return work(self.run(part, outputs, parameters))
                with autocast(self.device):
                    return work(self.run(part, outputs, parameters))

        return in_turn(run, -(-count // batch), self.device)

    def run_batched(
        self,
        feeds: Mapping[str, Rows],
        outputs: Sequence[str],
        *,
        count: int,
        batch: int,
        parameters: Mapping[str, Tensor] | None = None,
        mixed: bool = False,
        kept_as: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Run batch after batch, without gradients, and collect the outputs.

        Each batch is copied to its place as soon as it is there, so hardly more than the results is held.

        Args:
            feeds: Name -> values of the tensors to start from, (count times the rows of an image, …).
            outputs: Names of the tensors to compute; each holds one image after the other.
            count: Images that the feeds hold.
            batch: Images that run at once; the last batch may be smaller.
            parameters: Name -> value of initializers to replace.
            mixed: Whether to compute in the device's fast lower precision (`device.autocast`).
            kept_as: Type in which outputs of floats are collected; None: their own.

        Returns:
            Name -> values of the outputs, (count times the rows of an image, …), on the device.

        Raises:
            ExecutionError: An output does not hold one image after the other.
        """
        rooms = {name: OutputRows(name, count, kept_as) for name in outputs}
        runs = self.map_batches(
            feeds, outputs, lambda made: made, count=count, batch=batch, parameters=parameters, mixed=mixed
        )
        for start, made in zip(range(0, count, batch), runs, strict=True):
            for name, room in rooms.items():
                room.place(made.pop(name), start, min(batch, count - start))
        return {name: room.values for name, room in rooms.items()}

    def needed(self, feeds: Iterable[str], outputs: Iterable[str]) -> list[gs.Node]:
        """List the nodes that `run` would compute, and plan that run.

        Args:
            feeds: Names of the tensors to start from.
            outputs: Names of the tensors to compute.

        Returns:
            The nodes in the order in which they would run.

        Raises:
            ExecutionError: A tensor is missing.
            UnsupportedOp: A node that is needed cannot be run.
        """
        given, wanted = frozenset(feeds), tuple(outputs)
        if self._shape_feeds:
            given |= frozenset(self._shape_feeds.missing(given, wanted))
        return [node.source for node in self._plan(given, wanted).nodes]

    def _autocast(self) -> bool:
        kind = self.device.type
        return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)

    def _check_shapes(self, replaced: Mapping[str, Tensor]) -> None:
        for name in self._binding.fixed_shapes.intersection(replaced):
            expected, got = self.parameters[name].shape, replaced[name].shape
            if expected != got:
                raise ExecutionError(
                    f"parameter {name!r}: shape {tuple(got)} cannot replace {tuple(expected)}, "
                    "which the graph uses in a constant"
                )

    def _plan(self, feeds: Iterable[str], outputs: Iterable[str]) -> Plan:
        key = (frozenset(feeds), tuple(outputs))
        with self._planning:
            return self._plans.get(key) or self._planned(key)

    def _planned(self, key: tuple[frozenset[str], tuple[str, ...]]) -> Plan:
        unknown = sorted(key[0] - self._program.names)
        if unknown:
            raise ExecutionError(f"no tensor of the graph is named {unknown[0]!r}")
        fed = frozenset(n for n in key[0] if self._is_constant(n))
        binding = Binding(self._program, self.device, self.dtype, fed) if fed else self._binding
        with torch.inference_mode(False), torch.no_grad():
            plan = self._plans[key] = Planner(binding, *key).build()
        return plan

    def _is_constant(self, name: str) -> bool:
        return self._binding.kinds.get(name) is Kind.CONSTANT


def _execute(steps: Sequence[Step], values: list[Any]) -> None:
    """Run the steps on the slots, in place."""
    step: Step | None = None
    arguments: list[Any] = []
    try:
        for step in steps:
            arguments = [values[slot] for slot in step.inputs]
            result = step.kernel(*arguments)
            if len(step.outputs) == 1:
                values[step.outputs[0]] = result
            else:
                for slot, value in zip(step.outputs, result, strict=False):
                    values[slot] = value
            for slot in step.free:
                values[slot] = None
    except Exception as error:
        if step is None:
            raise
        raise explained(error, step.node, arguments) from error
