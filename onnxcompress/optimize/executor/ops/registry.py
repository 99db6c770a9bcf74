"""The interface of operators: a builder prepares a kernel for one node, once.

    builder(site) -> kernel            at planning: attributes, opset and constant inputs are resolved
    kernel(*inputs) -> Tensor          at each run, one argument per input of the node, None where omitted
                    -> tuple[Tensor]   where the node has two outputs or more

The modules of `ops` name their builders after the operator, and define the kernels inside them; both have
these signatures, which their docstrings do not repeat. A builder raises UnsupportedOp for a use of the
operator that it does not cover.

Inputs listed in `Op.static` are read as numbers (shapes, axes, pads, scales). They stay on the host in the
model's own type, so that reading them never waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from onnxcompress.errors import CompressError

Kernel = Callable[..., Any]
Arguments = Sequence[Any]


class UnsupportedOp(CompressError):
    """The graph needs an operator, or a use of one, that the executor cannot run."""


class ExecutionError(CompressError):
    """A node cannot be computed from its inputs."""


@dataclass(frozen=True)
class Op:
    """How one operator is run."""

    build: Callable[[Site], Kernel]
    """Makes the kernel of a node."""
    static: tuple[int, ...] = ()
    """Positions of the inputs that are read as numbers."""
    host: bool = False
    """Whether the result depends only on the shapes of the inputs, and is computed on the host."""


@dataclass(frozen=True)
class Site:
    """One node as its builder sees it."""

    name: str
    op: str
    domain: str
    opset: int
    attributes: Mapping[str, Any]
    present: tuple[bool, ...]
    constants: tuple[Tensor | None, ...]
    """Value of each input; None where it is omitted or known only at run time."""
    outputs: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype | None = None
    """Type of all floating tensors here; None: the model's own types."""
    training: bool = False
    """Whether nodes in training mode may run."""

    def has(self, index: int) -> bool:
        """Return whether an input is given.

        Args:
            index: Position of the input.

        Returns:
            Whether it is.
        """
        return index < len(self.present) and self.present[index]

    def constant(self, index: int) -> Tensor | None:
        """Return an input that is known at planning.

        Args:
            index: Position of the input.

        Returns:
            Its value; None where it is omitted or known only at run time.
        """
        return self.constants[index] if index < len(self.constants) else None

    def scalar(self, index: int) -> Any:
        """Return a constant input of one element as a Python number.

        Args:
            index: Position of the input.

        Returns:
            The number; None where the input is not such a constant.
        """
        value = self.constant(index)
        return value.item() if value is not None and value.numel() == 1 else None

    def integer(self, name: str, default: int = 0) -> int:
        """Read an integer attribute.

        Args:
            name: Name of the attribute.
            default: Its value where it is absent.

        Returns:
            The value.
        """
        return int(self.attributes.get(name, default))

    def flag(self, name: str, default: bool = False) -> bool:
        """Read a boolean attribute.

        Args:
            name: Name of the attribute.
            default: Its value where it is absent.

        Returns:
            The value.
        """
        return bool(self.attributes.get(name, default))

    def real(self, name: str, default: float = 0.0) -> float:
        """Read a floating-point attribute.

        Args:
            name: Name of the attribute.
            default: Its value where it is absent.

        Returns:
            The value.
        """
        return float(self.attributes.get(name, default))

    def text(self, name: str, default: str = "") -> str:
        """Read a text attribute.

        Args:
            name: Name of the attribute.
            default: Its value where it is absent.

        Returns:
            The value.
        """
        return str(self.attributes.get(name, default))

    def integers(self, name: str) -> list[int] | None:
        """Read an attribute that lists integers.

        Args:
            name: Name of the attribute.

        Returns:
            The values; None where it is absent.
        """
        value = self.attributes.get(name)
        return None if value is None else [int(v) for v in value]

    def numbers(self, index: int, attribute: str | None = None) -> Callable[[Arguments], Any]:
        """Make a reader of a list of numbers, from an attribute (older opsets) or from an input.

        Args:
            index: Position of the input.
            attribute: Name of the attribute, which takes precedence.

        Returns:
            A function of all arguments of the kernel that returns the list; None where neither is given.
        """
        if attribute is not None and attribute in self.attributes:
            fixed: Any = list(self.attributes[attribute])
        elif not self.has(index):
            fixed = None
        elif (value := self.constant(index)) is not None:
            fixed = value.reshape(-1).tolist()
        else:
            return lambda arguments: arguments[index].reshape(-1).tolist()
        return lambda arguments: fixed

    def number(self, index: int, default: Any = None) -> Callable[[Arguments], Any]:
        """Make a reader of one number from an input.

        Args:
            index: Position of the input.
            default: The number where the input is omitted.

        Returns:
            A function of all arguments of the kernel that returns the number.
        """
        read = self.numbers(index)

        def first(arguments: Arguments) -> Any:
            values = read(arguments)
            return values[0] if values else default

        return first

    def unsupported(self, why: str) -> UnsupportedOp:
        """Make the error for a use of the operator that is not covered.

        Args:
            why: The reason, to follow "cannot be run:".

        Returns:
            The error, to be raised.
        """
        return UnsupportedOp(
            f"node {self.name!r}: {self.op} (domain {self.domain or 'ai.onnx'!r}, opset {self.opset}) "
            f"cannot be run: {why}"
        )


def plain(function: Kernel) -> Op:
    """Define an operator without attributes.

    Args:
        function: Its kernel.

    Returns:
        The operator.
    """
    return Op(lambda site: function)


def axis_of(axis: int, rank: int) -> int:
    """Count an axis from the front.

    Args:
        axis: The axis, in [-rank, rank).
        rank: Number of axes.

    Returns:
        The axis, in [0, rank).

    Raises:
        ExecutionError: It is out of range.
    """
    if not -rank <= axis < max(rank, 1):
        raise ExecutionError(f"axis {axis} is outside the {rank} dimensions of the tensor")
    return axis + rank if axis < 0 else axis


def axes_of(axes: Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Count axes from the front.

    Args:
        axes: The axes, each in [-rank, rank); None: all.
        rank: Number of axes.

    Returns:
        The axes, each in [0, rank).

    Raises:
        ExecutionError: One is out of range.
    """
    if axes is None:
        return tuple(range(rank))
    return tuple(axis_of(int(axis), rank) for axis in axes)


def take(x: Tensor, axis: int, indices: Sequence[int]) -> Tensor:
    """Select slices along an axis.

    Args:
        x: The tensor.
        axis: The axis.
        indices: Positions along it, each in [0, size).

    Returns:
        The slices, in the order of the indices.
    """
    return x.index_select(axis, torch.tensor(indices, dtype=torch.int64, device=x.device))
