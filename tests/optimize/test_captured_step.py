"""A recorded step does what the step does; the recording itself, which needs a GPU, is stood in for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from onnxcompress.errors import CompressWarning
from onnxcompress.optimize import captured_step
from onnxcompress.optimize.captured_step import WARM_UP, captured
from onnxcompress.optimize.reconstruction.descent import Descent


class Recording:
    """Runs the step anew for a replay, on the tensors that were recorded."""

    def __init__(self, step: Callable[[], None]) -> None:
        for _ in range(WARM_UP):
            step()
        self.replay = step


def taken(values: list[Tensor], record: bool, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Three steps of descent on the values, by other targets each, and one at a smaller rate."""
    leaves = [value.clone().requires_grad_() for value in values]
    descent = Descent(leaves, [1.0] * len(leaves), 0.1)

    def step(share: Tensor, target: Tensor) -> None:
        loss = sum(((leaf - target) ** 2).sum() for leaf in leaves)
        for leaf, slope in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):  # type: ignore[arg-type]
            leaf.grad = slope
        descent.step(share)

    given = [(torch.tensor(1 / (n + 1)), torch.tensor(float(n))) for n in range(3)]
    monkeypatch.setattr(captured_step, "_recorded", Recording)
    take = captured(step, given[0], [*leaves, *descent.state]) if record else step
    for pair in given:
        take(*pair)
    return [leaf.detach() for leaf in leaves]


def test_recorded_steps_begin_at_the_values_and_take_each_input(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [torch.linspace(-1, 1, 12).reshape(3, 4), torch.ones(4)]
    plain, recorded = (taken(values, record, monkeypatch) for record in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert not torch.equal(plain[0], values[0])


def test_what_cannot_be_recorded_goes_on_as_it_is_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(step: Callable[[], None]) -> None:
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def step(x: Tensor) -> None:
        state.add_(x)

    state = torch.zeros(2)
    monkeypatch.setattr(captured_step, "_recorded", fails)
    with pytest.warns(CompressWarning, match=r"no CUDA graph of a step \(operation not permitted"):
        assert captured(step, [torch.ones(2)], [state]) is step
    assert not state.any()


def test_memory_that_runs_out_is_for_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who then takes fewer images at once."""

    def fails(step: Callable[[], None]) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(captured_step, "_recorded", fails)
    with pytest.raises(torch.OutOfMemoryError):
        captured(lambda x: None, [torch.ones(2)], [])
