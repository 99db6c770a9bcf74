"""A snapshot of a graph for the executor: nodes in order, constants, and where each tensor lives.

Each tensor is one of three kinds, determined once for the whole graph:

    constant   depends on no input; computed once, on the host, in the model's own types
    host       depends only on the shapes of tensors; computed on the host at each run, in the model's own
               types, so that shape arithmetic neither waits for a device nor is rounded
    device     everything else, in the executor's floating type
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from graphlib import CycleError
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnxcompress.graph.order import topological_order
from onnxcompress.graph.query import read
from onnxcompress.optimize.executor import ops
from onnxcompress.optimize.executor.ops.dtypes import tensor_from
from onnxcompress.optimize.executor.ops.registry import ExecutionError, Kernel, Op, Site, UnsupportedOp
from onnxcompress.optimize.executor.runtime_node import captured, runtime_kernel


class Kind(enum.Enum):
    """Where a tensor lives, and when it is computed."""

    CONSTANT = "constant"
    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True)
class Node:
    """A node at the time of the snapshot; tensors are named, so that later edits do not reach it."""

    source: gs.Node
    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    """Inputs, and behind them what the bodies of If, Loop and Scan capture; "": left out."""
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @property
    def definition(self) -> Op | None:
        """How the operator is run; None where onnxruntime has to run it, if it can."""
        return ops.definition(self.domain, self.op)

    def is_static(self, index: int) -> bool:
        """Return whether an input is read as numbers (a shape, axes, scales).

        Args:
            index: Position of the input.

        Returns:
            Whether the operator declares it static.
        """
        definition = self.definition
        return definition is not None and index in definition.static


@dataclass
class Program:
    """The nodes of a graph in topological order, and its initializers on the host."""

    nodes: list[Node]
    producer: dict[str, int]
    constants: dict[str, Tensor]
    """Initializers in the model's own types."""
    weights: frozenset[str]
    """Names of the initializers that are parameters."""
    names: frozenset[str]
    opset: int
    domains: Mapping[str, int]
    """Versions of the operator sets that the graph names, by domain."""
    training: bool = False
    """Whether nodes in training mode may run."""

    @staticmethod
    def of(graph: gs.Graph, opset: int, training: bool = False) -> Program:
        """Take a snapshot of a graph.

        Args:
            graph: The graph.
            opset: Its operator set.
            training: Whether nodes in training mode may run.

        Returns:
            The snapshot.

        Raises:
            ExecutionError: The graph has a cycle.
        """
        nodes = _in_order([_snapshot(node) for node in graph.nodes])
        producer = {name: i for i, node in enumerate(nodes) for name in node.outputs if name}
        constants: dict[str, Tensor] = {}
        weights: set[str] = set()
        for name, (constant, only_static) in _initializers(graph, nodes).items():
            value = tensor_from(read(constant))
            if value is None:
                continue  # reported as missing if a node that runs needs it
            constants[name] = value
            if value.is_floating_point() and value.ndim >= 1 and not only_static:
                weights.add(name)
        names = {*producer, *constants, *(tensor.name for tensor in graph.inputs)}
        domains = {entry.domain: entry.version for entry in graph.import_domains or ()}
        return Program(
            nodes, producer, constants, frozenset(weights), frozenset(names), opset, domains, training
        )

    def reshape_to(self, targets: Mapping[int, np.ndarray]) -> None:
        """Give Reshape nodes constant targets.

        Args:
            targets: id of the node in the graph -> its target shape.
        """
        for at, node in enumerate(self.nodes):
            if id(node.source) in targets:
                name = f"onnxcompress.target.{node.outputs[0]}"
                self.constants[name] = torch.from_numpy(targets[id(node.source)])
                self.nodes[at] = replace(node, inputs=(node.inputs[0], name))


def _snapshot(node: gs.Node) -> Node:
    inputs, outputs = [t.name for t in node.inputs], [t.name for t in node.outputs]
    while inputs and not inputs[-1]:
        inputs.pop()
    while outputs and not outputs[-1]:
        outputs.pop()
    name = node.name or (outputs[0] if outputs else "")
    attributes = {k: list(v) if isinstance(v, list) else v for k, v in node.attrs.items()}
    reads = (*inputs, *captured(node))
    return Node(node, name, node.op, node.domain or "", reads, tuple(outputs), attributes)


def _in_order(nodes: list[Node]) -> list[Node]:
    """Sort topologically, keeping the file's order where it is one. Raises ExecutionError on a cycle."""
    maker_of = {name: place for place, node in enumerate(nodes) for name in node.outputs if name}
    waits = [[maker_of[name] for name in node.inputs if name in maker_of] for node in nodes]
    try:
        return [nodes[place] for place in topological_order(waits)]
    except CycleError as error:
        name = nodes[error.args[1][0]].name
        raise ExecutionError(f"node {name!r}: the graph has a cycle through it") from error


def _initializers(graph: gs.Graph, nodes: Iterable[Node]) -> dict[str, tuple[gs.Constant, bool]]:
    """Collect the used initializers, with whether all uses read them as numbers (shapes, scales)."""
    found: dict[str, tuple[gs.Constant, bool]] = {}
    for node in nodes:
        for index, tensor in enumerate(node.source.inputs):
            if isinstance(tensor, gs.Constant):
                static = node.is_static(index) and found.get(tensor.name, (None, True))[1]
                found[tensor.name] = (tensor, static)
    for tensor in graph.outputs:
        if isinstance(tensor, gs.Constant):
            found[tensor.name] = (tensor, False)
    return found


@dataclass
class Binding:
    """A program for a fixed set of constants: kinds of tensors, folded values, kernels."""

    program: Program
    device: torch.device
    dtype: torch.dtype | None
    fed: frozenset[str] = frozenset()
    """Names of constants whose values are fed at run time instead; usually none."""
    values: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    fixed_shapes: set[str] = field(default_factory=set)
    """Weights whose shape enters a constant; only weights of equal shape can replace them."""
    _kernels: dict[int, Kernel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.program.constants.items():
            if name not in self.fed:
                self.values[name] = value
                weight = name in self.program.weights
                self.kinds[name] = Kind.DEVICE if weight else Kind.CONSTANT
        for node in self.program.nodes:
            kind = self._kind_of(node)
            for name in node.outputs:
                self.kinds[name] = Kind.DEVICE if name in self.fed else kind

    def _kind_of(self, node: Node) -> Kind:
        definition = node.definition
        if definition is None:
            return Kind.DEVICE
        if definition.host and self.program.weights.issuperset(node.inputs):
            self.fixed_shapes.update(node.inputs)
            return Kind.CONSTANT
        kinds = {
            Kind.CONSTANT if self.is_number(node, i) else self.kinds.get(name, Kind.DEVICE)
            for i, name in enumerate(node.inputs)
            if name
        }
        if kinds <= {Kind.CONSTANT}:
            return Kind.CONSTANT
        return Kind.HOST if definition.host or Kind.DEVICE not in kinds else Kind.DEVICE

    def is_number(self, node: Node, index: int) -> bool:
        """Return whether an input is an initializer read as numbers, which no parameter can replace.

        Args:
            node: The node.
            index: Position of the input.

        Returns:
            Whether it is.
        """
        return node.is_static(index) and node.inputs[index] in self.values

    def fold(self, indices: Collection[int]) -> None:
        """Compute the constants that nodes yield, once, on the host.

        Args:
            indices: Indices of the nodes.

        Raises:
            ExecutionError: A node fails on its inputs.
            UnsupportedOp: A node cannot be run.
        """
        for at in sorted(indices):
            node = self.program.nodes[at]
            if not all(self.kinds[name] is Kind.CONSTANT for name in node.outputs if name):
                continue
            if all(name in self.values for name in node.outputs if name):
                continue
            arguments = [self.values[name] if name else None for name in node.inputs]
            result = call(node, self.kernel(at), arguments)
            results = result if isinstance(result, tuple) else (result,)
            self.values.update(zip(node.outputs, results, strict=False))

    def kernel(self, at: int) -> Kernel:
        """Prepare the kernel of a node, once.

        Args:
            at: Index of the node.

        Returns:
            The kernel.

        Raises:
            UnsupportedOp: The node cannot be run.
        """
        if at not in self._kernels:
            node = self.program.nodes[at]
            site = self._site(node)
            definition = node.definition
            if definition is None:
                domains = self.program.domains
                self._kernels[at] = runtime_kernel(node.source, site, node.inputs, domains)
            else:
                self._kernels[at] = definition.build(site)
        return self._kernels[at]

    def _site(self, node: Node) -> Site:
        on_device = any(self.kinds[name] is Kind.DEVICE for name in node.outputs if name)
        known = [
            self.values.get(name)
            if self.kinds.get(name) is Kind.CONSTANT or self.is_number(node, i)
            else None
            for i, name in enumerate(node.inputs)
        ]
        return Site(
            name=node.name,
            op=node.op,
            domain=node.domain,
            opset=self.program.opset,
            attributes=_attributes(node.attributes),
            present=tuple(bool(name) for name in node.inputs),
            constants=tuple(known),
            outputs=len(node.outputs),
            device=self.device if on_device else torch.device("cpu"),
            dtype=self.dtype if on_device else None,
            training=self.program.training,
        )


def _attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: read(value) if isinstance(value, gs.Constant) else value for key, value in attributes.items()
    }


def call(node: Node, kernel: Kernel, arguments: list[Any]) -> Any:
    """Run one kernel.

    Args:
        node: Its node.
        kernel: The kernel.
        arguments: One value for each input of the node.

    Returns:
        The output, or a tuple where the node has several.

    Raises:
        ExecutionError: The kernel fails; the message has the node's name and the shapes of its inputs.
        UnsupportedOp: The kernel refuses this use of the operator.
    """
    try:
        return kernel(*arguments)
    except Exception as error:
        raise explained(error, node, arguments) from error


def explained(error: Exception, node: Node, arguments: list[Any]) -> Exception:
    """Turn an error of a kernel into the error to raise.

    Args:
        error: The error of the kernel.
        node: Its node.
        arguments: The values on which the kernel was called.

    Returns:
        An ExecutionError with the node's name and the shapes of its inputs, or `error` itself where it is
        an UnsupportedOp or the device is out of memory.
    """
    if isinstance(error, (UnsupportedOp, torch.OutOfMemoryError)):
        return error
    shapes = ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else "-" for a in arguments)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ExecutionError(
        f"node {node.name!r} ({node.op}) cannot be computed from shapes {shapes}: {reason}"
    )
