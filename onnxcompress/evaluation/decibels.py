"""Ratios of signal to noise in decibels, of numbers and of classes."""

from __future__ import annotations

import math

import numpy as np

EQUAL_DB = 200.0
"""Signal to noise ratio that stands for no noise at all: float64 has about 300 dB."""
FAITHFUL_DB = 30.0
"""Signal to noise ratio above which the variation between inputs is not considered."""


def decibels(signal: float, noise: float) -> float:
    """Compute the signal to noise ratio of two sums of squares in decibels.

    Args:
        signal: Sum of squares of the signal.
        noise: Sum of squares of the noise.

    Returns:
        The ratio, clipped to ±EQUAL_DB.
    """
    if noise == 0:
        return EQUAL_DB
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / noise), -EQUAL_DB, EQUAL_DB))


def variation_db(signal: float, variation: float, noise: float) -> float:
    """Compute variation to noise in decibels; signal to noise for what does not vary.

    Args:
        signal: Sum of squares of the signal.
        variation: Sum of squares of what varies in it between inputs.
        noise: Sum of squares of the noise.

    Returns:
        The ratio, clipped to ±EQUAL_DB.
    """
    return decibels(variation if variation > 1e-12 * signal else signal, noise)


def varying(y: np.ndarray) -> np.ndarray:
    """Subtract the mean over inputs.

    Args:
        y: Values, (runs, batch, …).

    Returns:
        What is left, of the same shape.
    """
    axes = tuple(range(min(2, y.ndim)))
    return np.asarray(y - y.mean(axis=axes, keepdims=True))


def integers_db(a: np.ndarray, b: np.ndarray) -> float:
    """Compute how far equal integers exceed others, in decibels, as a signal exceeds noise.

    Whether they are classes or numbers (pixels that were rounded) is unknown, so the kinder ratio counts:
    that of numbers, and κ / (1 − κ) of classes, with κ the agreement beyond chance (Cohen 1960, A
    coefficient of agreement for nominal scales). What chance explains of few values is to their good: κ is
    the upper end of its 95 % interval (Wilson's). Where all values were the same, or nearly all are equal,
    chance is not subtracted.

    Args:
        a: Integers or booleans before, (runs, batch, …).
        b: The same after.

    Returns:
        The ratio, clipped to ±EQUAL_DB.
    """
    if np.array_equal(a, b):
        return EQUAL_DB
    equal = float((a == b).mean())
    plain = decibels(equal, 1 - equal)
    if (a == a.flat[0]).all():
        return plain
    y, z = a.astype(np.float64), b.astype(np.float64)
    signal, changed, noise = (float(np.square(v).sum()) for v in (y, varying(y), z - y))
    numbers = variation_db(signal, changed, noise)
    if plain >= FAITHFUL_DB:
        return max(numbers, plain)
    (known, before), (found, after) = (np.unique(v, return_counts=True) for v in (a, b))
    _, i, j = np.intersect1d(known, found, assume_unique=True, return_indices=True)
    chance = float((before[i] / a.size) @ (after[j] / a.size))
    kappa = (_upper_end(equal, a.size) - chance) / (1 - chance)
    kappa = min(max(kappa, 0.0), 1 - 0.5 / a.size)
    return max(numbers, decibels(kappa, 1 - kappa))


def _upper_end(share: float, count: int) -> float:
    """Return the upper end of the 95 % interval of a share (Wilson 1927)."""
    z = 1.96
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (middle + spread) / (1 + z * z / count)
