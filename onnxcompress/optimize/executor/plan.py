"""Compile feeds and outputs to a flat list of steps over numbered slots."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from onnxcompress.optimize.executor.ops.dtypes import convert
from onnxcompress.optimize.executor.ops.registry import ExecutionError, Kernel
from onnxcompress.optimize.executor.program import Binding, Kind, Node


@dataclass
class Step:
    """One call of a kernel: the slots of its inputs (0 holds None) and outputs, and those that it frees."""

    kernel: Kernel
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    node: Node
    free: tuple[int, ...] = ()


@dataclass
class Plan:
    """A compiled run. `initial` holds the constants; the other slots are filled at each run."""

    steps: list[Step] = field(default_factory=list)
    initial: list[Any] = field(default_factory=lambda: [None])
    fed: list[tuple[str, int, bool]] = field(default_factory=list)
    """Name, slot, and whether the tensor lives on the device."""
    parameters: list[tuple[str, int]] = field(default_factory=list)
    """Name and slot."""
    outputs: list[tuple[str, int]] = field(default_factory=list)
    """Name and slot."""
    nodes: list[Node] = field(default_factory=list)


class Planner:
    """Builds one plan; slots are assigned to (tensor, on device) pairs as the steps are laid out."""

    def __init__(self, binding: Binding, feeds: frozenset[str], outputs: tuple[str, ...]) -> None:
        self.binding, self.feeds, self.wanted = binding, feeds, outputs
        self.plan = Plan()
        self.slots: dict[tuple[str, bool], int] = {}

    def build(self) -> Plan:
        """Compile the plan.

        Returns:
            The plan.

        Raises:
            ExecutionError: A tensor that is needed is neither fed nor computed.
            UnsupportedOp: A node that is needed cannot be run.
        """
        binding, program = self.binding, self.binding.program
        binding.fold(self._ancestors(past_constants=True))
        needed = sorted(self._ancestors(past_constants=False))
        for name in sorted(self.feeds):
            on_device = binding.kinds.get(name, Kind.DEVICE) is Kind.DEVICE
            self.plan.fed.append((name, self._new_slot((name, on_device)), on_device))
        for at in needed:
            self._add(at, program.nodes[at])
        for name in self.wanted:
            self.plan.outputs.append((name, self._argument(name, None)))
        self.plan.nodes = [program.nodes[at] for at in needed]
        self._free_slots()
        return self.plan

    def _ancestors(self, past_constants: bool) -> set[int]:
        """Collect the nodes that the outputs need, by index, stopping at feeds (and at known constants)."""
        program, values = self.binding.program, self.binding.values
        found: set[int] = set()
        pending = [(name, "") for name in self.wanted]
        while pending:
            name, reader = pending.pop()
            if name in self.feeds:
                continue
            at = program.producer.get(name)
            if at is None:
                if name not in values:
                    raise self._missing(name, reader)
            elif at not in found and (past_constants or name not in values):
                found.add(at)
                node = program.nodes[at]
                pending.extend((source, node.name) for source in node.inputs if source)
        return found

    def _missing(self, name: str, reader: str) -> ExecutionError:
        if not reader and name not in self.binding.program.names:
            return ExecutionError(f"no tensor of the graph is named {name!r}")
        place = f"node {reader!r} needs it" if reader else "it was asked for"
        return ExecutionError(f"tensor {name!r} has no value ({place}); feed it, or a tensor after it")

    def _new_slot(self, key: tuple[str, bool], value: Any = None) -> int:
        self.plan.initial.append(value)
        self.slots[key] = len(self.plan.initial) - 1
        return self.slots[key]

    def _argument(self, name: str, on_device: bool | None) -> int:
        """Return the slot of a tensor on the device or the host (None: where it lives)."""
        if not name:
            return 0
        binding = self.binding
        kind = binding.kinds.get(name, Kind.DEVICE)
        if on_device is None:
            on_device = kind is not Kind.HOST
        if (name, on_device) in self.slots:
            return self.slots[name, on_device]
        if name not in self.feeds and kind is Kind.CONSTANT:
            value = binding.values[name]
            if on_device:
                value = convert(value, binding.device, binding.dtype)
            return self._new_slot((name, on_device), value)
        if name not in self.feeds and name in binding.values:
            slot = self._new_slot((name, True))
            self.plan.parameters.append((name, slot))
            return slot
        # The tensor was computed, or fed, at the other place.
        source = self.slots[name, not on_device]
        if not on_device:
            return source  # read as a shape or as a number: any place will do
        slot = self._new_slot((name, True))
        device, dtype = binding.device, binding.dtype
        node = binding.program.nodes[binding.program.producer[name]]
        step = Step(lambda x: convert(x, device, dtype), (source,), (slot,), node)
        self.plan.steps.append(step)
        return slot

    def _add(self, at: int, node: Node) -> None:
        binding = self.binding
        kernel = binding.kernel(at)
        on_device = any(binding.kinds[name] is Kind.DEVICE for name in node.outputs if name)
        shape_only = node.definition is not None and node.definition.host
        inputs = []
        for index, name in enumerate(node.inputs):
            if name and binding.is_number(node, index) and name not in self.feeds:
                inputs.append(self._number(name))
            elif shape_only or node.is_static(index):
                inputs.append(self._argument(name, None))
            else:
                inputs.append(self._argument(name, on_device))
        outputs = tuple(
            self._new_slot((name, on_device)) if name else self._new_slot((f"{at}:{i}", on_device))
            for i, name in enumerate(node.outputs)
        )
        self.plan.steps.append(Step(kernel, tuple(inputs), outputs, node))

    def _number(self, name: str) -> int:
        """Return the slot of an initializer as it is in the model, on the host."""
        key = (name, False)
        return self.slots[key] if key in self.slots else self._new_slot(key, self.binding.values[name])

    def _free_slots(self) -> None:
        """Free each computed or fed tensor after the last step that reads it."""
        keep: set[int] = {slot for _, slot in self.plan.outputs} | {0}
        keep.update(slot for _, slot in self.plan.parameters)
        keep.update(i for i, value in enumerate(self.plan.initial) if value is not None)
        seen: set[int] = set()
        for step in reversed(self.plan.steps):
            touched: Collection[int] = {*step.inputs, *step.outputs} - keep - seen
            step.free = tuple(sorted(touched))
            seen.update(touched)
