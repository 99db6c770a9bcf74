"""Whether corrected biases bring the outputs nearer to the reference's, on inputs nothing was learned from.

The record's means are those of the training set under Gaussians, sums taken as independent: where that is
far off, or the biases were corrected before (prune and quantize do it), the correction does harm. Outputs
of reference and model before and after are compared in onnxruntime on each kind of input by itself: images
that were kept aside where there are any, else noise with the input's statistics and procedural images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from onnxcompress.account import BeforeAfter
from onnxcompress.errors import CompressError, ModelError
from onnxcompress.formatting import counted
from onnxcompress.model import Model
from onnxcompress.model.model_like import InputSpec, input_specs
from onnxcompress.optimize.synthesis.drawn_inputs import Samples
from onnxcompress.optimize.synthesis.synthetic_inputs import synthetic_images
from onnxcompress.runtime.inference import or_one_by_one, random_feeds, unread_feeds
from onnxcompress.runtime.inference import run as run_model
from onnxcompress.statistics.record import known_statistics

SAMPLES = 16
"""Inputs of each kind."""
SEED = 7_331
"""Far from the seeds that inputs are learned from with."""
SLACK = 0.05
"""Decibels that an output may lose: the spread between draws of this many samples."""
EXACT = 120.0
"""Decibels from which on two outputs are the same."""

Feeds = list[dict[str, np.ndarray]]


def check_nearer(reference: Model, before: Model, after: Model, kept: Samples | None) -> BeforeAfter:
    """Compare the outputs before and after the correction with the reference's.

    Args:
        reference: The model before its weights were changed.
        before: The model as it came.
        after: The model with corrected biases.
        kept: Real images that the means were not taken from, where there are any.

    Returns:
        Signal to noise of the worst output, in decibels, at most EXACT.

    Raises:
        ModelError: An output is further from the reference than it was, or none can be compared.
    """
    worst = BeforeAfter(EXACT, EXACT)
    exactly = or_one_by_one(lambda batch: list(_exactly(reference, kept, batch)), SAMPLES)
    for kind, feeds, wanted in exactly:
        old, new = (_outputs(one, feeds) for one in (before, after))
        for name, exact in wanted.items():
            was, now = (_decibels(exact, _like(name, exact, values)) for values in (old, new))
            if now < was - SLACK:
                raise ModelError(
                    f"{after.name}: corrected biases would bring output {name!r} further from the "
                    f"reference's, from {was:.1f} to {now:.1f} dB of signal to noise on {kind}; "
                    "nothing is changed. The means that the correction rests on do not hold here, or the "
                    "biases are corrected already (prune and quantize do it); try --inputs images"
                )
            worst = BeforeAfter(min(worst.before, was), min(worst.after, now))
    return worst


def _exactly(
    reference: Model, kept: Samples | None, batch: int
) -> Iterator[tuple[str, Feeds, dict[str, list[np.ndarray]]]]:
    """Yield inputs, kind by kind, and the reference's outputs."""
    for kind, feeds in _kinds(reference, kept, batch):
        yield kind, feeds, _outputs(reference, feeds)


def _kinds(reference: Model, kept: Samples | None, batch: int) -> Iterator[tuple[str, Feeds]]:
    """Yield inputs, kind by kind, in batches that the file takes."""
    specs = [spec for spec in input_specs(reference) if spec.read]
    others = unread_feeds(reference)
    fixed = specs[0].shape[0] if len(specs) == 1 and specs[0].shape else None
    size = fixed if isinstance(fixed, int) else batch
    if kept is not None and len(kept) >= (fixed if isinstance(fixed, int) else 1):
        yield f"{counted(len(kept), 'image')} kept aside", _fed(specs[0], kept, size, others)
        return
    yield "random noise", _noise(reference, batch)
    try:
        made = synthetic_images(reference, "procedural", max(SAMPLES, size), None, SEED)
    except CompressError:  # the network takes no pictures
        return
    yield "procedural images", _fed(specs[0], made, size, others)


def _fed(spec: InputSpec, images: Samples, size: int, others: Mapping[str, np.ndarray]) -> Feeds:
    """Images in batches; a fixed batch leaves the rest of them out."""
    batches = [x for x in images.batches(size) if spec.takes(x.shape)]
    return [{spec.name: x.astype(spec.dtype), **others} for x in batches]


def _noise(reference: Model, batch: int) -> Feeds:
    """Random inputs; those whose statistics the file knows have them."""
    known = known_statistics(reference)
    feeds: Feeds = []
    samples = 0
    while samples < SAMPLES:
        drawn = random_feeds(reference, batch=batch, seed=SEED + len(feeds))
        for name in drawn.keys() & known.keys():
            spread = (-1, *[1] * (drawn[name].ndim - 2))
            mean, std = (part.reshape(spread) for part in (known[name].mean, known[name].std))
            drawn[name] = (mean + std * drawn[name]).astype(drawn[name].dtype)
        feeds.append(drawn)
        samples += max((len(x) if x.ndim else 1 for x in drawn.values()), default=SAMPLES)
    return feeds


def _outputs(model: Model, feeds: Feeds) -> dict[str, list[np.ndarray]]:
    """Collect the values of each float output, one after the other."""
    found: dict[str, list[np.ndarray]] = {}
    for one in feeds:
        for name, value in run_model(model, one).items():
            if value.dtype.kind == "f":
                found.setdefault(name, []).append(value.astype(np.float64).reshape(-1))
    return found


def _like(
    name: str, exact: Sequence[np.ndarray], found: Mapping[str, list[np.ndarray]]
) -> list[np.ndarray]:
    values = found.get(name, [])
    if [v.shape for v in values] != [v.shape for v in exact]:
        raise ModelError(f"output {name!r} of the reference has no like in the model: another --reference?")
    return values


def _decibels(exact: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Compute 10 log₁₀ of the exact output's variance over the mean squared difference, at most EXACT."""
    a, b = np.concatenate(list(exact)), np.concatenate(list(found))
    there = np.isfinite(a)
    if not np.isfinite(b[there]).all():
        return -EXACT
    a, b = a[there], b[there]
    signal, noise = float(a.var()) if a.size else 0.0, float(np.square(a - b).mean()) if a.size else 0.0
    if noise <= signal * 10 ** (-EXACT / 10):
        return EXACT
    return float(10 * np.log10(max(signal, 1e-300) / noise))
