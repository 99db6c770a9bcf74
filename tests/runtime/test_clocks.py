"""Which clock reads a run, by the provider that computes it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from onnxcompress.runtime.clocks import clock_reader, has_processor_clock
from onnxcompress.runtime.providers import Provider

ON_GPU = Provider.of("openvino", ["device_type=GPU"])


@pytest.mark.parametrize(
    ("provider", "reader"),
    [
        (Provider("cpu"), time.thread_time_ns),
        (Provider.of("openvino"), time.process_time_ns),
        (Provider.of("openvino", ["device_type=CPU"]), time.process_time_ns),
    ],
)
def test_processor_time_counts_the_threads_that_compute(provider: Provider, reader: Any) -> None:
    assert has_processor_clock(provider)
    assert clock_reader("processor", provider) is reader
    assert clock_reader("wall", provider) is time.perf_counter_ns


@pytest.mark.parametrize("provider", [ON_GPU, Provider("cuda"), Provider("tensorrt")])
def test_a_graphics_card_has_no_processor_clock(provider: Provider) -> None:
    assert not has_processor_clock(provider)
