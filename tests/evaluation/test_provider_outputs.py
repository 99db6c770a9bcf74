"""A provider that computes a file otherwise than the CPU provider is told of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnxcompress.errors import CompressWarning
from onnxcompress.evaluation import provider_outputs
from onnxcompress.evaluation.provider_outputs import FLOOR_DB, check_outputs
from onnxcompress.model import Model
from onnxcompress.passes.base import Pass
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.drop_channels import DropChannels
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.quantize import Quantize
from onnxcompress.pipeline.timing import check_where_it_runs
from onnxcompress.runtime import inference
from onnxcompress.runtime.providers import Provider
from onnxcompress.runtime.timing_options import TimingOptions
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


@pytest.mark.parametrize(
    ("pass_", "timing", "modified", "wanted"),
    [
        (DropBlocks(blocks=1, provider="openvino"), None, True, ["openvino"]),
        (DropChannels(macs_reduction=9, provider="openvino"), TimingOptions(), True, ["openvino"]),
        (DropBlocks(blocks=1, provider="openvino"), None, False, []),
        (HalfPrecision(provider="openvino"), TimingOptions(latency=False), True, []),
        (Quantize(), TimingOptions("openvino"), True, ["openvino"]),
        (Quantize(), TimingOptions("openvino", latency=False), True, []),
        (FoldBatchNorm(), TimingOptions("openvino"), True, []),
    ],
)
def test_a_result_is_compared_wherever_a_pass_timed_it(
    pass_: Pass,
    timing: TimingOptions | None,
    modified: bool,
    wanted: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[str] = []
    monkeypatch.setattr(
        provider_outputs, "check_outputs", lambda model, provider: compared.append(provider.name)
    )
    step: Any = SimpleNamespace(result=SimpleNamespace(modified=modified, input_shape=None))
    check_where_it_runs([pass_], [step], network(), timing)
    assert compared == wanted


def test_other_rounding_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(ELSEWHERE, monkeypatch, 10 ** (-(FLOOR_DB + 10) / 20)) == []
