"""Latency and accuracy of passes on networks that are given with images, for tests/benchmarks/gpu.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from onnxcompress.errors import CompressError
from onnxcompress.model import Model, load
from onnxcompress.passes import load_pass
from onnxcompress.passes.base import Pass
from onnxcompress.runtime.latency import ratio
from onnxcompress.runtime.providers import Provider
from tests.benchmarks.gpu_parts import Bench

RESERVE = 0.25
"""Share of the time that is kept for measuring latency and accuracy."""


class Given(NamedTuple):
    """A network and its images."""

    network: str
    train: str
    test: str
    preprocess: str


@dataclass(frozen=True)
class Asked:
    """What all networks share."""

    networks: tuple[Given, ...]
    minutes: float
    """Time for all of them."""
    blocks: int
    sparsity: float
    effort: str
    judged: int
    """Images of TEST, at most."""


def passes(asked: Asked) -> Callable[[Bench], None]:
    """Make the part of the benchmark that runs the passes on each network.

    Args:
        asked: The networks, and what is asked of the passes.

    Returns:
        The part, a function of the benchmark.
    """

    def part(bench: Bench) -> None:
        end = time.perf_counter() + 60 * asked.minutes
        for at, given in enumerate(asked.networks):
            share = (end - time.perf_counter()) / (len(asked.networks) - at)
            _network(bench, given, asked, time.perf_counter() + share)

    return part


def _network(bench: Bench, given: Given, asked: Asked, end: float) -> None:
    """Apply each pass while there is time, then time all results interleaved, and judge them."""
    label = given.network.rsplit("/", 1)[-1].removesuffix(".onnx")
    start = time.perf_counter()
    last = end - RESERVE * (end - start)
    models: dict[str, Model] = {"float32": load(given.network)}
    took: dict[str, float] = {}
    for name, pass_ in _chosen(bench, given, asked).items():
        if time.perf_counter() > last:
            bench.row("passes", f"{label}, {name}", "left out: no time")
            continue
        began = time.perf_counter()
        model = models["float32"].copy()
        try:
            if pass_.apply(model).modified:
                models[name] = model
        except CompressError as error:
            bench.row("passes", f"{label}, {name}", f"FAILED {error}")
        took[name] = time.perf_counter() - began
    _rows(bench, label, given, asked, models, took)


def _chosen(bench: Bench, given: Given, asked: Asked) -> dict[str, Pass]:
    device = "cpu" if bench.provider == "cpu" else "cuda"
    learn: dict[str, Any] = {"images": given.train, "preprocess": given.preprocess}
    timing = {"provider": bench.provider, "threads": bench.threads}
    tuned = {**learn, "device": device, "effort": asked.effort}
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "fp16": ("fp16", {**learn, **timing}),
        "W8A8": ("quantize", tuned),
        f"without {asked.blocks} blocks": (
            "drop-blocks",
            {**tuned, **timing, "blocks": asked.blocks, "latency_batch": bench.batch},
        ),
        f"prune {asked.sparsity:.0%}": ("prune", {**tuned, "sparsity": asked.sparsity}),
    }
    return {what: load_pass(name)(**how) for what, (name, how) in options.items()}


def _rows(
    bench: Bench, label: str, given: Given, asked: Asked, models: dict[str, Model], took: dict[str, float]
) -> None:
    from onnxcompress.data.image_set import load_images
    from onnxcompress.data.preprocess import Preprocess
    from onnxcompress.evaluation.accuracy import agreement, logits, topk

    images = load_images(given.test, preprocess=Preprocess.parse(given.preprocess), labels=True)
    images = images.spread(asked.judged)
    timings = bench.timed(models, Provider(bench.provider))
    exact = None
    for name, model in models.items():
        scores = logits(model, images, provider=bench.provider)
        exact = scores if exact is None else exact
        less = ratio(timings["float32"], timings[name])
        top1, same = topk(scores, np.asarray(images.y))[0], agreement(exact, scores)
        text = f"{timings[name].median_ms:.3f} ms, {less.value:.3f} ({less.low:.3f} to {less.high:.3f})"
        text += f" of float32's, top-1 {100 * top1:.2f} %, agreement {100 * same:.2f} %"
        text += f", pass {took[name]:.0f} s" if name in took else f", {timings[name].device}"
        bench.row("passes", f"{label}, {name}", text)
        found = {"timing": timings[name].as_dict(), "ratio": vars(less), "top1": top1, "agreement": same}
        bench.keep("passes", f"{label} {name}", found)
