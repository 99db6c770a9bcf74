"""A card where there is none: tensors with real values on the CPU that say they lie on `cuda:0`.

    with pretended_card():
        torch.ones(3, device="cuda") + torch.ones(3)     RuntimeError, as on a card

As torch's FakeTensorMode it raises where tensors of two devices meet, and where one is read as a NumPy
array without a copy to the CPU. Unlike there, values are computed, so code that decides by them runs, too.
Does not show: what does not fit the memory, precision, streams, and operators that CUDA lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")
ATEN = torch.ops.aten
INDEXED = (
    ATEN.index.Tensor,
    ATEN.index_put.default,
    ATEN.index_put_.default,
    ATEN._index_put_impl_.default,
)
"""Operators whose indices may lie on the CPU while the values lie on the card, not the other way round."""
MEMORY = 8 << 30


class OnCard(Tensor):
    """A tensor of the pretended card; `value` holds what is in it."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> OnCard:
        return Tensor._make_subclass(cls, value.detach(), value.requires_grad)

    def __init__(self, value: Tensor) -> None:
        self.value = value

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CARD

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return _downloaded(self)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype)
        device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
        values = _downloaded(self) if device is not None and device.type == "cpu" else self
        kept: dict[str, Any] = {} if form is None else {"memory_format": form}
        return Tensor.to(values, dtype=dtype or self.dtype, copy=kwargs.get("copy", False), **kept)

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().detach().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.value.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCard({self.value})"


class _Download(torch.autograd.Function):
    """The copy from the card to the CPU: torch itself takes both for the CPU, and would copy nothing."""

    @staticmethod
    def forward(ctx: Any, x: OnCard) -> Tensor:
        return x.value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return OnCard(gradients[0])


def _downloaded(x: OnCard) -> Tensor:
    copy: Tensor = _Download.apply(x)  # type: ignore[no-untyped-call]
    return copy


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator on the values, and put the results where a card would have them."""
    tensors = [t for t in tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor)]
    device = _device(func, tensors, kwargs)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": CPU}
    result = func(*tree_map(_plain, args), **tree_map(_plain, dict(kwargs)))
    same = {id(t.value): t for t in tensors if isinstance(t, OnCard)}  # of operators in place

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return same[id(x)] if id(x) in same else OnCard(x) if device == CARD else x

    return tree_map(placed, result)


def _device(func: Any, tensors: list[Tensor], kwargs: Mapping[str, Any]) -> torch.device:
    """Return where the results lie; raise for tensors of two devices."""
    named = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if func is ATEN._to_copy.default:  # backward passes name the device that torch takes a tensor's to be
        return CARD if CARD in (named, tensors[0].device) else CPU
    if named is not None:
        return CARD if named.type == "cuda" else CPU
    if func is ATEN.copy_.default:
        return tensors[0].device
    where = {t.device for t in tensors}
    moving = {t.device for t in tensors if t.ndim}  # a scalar of the CPU may meet what is on the card
    if func in INDEXED and tensors[0].device == CARD:
        return CARD
    if len(where) > 1 and (len(moving) > 1 or moving == {CPU}):
        raise RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu ({func})")
    return CARD if CARD in where else CPU


def _plain(x: Any) -> Any:
    return x.value if isinstance(x, OnCard) else x


class _Values(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes operators without a tensor of the card, as `torch.zeros(…, device="cuda")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Numbered(TorchFunctionMode):
    """Names the card by its number: torch asks the driver for the current one, and a tensor for its own."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            args = (args[0], args[1].device, args[1].dtype)
        named = {k: _numbered(v) for k, v in (kwargs or {}).items()}
        return func(*map(_numbered, args), **named)


def _numbered(x: Any) -> Any:
    return CARD if isinstance(x, (str, torch.device)) and str(x) == "cuda" else x


@contextmanager
def pretended_card() -> Iterator[None]:
    """Let torch have a card while the context lasts, for the current thread and what it computes on it."""
    answers: dict[str, Any] = {
        "_lazy_init": None,
        "is_available": True,
        "is_bf16_supported": False,
        "is_current_stream_capturing": False,
        "mem_get_info": (MEMORY, MEMORY),
        "empty_cache": None,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", lambda *_, answer=answer, **__: answer))
        stack.enter_context(_Numbered())
        stack.enter_context(_Values())  # type: ignore[no-untyped-call]
        yield
