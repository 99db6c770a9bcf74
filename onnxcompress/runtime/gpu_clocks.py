"""Clocks and temperature of an NVIDIA GPU while it is timed, by NVML.

A GPU lowers its clocks when it is hot or at its power limit, and raises them after it was idle, so
latencies that were measured at different times are not comparable. Interleaving keeps ratios right;
milliseconds hold for the recorded clocks only. NVML comes with the driver, its Python binding is
`pip install nvidia-ml-py`; without it nothing is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from onnxcompress.runtime.providers import Provider
from onnxcompress.runtime.session import cuda_bus_id

INSTALL = "pip install 'onnxcompress[gpu]' (nvidia-ml-py)"
EVERY = 0.5
"""Seconds between two readings, which take about a millisecond each."""
DRIFT = 0.03
"""Change of a clock, as a share of its highest value, above which a warning is given."""
WARMER = 8
"""Change of the temperature in °C above which a warning is given."""
_THROTTLED = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "thermal limit",
    0x40: "hardware thermal limit",
    0x80: "power brake",
}
"""NVML's bits of reasons for a lowered clock, without those that the user chose."""


@dataclass(frozen=True)
class Reading:
    """The GPU at one moment."""

    sm_mhz: int
    memory_mhz: int
    celsius: int
    throttled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clocks:
    """Clocks and temperature during a measurement: the lowest and the highest value of each."""

    gpu: str
    sm_mhz: tuple[int, int]
    memory_mhz: tuple[int, int]
    celsius: tuple[int, int]
    throttled: tuple[str, ...]
    samples: int

    @property
    def drift(self) -> str:
        """Changes that make the milliseconds unreliable, in words; empty where there were none."""
        words = []
        for name, (low, high) in (("SM clock", self.sm_mhz), ("memory clock", self.memory_mhz)):
            if high - low > DRIFT * high:
                words.append(f"the {name} went between {low} and {high} MHz")
        if self.celsius[1] - self.celsius[0] > WARMER:
            words.append(f"the temperature between {self.celsius[0]} and {self.celsius[1]} °C")
        if self.throttled:
            words.append(f"its clocks were lowered by its {', '.join(self.throttled)}")
        return "; ".join(words)

    @property
    def text(self) -> str:
        """A one-line summary for people."""
        sm, memory, heat = (
            f"{low}" if low == high else f"{low} to {high}"
            for low, high in (self.sm_mhz, self.memory_mhz, self.celsius)
        )
        return f"{self.gpu}: SM {sm} MHz, memory {memory} MHz, {heat} °C ({self.samples} readings)"


@dataclass
class Watch:
    """Reads the GPU's state at intervals; to be called between runs."""

    gpu: str
    read: Callable[[], Reading]
    every: float = EVERY
    clock: Callable[[], float] = time.monotonic
    readings: list[Reading] = field(default_factory=list)
    _due: float = float("-inf")

    def __call__(self) -> None:
        """Take a reading if the last one is long enough ago."""
        now = self.clock()
        if now >= self._due:
            self.readings.append(self.read())
            self._due = now + self.every

    def found(self) -> Clocks | None:
        """Summarize the readings.

        Returns:
            Their lowest and highest values; None without readings.
        """
        if not self.readings:
            return None
        readings = self.readings

        def extremes(values: list[int]) -> tuple[int, int]:
            return min(values), max(values)

        return Clocks(
            self.gpu,
            extremes([r.sm_mhz for r in readings]),
            extremes([r.memory_mhz for r in readings]),
            extremes([r.celsius for r in readings]),
            tuple(dict.fromkeys(reason for r in readings for reason in r.throttled)),
            len(readings),
        )


@contextmanager
def watching(provider: Provider) -> Iterator[Watch | None]:
    """Watch the GPU of a provider.

    Args:
        provider: The provider.

    Yields:
        The watch; None where the provider uses no NVIDIA GPU or NVML is not available.
    """
    nvml = _nvml() if provider.on_gpu else None
    if nvml is None:
        yield None
        return
    try:
        handle = nvml.nvmlDeviceGetHandleByPciBusId(cuda_bus_id(provider.options.device))
        name = nvml.nvmlDeviceGetName(handle)
        yield Watch(name if isinstance(name, str) else name.decode(), lambda: _read(nvml, handle))
    finally:
        nvml.nvmlShutdown()


def _nvml() -> Any:
    """Import and start NVML; None where the library or its Python binding is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _read(nvml: Any, handle: Any) -> Reading:
    try:
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    except nvml.NVMLError:  # not every GPU reports them
        reasons = 0
    return Reading(
        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        tuple(word for bit, word in _THROTTLED.items() if reasons & bit),
    )
