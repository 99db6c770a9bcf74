"""The figures that passes measured, for tests that read them."""

from __future__ import annotations

from typing import Any, TypeVar

from onnxcompress.account import Figures
from onnxcompress.passes import Pass, PassResult
from onnxcompress.pipeline import Step

F = TypeVar("F", bound=Figures)


def figures_of(result: PassResult[Any], kind: type[F]) -> F:
    """The figures of a result, which are of this class."""
    assert isinstance(result.measured, kind)
    return result.measured


def step_of(pass_: Pass, figures: Figures | None) -> Step:
    """A pass that ran, changed nothing and measured this."""
    return Step(pass_, PassResult(measured=figures), 0.0)
