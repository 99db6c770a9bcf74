"""Measure the accuracy of a classifier in onnxruntime, and how often two classifiers agree."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxcompress.data.image_set import ImageSet, check_fits
from onnxcompress.data.input_shapes import check_layout, named, parse_input_shapes, sized
from onnxcompress.data.preprocessing_choice import PreprocessingChoice, choose
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
from onnxcompress.runtime.inference import or_one_by_one, unread_feeds
from onnxcompress.runtime.providers import ProviderLike
from onnxcompress.runtime.session import pick_provider, session

Z_95 = 1.959963984540054
"""Deviations that 95 % of a normal distribution lie within."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over `count` images, as shares from 0 to 1."""

    top1: float
    top5: float
    """Top-n accuracy where the network has n < 5 classes."""
    count: int
    seconds: float
    """Time that the network ran, without loading images."""
    provider: str
    settings: dict[str, bool | int | str] = field(default_factory=dict)
    """The provider's settings (`Provider.settings`)."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of top-1 for images drawn at random (Wilson's score)."""
        # closed: scipy.stats, which has it, takes half a second to import
        p, n, z = self.top1, self.count, Z_95
        centre = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        scale = 1 + z * z / n
        return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


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
    """Measure top-1 and top-5 accuracy on labelled images.

    Args:
        model: The classifier.
        images: Images with labels.
        provider: The execution provider.
        batch: Images per run, 1 or more.
        threads: Threads of one operator; 0: the available cores.
        output: Name of the output with the scores; None: the first of that form.
        progress: Called with the stage, the images done and the images in all.

    Returns:
        The accuracy.

    Raises:
        InputError: Labels are missing or beyond the network's classes, or the images do not fit the input.
        CompressError: As `logits`.
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
    """Compute top-1 and top-5 accuracy; of equal scores the lower class ranks first.

    Args:
        scores: Scores, (N, classes).
        y: Class indices, (N,).
        name: Name of the model in messages.

    Returns:
        Shares from 0 to 1.

    Raises:
        InputError: A label is beyond the network's classes.
    """
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
    """Compute the class scores of all images.

    A batch size that the model fixes takes precedence over `batch`; the last batch is then padded, and the
    padding removed from the scores. Where the file leaves the batch open and yet only one image at a time
    runs, images go one by one.

    Args:
        model: The classifier.
        images: The images.
        provider: The execution provider.
        batch: Images per run, 1 or more.
        threads: Threads of one operator; 0: the available cores.
        output: Name of the output with the scores; None: the first of that form.
        progress: Called with the stage, the images done and the images in all.

    Returns:
        Scores, (N, classes) float32.

    Raises:
        OptionError: `batch` is below 1, or the model has no such output.
        InputError: The images do not fit the input.
        ModelError: There are no scores, or some are NaN, or onnxruntime refuses the model.
        RuntimeUnavailable: The provider cannot start.
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
    others, shown = unread_feeds(model), f"running {display_names([model])[0]}"

    def run_in_batches(size: int) -> tuple[np.ndarray, str]:
        """Return the scores of all images, `size` of them at once, and the output's name."""
        asked, parts = list(names), []
        for x, real in _feeds(images, spec, size, pad=isinstance(fixed, int)):
            try:
                values = opened.run(asked, {spec.name: x, **others})
            except Exception as error:  # onnxruntime's exceptions have no common base
                raise ModelError(f"{label(model)}: the run failed ({one_line(error)})") from error
            index, scores = _scores(values, asked, len(x), label(model))
            asked = [asked[index]]
            parts.append(scores[:real])
            progress(shown, sum(map(len, parts)), len(images))
        return np.concatenate(parts), asked[0]

    scores, name = or_one_by_one(run_in_batches, size)
    _check_nan(scores, f"{label(model)}: output {name!r}", images)
    return scores


def _check_nan(scores: np.ndarray, where: str, images: ImageSet) -> None:
    bad = np.flatnonzero(np.isnan(scores).any(axis=1))
    if bad.size:
        first = images.names[bad[0]]
        raise ModelError(f"{where} is NaN for {bad.size} of {len(scores)} images, first {first}")


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the share of inputs for which two models predict the same class.

    Args:
        a: Scores of one model, (N, classes).
        b: Scores of the other.

    Returns:
        The share, from 0 to 1.

    Raises:
        ModelError: The shapes differ.
    """
    if a.shape != b.shape:
        raise ModelError(f"scores of shapes {list(a.shape)} and {list(b.shape)} cannot be compared")
    return float((a.argmax(axis=1) == b.argmax(axis=1)).mean())


def image_input(model: ModelLike) -> InputSpec:
    """Return the only input that the model reads.

    Args:
        model: The model.

    Returns:
        The input.

    Raises:
        ModelError: It reads none or several.
    """
    specs = [spec for spec in input_specs(model) if spec.read]
    if len(specs) != 1:
        names = ", ".join(s.name for s in specs) or "none"
        raise ModelError(
            f"{label(model)}: only networks with one input are handled, this one reads {len(specs)} "
            f"({names}); turn all but one into initializers with the values that they have in use"
        )
    return specs[0]


def preprocessing(
    model: ModelLike, given: str | None, input_shape: str | Mapping[str, Sequence[int]] | None = None
) -> PreprocessingChoice:
    """Choose how images become the model's input.

    Args:
        model: A model with one input.
        given: The text of --preprocess, if it is given.
        input_shape: The text of --input-shape, or the shapes in it by name; images are brought to its size
            where no other is given.

    Returns:
        The preprocessing and where it comes from.

    Raises:
        OptionError: A text cannot be read, or contradicts the model.
        ModelError: The model reads no input or several.
    """
    spec = image_input(model)
    choice = choose(given, metadata_of(model), label(model), spec.dtype)
    if isinstance(input_shape, Mapping):
        shapes = {name: tuple(sizes) for name, sizes in input_shape.items() if name in ("", spec.name)}
    else:
        shapes = parse_input_shapes(input_shape)
    shape = named(shapes, [spec], label(model)).get(spec.name)
    chosen = choice.preprocess
    check_layout(spec.shape, chosen.layout, f"{label(model)}: input {spec.name!r}")
    if shape is None or len(shape) != 4:
        return choice
    sized(spec, shape, label(model))  # raises where the shape contradicts the file
    sides = shape[2:] if chosen.layout == "nchw" else shape[1:3]
    if chosen.size is not None:
        if tuple(chosen.size) != tuple(sides):
            raise OptionError(
                f"--input-shape gives {sides[0]}x{sides[1]}, --preprocess size={chosen.size[0]}x"
                f"{chosen.size[1]}; leave one of them out"
            )
        return choice
    return replace(choice, explicit=replace(chosen, size=(sides[0], sides[1])), source="option")


def score_output(values: dict[str, np.ndarray], count: int) -> np.ndarray | None:
    """Find the first of a run's outputs that has the form of class scores.

    Args:
        values: Outputs by name.
        count: Number of inputs in the batch.

    Returns:
        Scores, (count, classes) float32; None where no output has this form.
    """
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
    """Yield batches in the input's type, and the number of images in each that are not padding."""
    for x in images.batches(size):
        if spec.dtype.kind in "iu" and not np.array_equal(x, np.round(x)):
            raise InputError(
                f"input {spec.name!r} takes {spec.dtype} pixels; leave --preprocess out, or give one of "
                "whole numbers"
            )
        real = len(x)
        if pad and real < size:
            x = np.concatenate([x, np.repeat(x[-1:], size - real, axis=0)])
        yield x.astype(spec.dtype, copy=False), real
