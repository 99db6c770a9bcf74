"""Whether the clock of `latency` can be trusted: the same runs by an independent timer.

    cuda, tensorrt   CUDA events of torch around each run, on the stream that the session computes on
    others           onnxruntime's own profiler: what it says each call (`model_run`) took

Both look at each single run, so that what disturbs one disturbs the other. Events leave out what the host
does before the first and after the last kernel, the profiler what Python adds around the call.
Does not handle: runs below a millisecond, of which a call's own 20 µs are more than 3 %.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.errors import OptionError, RuntimeUnavailable
from onnxcompress.model.model_like import ModelLike
from onnxcompress.runtime.inference import random_feeds
from onnxcompress.runtime.io_binding import bound
from onnxcompress.runtime.providers import Provider, ProviderLike
from onnxcompress.runtime.session import pick_provider, session

Pairs = list[tuple[float, float]]
"""Milliseconds of each run: by our clock, by the independent timer."""


@dataclass(frozen=True)
class Agreement:
    """Medians of the same runs by two timers, milliseconds."""

    ours_ms: float
    other_ms: float
    gap: float
    """How far our clock is off the other in the same run, as a share: the median of all runs."""
    timer: str
    runs: int


def check_timer(
    model: ModelLike,
    *,
    provider: ProviderLike = "auto",
    batch: int = 1,
    threads: int = 0,
    runs: int = 50,
    warm_up: int = 5,
) -> Agreement:
    """Time `runs` runs by both timers. Raises as `latency.benchmark` does.

    On a GPU also RuntimeUnavailable, where torch has no CUDA.
    """
    if runs < 1 or warm_up < 0:
        raise OptionError(f"runs: {runs}, warm-up: {warm_up}; expected 1 or more, and 0 or more")
    chosen = pick_provider(provider)
    feeds = random_feeds(model, batch=batch, fixed_batch_ok=False)
    by = _by_events if chosen.on_gpu else _by_profiler
    pairs = by(model, chosen, feeds, threads, warm_up + runs)[warm_up:]
    ours, other = np.array(pairs).T
    gap = float(np.median(ours / other)) - 1
    name = "CUDA events" if chosen.on_gpu else "profiler"
    return Agreement(float(np.median(ours)), float(np.median(other)), gap, name, runs)


def _by_profiler(
    model: ModelLike, provider: Provider, feeds: dict[str, np.ndarray], threads: int, runs: int
) -> Pairs:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opened = session(
            model, provider=provider, threads=threads, profile=str(Path(folder) / "run"), timed=True
        )
        binding = bound(opened, feeds, provider)
        ours = [_clocked(lambda: opened.run_with_iobinding(binding)) for _ in range(runs)]
        events = json.loads(Path(opened.end_profiling()).read_text(encoding="utf-8"))
    calls = [event["dur"] / 1e3 for event in events if event.get("name") == "model_run"]
    return list(zip(ours, calls[-runs:], strict=True))


def _by_events(
    model: ModelLike, provider: Provider, feeds: dict[str, np.ndarray], threads: int, runs: int
) -> Pairs:
    torch = _torch()
    stream = torch.cuda.Stream(device=provider.options.device)
    on_stream = replace(provider, extra=(*provider.extra, ("user_compute_stream", str(stream.cuda_stream))))
    opened = session(model, provider=on_stream, threads=threads, timed=True)
    binding = bound(opened, feeds, provider)
    pairs = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def run(start: Any = start, end: Any = end) -> None:
            start.record(stream)
            opened.run_with_iobinding(binding)
            end.record(stream)
            stream.synchronize()  # of a stream that is not its own onnxruntime waits for nothing

        pairs.append((_clocked(run), float(start.elapsed_time(end))))
    return pairs


def _clocked(run: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


def _torch() -> Any:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeUnavailable("checking the timer on a GPU needs torch with CUDA: pip install torch")
    return torch
