"""The frame in which operators are written: a builder prepares a kernel for one node, once.

    builder(site) -> kernel            at planning: attributes, opset and constant inputs are resolved
    kernel(*inputs) -> Tensor          at each run, one argument per input of the node, None where omitted
                    -> tuple[Tensor]   where the node has two outputs or more

Inputs listed in `Op.static` are read as numbers (shapes, axes, pads, scales). They stay on the host in
the model's own type, so that reading them never waits for a device.
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
    """The graph needs an operator, or a use of one, that the executor does not have."""


class ExecutionError(CompressError):
    """A node could not be computed from the tensors it was given."""


@dataclass(frozen=True)
class Op:
    """How one operator is run.

    build: makes the kernel of a node; static: inputs read as numbers; host: the result depends on the
    shapes of the inputs only, and is computed on the host.
    """

    build: Callable[[Site], Kernel]
    static: tuple[int, ...] = ()
    host: bool = False


@dataclass(frozen=True)
class Site:
    """One node as its builder sees it.

    constants: value per input, None where it is omitted or known only at run time.
    dtype: type of all floating tensors here, None where the model's own types are kept.
    """

    name: str
    op: str
    domain: str
    opset: int
    attributes: Mapping[str, Any]
    present: tuple[bool, ...]
    constants: tuple[Tensor | None, ...]
    outputs: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype | None = None

    def has(self, index: int) -> bool:
        return index < len(self.present) and self.present[index]

    def constant(self, index: int) -> Tensor | None:
        return self.constants[index] if index < len(self.constants) else None

    def scalar(self, index: int) -> Any:
        """A constant input of one element as a Python number; None where it is not that."""
        value = self.constant(index)
        return value.item() if value is not None and value.numel() == 1 else None

    def integer(self, name: str, default: int = 0) -> int:
        return int(self.attributes.get(name, default))

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.attributes.get(name, default))

    def real(self, name: str, default: float = 0.0) -> float:
        return float(self.attributes.get(name, default))

    def text(self, name: str, default: str = "") -> str:
        return str(self.attributes.get(name, default))

    def integers(self, name: str) -> list[int] | None:
        value = self.attributes.get(name)
        return None if value is None else [int(v) for v in value]

    def numbers(self, index: int, attribute: str | None = None) -> Callable[[Arguments], Any]:
        """A reader of a list of numbers: from the attribute (older opsets), or from an input.

        The reader takes all arguments of the kernel. It returns None where nothing is given.
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
        """A reader of one number from an input, of `default` where it is omitted."""
        read = self.numbers(index)

        def first(arguments: Arguments) -> Any:
            values = read(arguments)
            return values[0] if values else default

        return first

    def unsupported(self, why: str) -> UnsupportedOp:
        return UnsupportedOp(
            f"node {self.name!r}: {self.op} (domain {self.domain or 'ai.onnx'!r}, opset {self.opset}) "
            f"cannot be run: {why}"
        )


def plain(function: Kernel) -> Op:
    """An operator without attributes whose kernel is `function` itself."""
    return Op(lambda site: function)


def axis_of(axis: int, rank: int) -> int:
    """`axis` counted from the front. Raises ExecutionError outside [-rank, rank)."""
    if not -rank <= axis < max(rank, 1):
        raise ExecutionError(f"axis {axis} is outside the {rank} dimensions of the tensor")
    return axis + rank if axis < 0 else axis


def axes_of(axes: Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """The axes counted from the front; all of them where None is given."""
    if axes is None:
        return tuple(range(rank))
    return tuple(axis_of(int(axis), rank) for axis in axes)


def take(x: Tensor, axis: int, indices: Sequence[int]) -> Tensor:
    """The slices of `x` along `axis` at `indices` (each in [0, size)), in that order."""
    return x.index_select(axis, torch.tensor(indices, dtype=torch.int64, device=x.device))
