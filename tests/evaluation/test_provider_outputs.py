"""A provider that computes a file otherwise than the CPU provider is told of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from onnxcompress.errors import CompressWarning
from onnxcompress.evaluation.provider_outputs import FLOOR_DB, check_outputs
from onnxcompress.model import Model
from onnxcompress.runtime import inference
from onnxcompress.runtime.providers import Provider
from tests.helpers.folding import graph, weight

ELSEWHERE = Provider("openvino")


def network() -> Model:
    body = "c = Conv(x, w) y = Relu(c)"
    return Model.from_proto(
        graph("(float[N,3,8,8] x) => (float[N,4,6,6] y)", body, {"w": weight(4, 3, 3, 3)})
    )


def told(provider: Provider, monkeypatch: pytest.MonkeyPatch, off: float, channels: int = 1) -> list[str]:
    """What is said where the provider's first channels are off, as a share of their deviation."""
    real = inference.run_each

    def run_each(model: Any, feeds: Sequence[Any], *, provider: Any = "cpu", **how: Any) -> Any:
        runs = real(model, feeds, **how)
        if provider != "cpu":
            noise = np.random.default_rng(0)
            for y in runs["y"]:
                y[:, :channels] += off * y.std() * noise.standard_normal(y[:, :channels].shape)
        return runs

    monkeypatch.setattr(inference, "run_each", run_each)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_outputs(network(), provider)
    return [str(one.message) for one in caught if one.category is CompressWarning]


@pytest.mark.parametrize("channels", [1, 4])
def test_outputs_that_are_others_are_told(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = told(ELSEWHERE, monkeypatch, 2.0, channels)
    assert text.startswith("openvino does not give what the CPU provider gives")
    assert "output 'y'" in text


def test_other_rounding_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(ELSEWHERE, monkeypatch, 10 ** (-(FLOOR_DB + 10) / 20)) == []


def test_the_cpu_provider_is_not_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(Provider("cpu"), monkeypatch, 2.0) == []
