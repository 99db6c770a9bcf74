"""Accuracy of a classifier in onnxruntime, and how often two of them agree."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxcompress.data.image_set import ImageSet, check_fits
from onnxcompress.data.input_shapes import named, parse_input_shapes, sized
from onnxcompress.data.preprocess import Choice, choose
from onnxcompress.errors import InputError, ModelError, OptionError, one_line
from onnxcompress.model.model_like import (
    InputSpec,
    ModelLike,
    display_names,
    input_specs,
    label,
    metadata_of,
)
from onnxcompress.progress import Progress, silent
from onnxcompress.runtime.inference import unread_feeds
from onnxcompress.runtime.providers import ProviderLike
from onnxcompress.runtime.session import pick_provider, session


@dataclass(frozen=True)
class Accuracy:
    """Shares of `count` images, 0 to 1."""

    top1: float
    top5: float
    """Top-n, where the network has n < 5 classes."""
    count: int
    seconds: float
    """Of running the network, loading excluded."""
    provider: str
    settings: dict[str, bool | int | str] = field(default_factory=dict)
    """Of the provider (`Provider.settings`)."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of top-1 for images drawn at random (Wilson's score)."""
        from scipy.stats import binomtest

        right = round(self.top1 * self.count)
        interval = binomtest(right, self.count).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)


def evaluate(
    model: ModelLike,
    images: ImageSet,
    *,
    provider: ProviderLike = "auto",
    batch: int = 64,
    threads: int = 0,
    output: str | None = None,
    progress: Progress = silent,
) -> Accuracy:
    """Top-1 and top-5 on labelled images.

    Raises InputError where labels are missing or beyond the network's classes, and as `logits`.
    """
    if images.y is None:
        raise InputError("the images have no labels; accuracy needs class folders or y in the .npz")
    chosen = pick_provider(provider)
    start = time.perf_counter()
    scores = logits(
        model, images, provider=chosen, batch=batch, threads=threads, output=output, progress=progress
    )
    seconds = time.perf_counter() - start
    top1, top5 = topk(scores, images.y, label(model))
    return Accuracy(top1, top5, len(images), seconds, chosen.name, chosen.settings)


def topk(scores: np.ndarray, y: np.ndarray, name: str = "model") -> tuple[float, float]:
    """Top-1 and top-5 of (N, classes) scores. Of equal scores the lower class comes first."""
    classes = scores.shape[1]
    if int(y.max()) >= classes:
        raise InputError(
            f"{name}: a label is {int(y.max())}, the network has {classes} classes; labels are class "
            "indices from 0"
        )
    own = np.take_along_axis(scores, y[:, None], axis=1)
    ahead = (scores > own) | ((scores == own) & (np.arange(classes) < y[:, None]))
    rank = ahead.sum(axis=1)
    return float((rank < 1).mean()), float((rank < 5).mean())


def logits(
    model: ModelLike,
    images: ImageSet,
    *,
    provider: ProviderLike = "auto",
    batch: int = 64,
    threads: int = 0,
    output: str | None = None,
    progress: Progress = silent,
) -> np.ndarray:
    """Scores of all images, (N, classes): the output `output`, or the first one of that form.

    A fixed batch of the model wins over `batch`; the last batch is then filled up and cut again.
    Raises InputError where the images do not fit the input, ModelError for NaN scores or none.
    """
    if batch < 1:
        raise OptionError(f"batch: {batch}; expected 1 or more")
    spec = image_input(model)
    check_fits(images, spec.shape, spec.name)
    opened = session(model, provider=provider, threads=threads)
    fixed = spec.shape[0] if spec.shape else None
    size = fixed if isinstance(fixed, int) else batch
    names = [o.name for o in opened.get_outputs()]
    if output is not None:
        if output not in names:
            raise OptionError(f"output: {output!r}; {label(model)} has {', '.join(names)}")
        names = [output]
    parts, others = [], unread_feeds(model)
    for x, real in _feeds(images, spec, size, pad=isinstance(fixed, int)):
        try:
            values = opened.run(names, {spec.name: x, **others})
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ModelError(f"{label(model)}: the run failed ({one_line(error)})") from error
        index, scores = _scores(values, names, len(x), label(model))
        names = [names[index]]
        parts.append(scores[:real])
        progress(f"running {display_names([model])[0]}", sum(map(len, parts)), len(images))
    scores = np.concatenate(parts)
    _check_nan(scores, f"{label(model)}: output {names[0]!r}", images)
    return scores


def _check_nan(scores: np.ndarray, where: str, images: ImageSet) -> None:
    bad = np.flatnonzero(np.isnan(scores).any(axis=1))
    if bad.size:
        first = images.names[bad[0]]
        raise ModelError(f"{where} is NaN for {bad.size} of {len(scores)} images, first {first}")


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Share of rows of (N, classes) scores with the same largest class."""
    if a.shape != b.shape:
        raise ModelError(f"scores of shapes {list(a.shape)} and {list(b.shape)} cannot be compared")
    return float((a.argmax(axis=1) == b.argmax(axis=1)).mean())


def image_input(model: ModelLike) -> InputSpec:
    """The one input that the model reads. Raises ModelError where there are none or several."""
    specs = [spec for spec in input_specs(model) if spec.read]
    if len(specs) != 1:
        names = ", ".join(s.name for s in specs) or "none"
        raise ModelError(
            f"{label(model)}: networks with one input are handled, this reads {len(specs)} ({names}); make "
            "all but one of them initializers with the values that they have in use"
        )
    return specs[0]


def preprocessing(model: ModelLike, given: str | None, input_shape: str | None = None) -> Choice:
    """How images become the model's input, and who said so.

    Args:
        model: with one input.
        given: the text of --preprocess, if there is one.
        input_shape: the text of --input-shape; images are brought to its size where no other is said.

    Raises:
        OptionError: a text that cannot be read, or contradicts the model.
    """
    spec = image_input(model)
    choice = choose(given, metadata_of(model), label(model), spec.dtype)
    shape = named(parse_input_shapes(input_shape), [spec], label(model)).get(spec.name)
    how = choice.preprocess
    if shape is None or len(shape) != 4 or how.size is not None:
        return choice
    sized(spec, shape, label(model))  # it contradicts nothing
    sides = shape[2:] if how.layout == "nchw" else shape[1:3]
    return replace(choice, said=replace(how, size=(sides[0], sides[1])), source="option")


def score_output(values: dict[str, np.ndarray], count: int) -> np.ndarray | None:
    """The first of a run's outputs that has the form of scores, (count, classes)."""
    return next((s for v in values.values() if (s := _squeezed(v, count)) is not None), None)


def _squeezed(value: Any, count: int) -> np.ndarray | None:
    if not isinstance(value, np.ndarray) or value.ndim < 2 or value.shape[0] != count:
        return None
    if value.shape[1] < 2 or any(d != 1 for d in value.shape[2:]):
        return None
    return np.asarray(value.reshape(value.shape[:2]), np.float32)


def _scores(values: list[Any], names: list[str], count: int, model: str) -> tuple[int, np.ndarray]:
    for index, value in enumerate(values):
        scores = _squeezed(value, count)
        if scores is not None:
            return index, scores
    shapes = ", ".join(f"{n} {list(getattr(v, 'shape', []))}" for n, v in zip(names, values, strict=True))
    raise ModelError(f"{model}: no output of shape [{count}, classes]; got {shapes}")


def _feeds(images: ImageSet, spec: InputSpec, size: int, *, pad: bool) -> Iterator[tuple[np.ndarray, int]]:
    """Batches in the input's type, and how many of each are images rather than filling."""
    for x in images.batches(size):
        if spec.dtype.kind in "iu" and not np.array_equal(x, np.round(x)):
            raise InputError(
                f"input {spec.name!r} takes {spec.dtype} pixels; use --preprocess raw, not mean and std"
            )
        real = len(x)
        if pad and real < size:
            x = np.concatenate([x, np.repeat(x[-1:], size - real, axis=0)])
        yield x.astype(spec.dtype, copy=False), real
