"""Two models side by side: size, work, latency, and how far apart what they compute is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcompress import macs, wire
from onnxcompress.errors import ModelError
from onnxcompress.evaluate import agreement, image_input, logits, score_output, topk
from onnxcompress.inputs.images import ImageSet, check_fits
from onnxcompress.latency import Ratio, Timing, benchmark, ratio
from onnxcompress.model import Model, load
from onnxcompress.runtime import ModelLike, input_specs, label
from onnxcompress.verify import Difference, difference_of, random_feeds, run

DIFFERENCE_BATCH = 32
"""Images, or random inputs, over which the outputs' difference is taken."""


@dataclass(frozen=True)
class Side:
    """One of the two models."""

    name: str
    bytes: int
    """Of the file and its external data."""
    parameters: int
    macs: int | None
    """For one image; None where the image size is open."""
    timing: Timing
    top1: float | None
    """Where the images have labels."""


@dataclass(frozen=True)
class Comparison:
    """`a` is the reference."""

    a: Side
    b: Side
    latency: Ratio
    """median(b) / median(a)."""
    difference: Difference
    """Outputs of b against a, without graph optimizations."""
    agreement: float | None
    """Share of inputs with the same top-1 class; None where the models give no scores."""
    inputs: str
    """What the difference and the agreement were taken on."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values, without the samples of the timings."""
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
    provider: str = "auto",
    batch: int = 1,
    threads: int = 0,
    runs: int | None = None,
    seconds: float | None = None,
    tolerance: float | None = 0.01,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Comparison:
    """Compare b with the reference a, on `images` or on random inputs.

    The latency options are those of `benchmark`. Raises ModelError where inputs or outputs differ in form.
    """
    names = _names(a, b)
    if images is None:
        outputs = _on_random(a, b, seed, shapes)
    else:
        outputs = _on_images(a, b, images, provider, threads)
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
    )
    sides = [
        _side(name, model, timings[name], top1)
        for name, model, top1 in zip(names, (a, b), outputs.top1, strict=True)
    ]
    return Comparison(
        a=sides[0],
        b=sides[1],
        latency=ratio(sides[0].timing, sides[1].timing),
        difference=outputs.difference,
        agreement=outputs.agreement,
        inputs=outputs.inputs,
    )


def model_bytes(model: ModelLike) -> int:
    """Bytes of the model as a file, external data included."""
    if isinstance(model, bytes):
        return len(model)
    if isinstance(model, onnx.ModelProto):
        return int(model.ByteSize())
    if isinstance(model, Model):
        return int(model.to_proto().ByteSize())
    path = Path(model)
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    proto = onnx.ModelProto.FromString(wire.split(path)[0])
    places = {
        entry.value
        for tensor in proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    beside = (path.parent / place for place in places)
    return path.stat().st_size + sum(p.stat().st_size for p in beside if p.is_file())


def as_model(model: ModelLike) -> Model:
    """Any form of a model as a Model."""
    if isinstance(model, Model):
        return model
    if isinstance(model, bytes):
        return Model.from_proto(onnx.ModelProto.FromString(model))
    if isinstance(model, onnx.ModelProto):
        return Model.from_proto(model)
    return load(model)


def _side(name: str, model: ModelLike, timing: Timing, top1: float | None) -> Side:
    graph = as_model(model)
    try:
        work: int | None = macs.count_macs(graph)
    except ModelError:  # an open image size: unknown is what is shown
        work = None
    return Side(name, model_bytes(model), macs.count_parameters(graph), work, timing, top1)


def _names(a: ModelLike, b: ModelLike) -> tuple[str, str]:
    """Names to show: file names, whole paths where these are equal, numbered where still equal."""
    first, second = label(a), label(b)
    short = os.path.basename(first), os.path.basename(second)
    if short[0] != short[1]:
        return short
    return (first, second) if first != second else (f"{first} (a)", f"{second} (b)")


def _on_random(
    a: ModelLike, b: ModelLike, seed: int, shapes: Mapping[str, Sequence[int]] | None
) -> _Outputs:
    inputs = {s.name for s in input_specs(a)}
    given = {k: v for k, v in (shapes or {}).items() if k in inputs}
    feeds = random_feeds(a, batch=DIFFERENCE_BATCH, seed=seed, shapes=given)
    left, right = run(a, feeds), run(b, _for(b, feeds))
    count = len(next(iter(feeds.values()), np.zeros(1)))
    scores = score_output(left, count), score_output(right, count)
    same = None
    if scores[0] is not None and scores[1] is not None:
        same = agreement(scores[0], scores[1])
    return _Outputs(
        difference_of(left, right), same, (None, None), f"{count} random inputs, N(0, 1)"
    )


def _on_images(
    a: ModelLike, b: ModelLike, images: ImageSet, provider: str, threads: int
) -> _Outputs:
    scores = [logits(m, images, provider=provider, threads=threads) for m in (a, b)]
    spec = image_input(a)
    check_fits(images, spec.shape, spec.name)
    fixed = spec.shape[0] if spec.shape else None
    size = fixed if isinstance(fixed, int) else min(DIFFERENCE_BATCH, len(images))
    x = images.take(np.arange(size) % len(images)).array().astype(spec.dtype)
    feeds = {spec.name: x}
    difference = difference_of(run(a, feeds), run(b, _for(b, feeds)))
    top1: tuple[float | None, float | None] = (None, None)
    if images.y is not None:
        top1 = topk(scores[0], images.y, label(a))[0], topk(scores[1], images.y, label(b))[0]
    same = agreement(scores[0], scores[1])
    return _Outputs(difference, same, top1, f"{len(images)} images")


def _for(model: ModelLike, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The reference's feeds under the model's own input names, by order where the names differ."""
    specs = input_specs(model)
    if {s.name for s in specs} == set(feeds):
        return dict(feeds)
    if len(specs) != len(feeds):
        raise ModelError(f"the models have {len(feeds)} and {len(specs)} inputs; expected as many")
    return {s.name: v for s, v in zip(specs, feeds.values(), strict=True)}
