"""Compare two models: size, multiply-accumulates, latency, and the difference of their outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from onnxcompress.data.image_set import ImageSet, check_fits
from onnxcompress.errors import ModelError
from onnxcompress.evaluation.accuracy import agreement, image_input, logits, score_output, topk
from onnxcompress.evaluation.equivalence import Difference, difference_of
from onnxcompress.formatting import counted
from onnxcompress.graph import macs
from onnxcompress.model.model_like import (
    ModelLike,
    as_model,
    display_names,
    input_specs,
    label,
    model_bytes,
)
from onnxcompress.progress import Progress, silent
from onnxcompress.runtime.inference import feeds_for, or_one_by_one, random_feeds, run, unread_feeds
from onnxcompress.runtime.latency import Ratio, Timing, benchmark, ratio
from onnxcompress.runtime.providers import ProviderLike

DIFFERENCE_BATCH = 32
"""Number of images or random inputs over which the difference of the outputs is taken."""


@dataclass(frozen=True)
class Side:
    """One of the two models."""

    name: str
    bytes: int
    """Size of the file with its external data."""
    parameters: int
    macs: int | None
    """For one image; None where the image size is open."""
    timing: Timing
    top1: float | None
    """Top-1 accuracy, from 0 to 1; None where the images have no labels."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of model `b` with the reference `a`."""

    a: Side
    b: Side
    latency: Ratio
    """median(b) / median(a)."""
    difference: Difference
    """Difference of b's outputs from a's, without graph optimizations."""
    agreement: float | None
    """Share of inputs with the same top-1 class; None where the models give no scores."""
    inputs: str
    """Description of the inputs that difference and agreement were taken on."""

    def as_dict(self) -> dict[str, Any]:
        """Convert the comparison to JSON values.

        Returns:
            All fields, without the samples of the timings.
        """
        values = asdict(self)
        for side in ("a", "b"):
            del values[side]["timing"]["samples_ms"]
        return values


@dataclass(frozen=True)
class _Outputs:
    difference: Difference
    agreement: float | None
    top1: tuple[float | None, float | None]
    inputs: str


def compare(
    a: ModelLike,
    b: ModelLike,
    *,
    images: ImageSet | None = None,
    provider: ProviderLike = "auto",
    batch: int = 1,
    threads: int = 0,
    runs: int | None = None,
    seconds: float | None = None,
    tolerance: float | None = 0.01,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare model `b` with the reference `a`, on images or on random inputs.

    Args:
        a: The reference.
        b: The other model.
        images: Images to compare on, with or without labels; None: random inputs.
        provider: The execution provider.
        batch: Images per timed run.
        threads: Threads of one operator; 0: all cores.
        runs: Number of timed rounds, see `latency.benchmark`.
        seconds: Time limit of the timing, see `latency.benchmark`.
        tolerance: Precision at which timing stops, see `latency.benchmark`.
        seed: Random seed.
        shapes: Whole shapes by input name.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The comparison.

    Raises:
        ModelError: The inputs or outputs of the models differ in number or shape.
        CompressError: As `latency.benchmark` and `accuracy.logits`.
    """
    names = display_names([a, b])
    if images is None:
        outputs = _on_random(a, b, seed, shapes)
    else:
        outputs = _on_images(a, b, images, provider, threads, progress)
        shapes = _at_size((a, b), images, batch, shapes or {})
    timings = benchmark(
        dict(zip(names, (a, b), strict=True)),
        provider=provider,
        batch=batch,
        threads=threads,
        runs=runs,
        seconds=seconds,
        tolerance=tolerance,
        seed=seed,
        shapes=shapes,
        progress=progress,
    )
    return _joined((a, b), [timings[name] for name in names], outputs)


def _at_size(
    models: Sequence[ModelLike], images: ImageSet, batch: int, shapes: Mapping[str, Sequence[int]]
) -> dict[str, Sequence[int]]:
    """Time models at the size of the images, where their files leave it open."""
    found = dict(shapes)
    for spec in map(image_input, models):
        fixed = spec.shape is not None and all(isinstance(size, int) for size in spec.shape[1:])
        fixed |= spec.shape is not None and isinstance(spec.shape[0], int) and spec.shape[0] != batch
        if not fixed and spec.name not in found and "" not in found:
            found[spec.name] = (batch, *images.shape)
    return found


def _joined(
    models: tuple[ModelLike, ModelLike], timings: Sequence[Timing], outputs: _Outputs
) -> Comparison:
    a, b = (_side(m, t, top1) for m, t, top1 in zip(models, timings, outputs.top1, strict=True))
    return Comparison(
        a=a,
        b=b,
        latency=ratio(a.timing, b.timing),
        difference=outputs.difference,
        agreement=outputs.agreement,
        inputs=outputs.inputs,
    )


def _side(model: ModelLike, timing: Timing, top1: float | None) -> Side:
    graph = as_model(model)
    try:
        work: int | None = macs.count_macs(graph)
    except ModelError:  # the image size is open; the work is then shown as unknown
        work = None
    return Side(timing.name, model_bytes(model), macs.count_parameters(graph), work, timing, top1)


def _on_random(
    a: ModelLike, b: ModelLike, seed: int, shapes: Mapping[str, Sequence[int]] | None
) -> _Outputs:
    inputs = {s.name for s in input_specs(a)}
    given = {k: v for k, v in (shapes or {}).items() if not k or k in inputs}

    def outputs_at(batch: int) -> tuple[dict[str, np.ndarray], ...]:
        feeds = random_feeds(a, batch=batch, seed=seed, shapes=given)
        return feeds, run(a, feeds), run(b, feeds_for(b, feeds))

    feeds, left, right = or_one_by_one(outputs_at, _batch(a, b, DIFFERENCE_BATCH))
    count = len(next(iter(feeds.values()), np.zeros(1)))
    scores = score_output(left, count), score_output(right, count)
    same = None
    if scores[0] is not None and scores[1] is not None:
        same = agreement(scores[0], scores[1])
    return _Outputs(difference_of(left, right), same, (None, None), f"{count} random inputs, N(0, 1)")


def _on_images(
    a: ModelLike, b: ModelLike, images: ImageSet, provider: ProviderLike, threads: int, progress: Progress
) -> _Outputs:
    scores = [logits(m, images, provider=provider, threads=threads, progress=progress) for m in (a, b)]
    spec = image_input(a)
    check_fits(images, spec.shape, spec.name)

    def difference_at(batch: int) -> Difference:
        x = images.take(np.arange(batch) % len(images)).array().astype(spec.dtype)
        feeds = {spec.name: x, **unread_feeds(a)}
        return difference_of(run(a, feeds), run(b, feeds_for(b, feeds)))

    difference = or_one_by_one(difference_at, _batch(a, b, min(DIFFERENCE_BATCH, len(images))))
    top1: tuple[float | None, float | None] = (None, None)
    if images.y is not None:
        top1 = topk(scores[0], images.y, label(a))[0], topk(scores[1], images.y, label(b))[0]
    same = agreement(scores[0], scores[1])
    return _Outputs(difference, same, top1, counted(len(images), "image"))


def _batch(a: ModelLike, b: ModelLike, default: int) -> int:
    """Return the batch that both models take: a fixed one, else `default`."""
    shapes = [s.shape for model in (a, b) for s in input_specs(model)]
    fixed = sorted({s[0] for s in shapes if s and isinstance(s[0], int)})
    if len(fixed) > 1:
        raise ModelError(f"the models' inputs have fixed batches of {fixed[0]} and {fixed[1]}")
    return fixed[0] if fixed else default
