"""Measure how well a pass preserves a model's outputs: signal to noise of each output and of its parts.

With y an output before the pass and ŷ the same output after it, over all inputs and elements,

    SNR = 10 log₁₀( Σ y² / Σ (y − ŷ)² )   in decibels.

The SNR also counts as signal what is the same for all inputs, which hides noise: a network with 10
classes that is right for one image in ten can have an SNR of 6 dB. So outputs are judged with the
variation between inputs as the signal, Σ (y − ȳ)² with ȳ the mean over inputs. An output that does not
vary is judged by its SNR, and so is one with an SNR of 30 dB and more: where probabilities are the same
for all these inputs, almost nothing varies, and any noise would be large in comparison.

Both ratios hide a part with small values beside large ones, such as the scores of a detection head beside
its boxes. So the channels (or columns) of an output are sorted by their root mean square, and split where
the next one is ten times as large; each part has a signal to noise ratio of its own. The rows of a Softmax
are not split: they are one distribution, in which small values matter little.

What a Sigmoid gives are answers of yes or no, mostly no: a text detector gives 1e-6 wherever there is no
text. Errors of such values count only as far as they exceed HALF_STEP. Where no value before exceeds it,
the inputs tell nothing of a yes (`unseen`), and noise is held against answers of which a share YES varies.

Besides, an output that is no longer finite, or has become the same for all inputs, is a fault whatever its
ratio. Integers and booleans (the index of a class) are judged by how much of them is equal beyond chance
(`decibels.integers_db`), and only where there are no floats: an index may change its place in a ranking.
Does not handle: outputs whose shape depends on the values of the inputs, as after NonMaxSuppression, and
floats that are not finite on any input.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.errors import ModelError
from onnxcompress.evaluation.decibels import FAITHFUL_DB, decibels, integers_db, variation_db, varying

Runs = Mapping[str, Sequence[np.ndarray]]
"""Values of each output by name, one per run; the runs of both models have the same inputs."""

UNLIKE = 10.0
"""Factor between root mean squares of channels from which on they belong to different parts."""
KIND = 0.05
"""Least share of all channels that a part has."""
SHORTER = 4
"""Least ratio of places to columns from which the axis of the columns is recognized."""
NO_VARIATION = 1e-3
"""Share of an output's energy below which it does not vary between inputs: -30 dB."""
HALF_STEP = 1 / 510
"""Half a step of a probability with 8 bits."""
YES = 0.01
"""Share of yes among answers, where the inputs show none."""
MANY = 1000
"""Number of integers from which on it says something that they have become all the same."""
CONSTANT = 1e-4
"""Share of the former variation between inputs below which an output has become constant."""


@dataclass(frozen=True)
class Part:
    """Channels (or columns) of an output whose values are of a like size."""

    axis: int
    """Dimension of the output that the channels are counted along."""
    first: int
    """Index of the first of the channels."""
    channels: int
    rms: float
    """Root mean square of the values before the pass."""
    snr_db: float
    """Signal to noise ratio, decibels."""
    variation_db: float
    """Variation between inputs to noise, decibels."""

    @property
    def judged_db(self) -> float:
        """The ratio that is compared with the floors, decibels."""
        return _judged(self.snr_db, self.variation_db)

    @property
    def text(self) -> str:
        """Description of the part for people."""
        several = f"{self.channels} channels from {self.first} on" if self.channels > 1 else ""
        return f"{several or f'channel {self.first}'} of dimension {self.axis} (values near {self.rms:.2g})"


@dataclass(frozen=True)
class OutputFidelity:
    """How well one output is preserved."""

    name: str
    snr_db: float | None
    """Signal to noise ratio, decibels; None for integers and booleans."""
    variation_db: float | None
    """Variation between inputs to noise, decibels; None for integers and booleans."""
    max_abs: float
    """Largest difference of an element."""
    max_rel: float
    """The same, divided by the largest magnitude of the output before the pass."""
    agreement: float | None = None
    """Share (0 to 1) of inputs with the same top-1 class, or of equal integers; None: no classes."""
    worst_part: Part | None = None
    """The part with the lowest ratio; None where all values are of similar size."""
    not_finite: int = 0
    """Elements that were finite before the pass and are not after it."""
    constant: bool = False
    """Whether the output depended on the input before the pass, and does not after it."""
    unseen: bool = False
    """Whether all its values are noes, in parts that a Sigmoid gives: the inputs tell nothing of a yes."""
    integers_db: float | None = None
    """How far equal integers or booleans exceed others, decibels; None for floats."""

    @property
    def judged_db(self) -> float:
        """The ratio that is compared with the floors, decibels: of the output or of its worst part."""
        return self.whole_db if self.worst_part is None else min(self.whole_db, self.worst_part.judged_db)

    @property
    def whole_db(self) -> float:
        """The ratio of the whole output, decibels."""
        if self.snr_db is None or self.variation_db is None:
            return math.inf if self.integers_db is None else self.integers_db
        return _judged(self.snr_db, self.variation_db)


@dataclass(frozen=True)
class Fidelity:
    """How well all outputs of a model are preserved."""

    outputs: tuple[OutputFidelity, ...]
    not_compared: tuple[str, ...] = ()
    """Outputs whose shape depends on the values of the inputs."""
    never_finite: tuple[str, ...] = ()
    """Outputs that were not finite on any of the inputs."""

    @property
    def floats(self) -> tuple[OutputFidelity, ...]:
        """The outputs that are no integers or booleans."""
        return tuple(one for one in self.outputs if one.snr_db is not None)

    @property
    def worst(self) -> OutputFidelity:
        """The output that keeps least: of the floats where there are any."""
        return min(self.floats or self.outputs, key=lambda one: one.judged_db)

    @property
    def furthest(self) -> OutputFidelity:
        """The output whose elements differ most, relatively: of the floats where there are any."""
        return max(self.floats or self.outputs, key=lambda one: one.max_rel)

    @property
    def furthest_text(self) -> str:
        """What it differs by, for people."""
        far = self.furthest
        if far.snr_db is None:
            changed = 100 * (1 - (far.agreement or 0.0))
            return f"integers that differ: {changed:.2g} % (output {far.name!r})"
        return (
            f"largest output difference: {far.max_abs:.2e} absolute, {far.max_rel:.2e} relative "
            f"(output {far.name!r})"
        )

    @property
    def agreement(self) -> float | None:
        """The least share of inputs with the same class, over outputs that have classes."""
        shares = [one.agreement for one in self.outputs if one.agreement is not None]
        return min(shares, default=None)


def fidelity(before: Runs, after: Runs, answers: Collection[str] = ()) -> Fidelity:
    """Compare the outputs of two models for the same inputs.

    Args:
        before: Outputs of the reference, by name.
        after: Outputs of the other model; matched by order where the names differ.
        answers: Outputs that a Sigmoid gives, or that hold what it gives (`graph.query.sigmoid_outputs`).

    Returns:
        The figures of each output.

    Raises:
        ModelError: The number of outputs or the shape of one differs.
    """
    if len(before) != len(after):
        raise ModelError(f"the model had {len(before)} outputs and would have {len(after)}")
    outputs: list[OutputFidelity] = []
    unlike: list[str] = []
    never_finite: list[str] = []
    for name, other in zip(before, before if set(before) == set(after) else after, strict=True):
        a, b = _stacked(before[name]), _stacked(after[other])
        if a is None or b is None:
            unlike.append(name)
        elif a.shape != b.shape:
            shapes = list(a.shape[1:]), list(b.shape[1:])
            raise ModelError(f"output {name!r} had the shape {shapes[0]} and would have {shapes[1]}")
        elif a.dtype.kind == "f" and a.size and not np.isfinite(a).any():
            never_finite.append(name)
        elif a.size:
            outputs.append(_compared(name, a, b, name in answers))
    return Fidelity(tuple(outputs), tuple(unlike), tuple(never_finite))


def _stacked(runs: Sequence[np.ndarray]) -> np.ndarray | None:
    """Stack runs to (runs, *shape); None where shapes differ between runs."""
    return np.stack(runs) if len({run.shape for run in runs}) == 1 else None


def _compared(name: str, a: np.ndarray, b: np.ndarray, answers: bool) -> OutputFidelity:
    """Compare one output, (runs, *shape) before and after."""
    if a.dtype.kind in "iub":
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
        top = np.abs(a.astype(np.float64)).max()
        same = float((a == b).mean())
        ruined = a.size >= MANY and _is_constant(a.astype(np.float64), b.astype(np.float64))
        return OutputFidelity(
            name, None, None, float(gap), _ratio(gap, top), same,
            constant=ruined, integers_db=integers_db(a, b),
        )  # fmt: skip
    y, z = a.astype(np.float64), b.astype(np.float64)
    lost = int((np.isfinite(y) & ~np.isfinite(z)).sum())
    usable = np.isfinite(y) & np.isfinite(z)
    y, z = np.where(usable, y, 0.0), np.where(usable, z, 0.0)
    noise = z - y
    gap, top = np.abs(noise).max(), np.abs(y).max()
    yes_or_no = _answers(y) if answers else np.zeros(y.shape, bool)
    noise = np.where(yes_or_no, np.sign(noise) * np.maximum(np.abs(noise) - HALF_STEP, 0), noise)
    unseen = bool(yes_or_no.any() and y[yes_or_no].max() < HALF_STEP)
    signal, wrong = float(np.square(y).sum()), float(np.square(noise).sum())
    changed = float(np.square(varying(y)).sum())
    if unseen and yes_or_no.all():
        signal = changed = YES * y.size
    return OutputFidelity(
        name,
        decibels(signal, wrong),
        variation_db(signal, changed, wrong),
        float(gap),
        _ratio(gap, top),
        _agreement(y, z),
        _worst_part(y, noise),
        lost,
        _is_constant(y, y + noise),
        unseen,
    )


def _answers(y: np.ndarray) -> np.ndarray:
    """Find the values of channels that lie between 0 and 1, which may be what a Sigmoid gives."""
    axis = _channel_axis(y.shape)
    others = None if axis is None else tuple(a for a in range(y.ndim) if a != axis)
    inside = (y.min(others, keepdims=True) >= 0) & (y.max(others, keepdims=True) <= 1)
    return np.broadcast_to(inside, y.shape)


def _judged(snr_db: float, variation_db: float) -> float:
    return snr_db if snr_db >= FAITHFUL_DB else variation_db


def _ratio(gap: float, top: float) -> float:
    if gap == 0:
        return 0.0
    return float(gap / top) if top > 0 else float("inf")


def _agreement(y: np.ndarray, z: np.ndarray) -> float | None:
    """Compute the share of inputs with the same largest class, where the output is (inputs, classes)."""
    if y.ndim < 3 or y.shape[2] < 2 or any(size != 1 for size in y.shape[3:]):
        return None
    return float((y.argmax(axis=2) == z.argmax(axis=2)).mean())


def _is_constant(y: np.ndarray, z: np.ndarray) -> bool:
    """Return whether the output distinguished inputs before, and no longer does."""
    was, now = (float(np.square(varying(values)).sum()) for values in (y, z))
    return was > NO_VARIATION * float(np.square(y).sum()) and now < CONSTANT * was


def _worst_part(y: np.ndarray, noise: np.ndarray) -> Part | None:
    """Find the part with the lowest ratio; None where all channels are of similar size."""
    axis = _channel_axis(y.shape)
    if axis is None or _is_distribution(y, axis):
        return None
    others = tuple(a for a in range(y.ndim) if a != axis)
    signal, changed, wrong = (np.square(v).sum(axis=others) for v in (y, varying(y), noise))
    parts = [
        Part(
            axis - 1,
            int(group.min()),
            len(group),
            float(np.sqrt(signal[group].mean() * y.shape[axis] / y.size)),
            decibels(float(signal[group].sum()), float(wrong[group].sum())),
            variation_db(*(float(values[group].sum()) for values in (signal, changed, wrong))),
        )
        for group in _like_sizes(np.sqrt(signal))
    ]
    return min(parts, key=lambda part: part.judged_db, default=None)


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """Find the axis of (runs, batch, …) along which channels of different kinds lie; None: unclear.

    In a matrix these are the columns; in (batch, places, columns), in either order, the axis that is much
    shorter; in maps dimension 1, as everywhere in ONNX. The other axes are places, whose values may differ.
    """
    if len(shape) == 4:
        short, long = sorted((2, 3), key=lambda axis: shape[axis])
        return short if SHORTER * shape[short] <= shape[long] else None
    return 2 if len(shape) > 2 else None


def _like_sizes(sizes: np.ndarray) -> list[np.ndarray]:
    """Group the indices of channels of similar size, one array for each part; empty for a single part.

    A few channels that happen to be almost dead are no part: each part has a share KIND of all channels.
    """
    order = np.argsort(sizes, kind="stable")
    order = order[sizes[order] > 0]
    ends = np.flatnonzero(sizes[order[1:]] >= UNLIKE * sizes[order[:-1]]) + 1
    groups = np.split(order, ends)
    return [] if len(groups) == 1 else [group for group in groups if len(group) >= KIND * len(sizes)]


def _is_distribution(y: np.ndarray, axis: int) -> bool:
    """Return whether the values along an axis are probabilities that sum to 1."""
    return bool(y.min() >= 0 and np.allclose(y.sum(axis=axis), 1, atol=1e-3))
