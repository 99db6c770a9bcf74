"""Latency in onnxruntime: warmed up, interleaved, on the device the user asked for.

Clock, temperature and other load of a machine drift by more than the differences to be measured. So all
models run once a round, in a new random order each round: the drift affects all alike, and the ratio of two
models is taken over the same rounds (`bootstrap` has its interval).

Of two sessions of the same network the one opened later ran 0.5 to 1 % faster on a CPU, in every one of
twenty measurements, which would flatter what is compared with the network before. So on a CPU half of the
rounds are of sessions that were opened in the opposite order.

Inputs and outputs are bound once, on a GPU in its memory, and each run waits for the device: no copy and
no allocation of inputs is timed.

A wall clock also counts the time for which other processes had the cores. Where they have them most of the
time, the processor time of a run on one thread still tells models apart (`clock="processor"`): it leaves
out waiting for a core, and the gain of several threads.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from math import ceil
from numbers import Integral
from typing import Any

import numpy as np

from onnxcompress.errors import OptionError
from onnxcompress.model.model_like import ModelLike
from onnxcompress.progress import Progress, silent
from onnxcompress.runtime.bootstrap import RESAMPLES, Ratio, half_width, ratio_of
from onnxcompress.runtime.clocks import Clock, clock_reader
from onnxcompress.runtime.gpu_clocks import Clocks, watching
from onnxcompress.runtime.io_binding import Placement, Runner, bind
from onnxcompress.runtime.providers import Provider, ProviderLike, described
from onnxcompress.runtime.session import pick_provider, session
from onnxcompress.runtime.timed_inputs import timed_feeds

__all__ = ["Placement", "Ratio", "Timing", "benchmark", "ratio", "session"]

DEFAULT_SECONDS = 10.0
MIN_ROUNDS, MAX_ROUNDS = 20, 10_000
WARM_WINDOW, WARM_TOLERANCE = 5, 0.05


@dataclass(frozen=True)
class Timing:
    """Latency of one model, in milliseconds for a run of `batch` images."""

    name: str
    median_ms: float
    mean_ms: float
    min_ms: float
    p90_ms: float
    p99_ms: float
    runs: int
    batch: int
    throughput: float
    """Images per second, from the median."""
    provider: str
    samples_ms: tuple[float, ...] = field(repr=False)
    """Latency in each round, in order."""
    placement: Placement = field(default_factory=lambda: Placement({}))
    settings: dict[str, bool | int | str] = field(default_factory=dict)
    """The provider's settings (`Provider.settings`)."""
    clocks: Clocks | None = None
    """Clocks of the GPU while all models were timed; None without NVML."""

    @property
    def device(self) -> str:
        """The provider and its settings, as text for people."""
        return described(self.provider, self.settings)

    def as_dict(self) -> dict[str, Any]:
        """Convert the timing to JSON values.

        Returns:
            All fields but the samples.
        """
        values = asdict(self)
        del values["samples_ms"]
        return values


def benchmark(
    models: Mapping[str, ModelLike],
    *,
    provider: ProviderLike = "auto",
    batch: int = 1,
    threads: int = 0,
    runs: int | None = None,
    seconds: float | None = None,
    tolerance: float | None = 0.01,
    warm_up: float = 3.0,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    clock: Clock = "wall",
    progress: Progress = silent,
) -> dict[str, Timing]:
    """Time all models, interleaved, on random inputs.

    Args:
        models: The models by name.
        provider: The execution provider.
        batch: Images per run, 1 or more.
        threads: Threads of one operator; 0: all cores.
        runs: Number of rounds to time; None: as many as `seconds` and `tolerance` allow.
        seconds: Time limit; 10 where neither `runs` nor `seconds` is given.
        tolerance: Without `runs`, stop once the 95 % interval of each model's ratio to the first (of a
            single model: of its median) is within ± this share; None uses all of `seconds`.
        warm_up: Seconds at most until all models run steadily.
        seed: Random seed of the inputs and of the order of runs.
        shapes: Whole shapes by input name, for every model that has this input.
        clock: `processor` runs models on one thread, whatever `threads` is, and counts its processor time
            (see `clocks.has_processor_clock`).
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        Timings by name, in the given order.

    Raises:
        OptionError: A number is out of range, a shape's name is not an input's, or the provider is unknown.
        ModelError: onnxruntime refuses a model.
        RuntimeUnavailable: The provider cannot start.
    """
    _check(models, batch, runs, seconds, tolerance)
    if runs is None and seconds is None:
        seconds = DEFAULT_SECONDS
    chosen = pick_provider(provider)
    feeds = timed_feeds(models, batch, seed, shapes or {})
    names, several = list(models), len(models) > 1
    threads, read = threads if clock == "wall" else 1, clock_reader(clock, chosen)
    # on a GPU engines may be built for each session, and nothing of the kind was seen there
    sittings = 2 if several and not chosen.on_gpu and (runs is None or runs > 1) else 1
    parts = []
    with watching(chosen) as watch:
        for sitting in range(sittings):
            runners: dict[str, Runner] = {}  # the sessions of the sitting before are closed
            for name in names if sitting == 0 else names[::-1]:
                runners[name] = bind(
                    name, models[name], chosen, threads, feeds[name], interleaved=several, clock=read
                )
            part = _sit(
                [runners[name].run for name in names],
                warm_up,
                runs=None if runs is None else (runs + sitting) // sittings,
                seconds=None if seconds is None else seconds / sittings,
                tolerance=None if tolerance is None else tolerance * sittings**0.5,
                seed=seed + sitting,
                between=watch,
                progress=partial(_of_all, progress, sitting, sittings, runs),
            )
            parts.append(part)
    clocks = None if watch is None else watch.found()
    columns = zip(names, np.concatenate(parts).T, strict=True)
    return {name: _summary(runners[name], column, chosen, clocks) for name, column in columns}


def ratio(a: Timing, b: Timing, *, confidence: float = 0.95) -> Ratio:
    """Compare the latencies of two models that were timed together.

    Args:
        a: The first timing.
        b: The second timing, whose median is divided by the first's.
        confidence: Confidence level of the interval, between 0 and 1.

    Returns:
        The ratio with its interval.

    Raises:
        OptionError: The numbers of rounds differ, or the confidence is out of range.
    """
    if a.runs != b.runs:
        raise OptionError(f"{a.name} has {a.runs} rounds, {b.name} {b.runs}: time them together")
    if not 0 < confidence < 1:
        raise OptionError(f"confidence: {confidence}; expected between 0 and 1")
    return ratio_of(np.array([a.samples_ms, b.samples_ms]).T, confidence)


def precision(timings: Mapping[str, Timing]) -> float:
    """Compute how precise the timings are, by the measure that `benchmark` compares with `tolerance`.

    Args:
        timings: Timings by name, taken together.

    Returns:
        Relative half width of the widest 95 % interval of the ratios to the first, or of a single median.
    """
    return half_width(np.array([t.samples_ms for t in timings.values()]).T, RESAMPLES)


def interleave(
    timed: Sequence[Callable[[], float]],
    *,
    runs: int | None,
    seconds: float | None,
    tolerance: float | None,
    seed: int,
    clock: Callable[[], float] = time.monotonic,
    between: Callable[[], None] | None = None,
    progress: Progress = silent,
) -> np.ndarray:
    """Call all functions once a round, in a new random order each round.

    The rounds end as `benchmark` describes; with a time limit alone after MAX_ROUNDS, and never before the
    third.

    Args:
        timed: Functions that return the milliseconds of one run.
        runs: Number of rounds; None: as many as `seconds` and `tolerance` allow.
        seconds: Time limit.
        tolerance: Without `runs`, the relative half width of the intervals at which to stop.
        seed: Random seed of the order.
        clock: Returns the time in seconds.
        between: Called after each round.
        progress: Called with rounds where `runs` is given, else with seconds, of which fewer may do.

    Returns:
        Milliseconds, (rounds, functions).
    """
    rng = np.random.default_rng(seed)
    rounds: list[list[float]] = []
    start = clock()
    end = None if seconds is None else start + seconds
    limit = MAX_ROUNDS if runs is None else runs
    checkpoint = MIN_ROUNDS
    while len(rounds) < limit:
        row = [0.0] * len(timed)
        for index in rng.permutation(len(timed)):
            row[index] = timed[index]()
        rounds.append(row)
        if between is not None:
            between()
        now = clock()
        if runs is None and seconds is not None:
            progress("timing, seconds at most", min(int(now - start), ceil(seconds)), ceil(seconds))
        else:
            progress("timing, rounds", len(rounds), limit)
        if end is not None and now >= end and len(rounds) >= 3:
            break
        if runs is None and tolerance is not None and len(rounds) == checkpoint:
            if half_width(np.array(rounds)) <= tolerance:
                break
            checkpoint = ceil(checkpoint * 1.3)
    return np.array(rounds)


def _check(
    models: Mapping[str, ModelLike],
    batch: int,
    runs: int | None,
    seconds: float | None,
    tolerance: float | None,
) -> None:
    if not models:
        raise OptionError("no model to time; give at least one")
    for name, value in (("batch", batch), ("runs", runs)):
        if value is not None and not (isinstance(value, Integral) and value >= 1):
            raise OptionError(f"{name}: {value}; expected a whole number, 1 or more")
    for name, limit in (("seconds", seconds), ("tolerance", tolerance)):
        if limit is not None and not limit > 0:
            raise OptionError(f"{name}: {limit}; expected more than 0")


def _of_all(
    progress: Progress, sitting: int, sittings: int, runs: int | None, stage: str, done: int, total: int
) -> None:
    """Report the steps of one sitting as some of all sittings', of which the later may have a run more."""
    before = sitting * (total if runs is None else runs // sittings)
    progress(stage, before + done, sittings * total if runs is None else runs)


def _sit(timed: Sequence[Callable[[], float]], warm_up: float, **options: Any) -> np.ndarray:
    """Warm models up and time them; see `interleave`."""
    with _without_gc():
        _warm(timed, warm_up)
        return interleave(timed, **options)


def _warm(timed: Sequence[Callable[[], float]], seconds: float) -> None:
    """Run rounds until each model's last runs take as long as those before, or the time is over."""
    end = time.monotonic() + seconds
    history: list[list[float]] = [[] for _ in timed]
    while not all(_steady(h) for h in history) and time.monotonic() < end:
        for run, past in zip(timed, history, strict=True):
            past.append(run())


def _steady(history: Sequence[float]) -> bool:
    if len(history) < 2 * WARM_WINDOW:
        return False
    now = float(np.median(history[-WARM_WINDOW:]))
    before = float(np.median(history[-2 * WARM_WINDOW : -WARM_WINDOW]))
    return abs(now - before) <= WARM_TOLERANCE * before


@contextmanager
def _without_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _summary(runner: Runner, samples: np.ndarray, provider: Provider, clocks: Clocks | None) -> Timing:
    median = float(np.median(samples))
    p90, p99 = (float(v) for v in np.percentile(samples, [90, 99]))
    return Timing(
        name=runner.name,
        median_ms=median,
        mean_ms=float(samples.mean()),
        min_ms=float(samples.min()),
        p90_ms=p90,
        p99_ms=p99,
        runs=len(samples),
        batch=runner.batch,
        throughput=runner.batch * 1000 / median if median > 0 else float("inf"),
        provider=provider.name,
        samples_ms=tuple(float(s) for s in samples),
        placement=runner.placement,
        settings=provider.settings,
        clocks=clocks,
    )
