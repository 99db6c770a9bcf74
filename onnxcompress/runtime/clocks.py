"""Clocks by which runs are timed: the wall's, and the processor's, which leaves out waiting for a core."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from onnxcompress.runtime.providers import Provider, ProviderLike
from onnxcompress.runtime.session import pick_provider

Clock = Literal["wall", "processor"]
COARSE = 1e-5
"""Resolution in seconds from which on a processor clock is too coarse to time a run (as on Windows)."""


def clock_reader(clock: Clock, provider: Provider) -> Callable[[], int]:
    """Choose the function that reads a clock.

    Args:
        clock: The clock.
        provider: The provider that is timed.

    Returns:
        A function that returns nanoseconds. The processor's clock counts while the calling thread computes;
        of OpenVINO, which computes on threads of its own, while any thread of the process does.
    """
    if clock == "wall":
        return time.perf_counter_ns
    return time.process_time_ns if _is_openvino_on_cpu(provider) else time.thread_time_ns


def has_processor_clock(provider: ProviderLike) -> bool:
    """Return whether runs can be timed by processor time.

    Args:
        provider: The execution provider.

    Returns:
        True on the CPU, OpenVINO's included, where the system's processor clock is fine enough.
    """
    fine = time.get_clock_info("thread_time").resolution < COARSE
    chosen = pick_provider(provider)
    return fine and (chosen.name == "cpu" or _is_openvino_on_cpu(chosen))


def _is_openvino_on_cpu(provider: Provider) -> bool:
    return provider.name == "openvino" and dict(provider.extra).get("device_type", "CPU") == "CPU"
