"""Clocks and temperature of an NVIDIA GPU while it is timed, by NVML.

A GPU lowers its clocks when it is hot or at its power limit, and raises them when it was idle: latencies of
then and now are not of the same machine. Interleaving keeps ratios right; milliseconds are of these clocks.
NVML comes with the driver, its Python part is `pip install nvidia-ml-py`; without it nothing is noted.
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
"""Seconds between two looks, which take a millisecond or so."""
DRIFT = 0.03
"""Change of the clock, as a share of the highest, from which on it is warned of."""
WARMER = 8
"""Degrees from which on it is warned of."""
_THROTTLED = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "thermal limit",
    0x40: "hardware thermal limit",
    0x80: "power brake",
}
"""NVML's bits of reasons for a lowered clock, but for those that the user chose."""


@dataclass(frozen=True)
class Reading:
    """The GPU at one moment."""

    sm_mhz: int
    memory_mhz: int
    celsius: int
    throttled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clocks:
    """The GPU while it was timed: lowest and highest of each."""

    gpu: str
    sm_mhz: tuple[int, int]
    memory_mhz: tuple[int, int]
    celsius: tuple[int, int]
    throttled: tuple[str, ...]
    samples: int

    @property
    def drift(self) -> str:
        """What changed so much that milliseconds are not to be trusted; empty where nothing did."""
        words = []
        for name, (low, high) in (("SM clock", self.sm_mhz), ("memory clock", self.memory_mhz)):
            if high - low > DRIFT * high:
                words.append(f"the {name} went between {low} and {high} MHz")
        if self.celsius[1] - self.celsius[0] > WARMER:
            words.append(f"the temperature between {self.celsius[0]} and {self.celsius[1]} °C")
        if self.throttled:
            words.append(f"it was held back by its {', '.join(self.throttled)}")
        return "; ".join(words)

    @property
    def text(self) -> str:
        """For a person, on one line."""
        sm, memory, heat = (
            f"{low}" if low == high else f"{low} to {high}"
            for low, high in (self.sm_mhz, self.memory_mhz, self.celsius)
        )
        return f"{self.gpu}: SM {sm} MHz, memory {memory} MHz, {heat} °C ({self.samples} looks)"


@dataclass
class Watch:
    """Looks at the GPU now and then; to be called between runs."""

    gpu: str
    read: Callable[[], Reading]
    every: float = EVERY
    clock: Callable[[], float] = time.monotonic
    readings: list[Reading] = field(default_factory=list)
    _due: float = float("-inf")

    def __call__(self) -> None:
        """Look, if the last time is long enough ago."""
        now = self.clock()
        if now >= self._due:
            self.readings.append(self.read())
            self._due = now + self.every

    def found(self) -> Clocks | None:
        """What was seen; None where it never looked."""
        if not self.readings:
            return None
        seen = self.readings

        def ends(values: list[int]) -> tuple[int, int]:
            return min(values), max(values)

        return Clocks(
            self.gpu,
            ends([r.sm_mhz for r in seen]),
            ends([r.memory_mhz for r in seen]),
            ends([r.celsius for r in seen]),
            tuple(dict.fromkeys(reason for r in seen for reason in r.throttled)),
            len(seen),
        )


@contextmanager
def watching(provider: Provider) -> Iterator[Watch | None]:
    """A watch of the provider's GPU; None where there is none, or NVML is not there."""
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
    """NVML, started; None where it or its Python part is missing."""
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
    except nvml.NVMLError:  # not told by every GPU
        reasons = 0
    return Reading(
        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        tuple(word for bit, word in _THROTTLED.items() if reasons & bit),
    )
