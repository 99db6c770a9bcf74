"""Check the clock of `latency` against an independent timer that times the same runs.

    cuda, tensorrt   CUDA events of torch around each run, on the stream that the session computes on
    others           onnxruntime's own profiler: the duration that it records for each call (`model_run`)

Both timers measure each single run, so a disturbance affects both alike. CUDA events leave out the host's
work before the first and after the last kernel, the profiler the overhead of Python around the call.
Does not handle: runs below a millisecond, of which a call's own 20 µs are more than 2 %.
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
"""Milliseconds of each run by the clock of `latency` and by the independent timer."""


@dataclass(frozen=True)
class Agreement:
    """The medians of the same runs by two timers, in milliseconds."""

    ours_ms: float
    other_ms: float
    gap: float
    """Relative difference of `latency`'s clock from the other timer: median over all runs."""
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
    """Time the same runs by the clock of `latency` and by an independent timer.

    Args:
        model: The model to run on random inputs.
        provider: The execution provider.
        batch: Images per run.
        threads: Threads of one operator; 0: all cores.
        runs: Number of timed runs, 1 or more.
        warm_up: Number of runs before them that are not counted.

    Returns:
        The medians by both timers and their relative difference.

    Raises:
        OptionError: A number is out of range, the provider is unknown, or the batch is fixed.
        ModelError: onnxruntime refuses the model.
        RuntimeUnavailable: The provider cannot start, or on a GPU torch has no CUDA.
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
            stream.synchronize()  # onnxruntime does not wait for a stream that is not its own

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
