"""Confidence intervals of medians and of their ratios: block bootstrap over rounds.

Neighbouring rounds share their disturbances, so blocks of rounds are drawn, not single rounds (Künsch 1989,
The jackknife and the bootstrap for general stationary observations).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

RESAMPLES, QUICK_RESAMPLES = 2000, 300


@dataclass(frozen=True)
class Ratio:
    """median(b) / median(a) and its confidence interval: below 1, b is faster."""

    value: float
    low: float
    high: float


def ratio_of(pair: np.ndarray, confidence: float) -> Ratio:
    """Estimate the ratio of the medians of two columns, with its confidence interval.

    Args:
        pair: Samples, (rounds, 2); the second column is divided by the first.
        confidence: Confidence level of the interval, between 0 and 1.

    Returns:
        The ratio and its interval.
    """
    medians = bootstrap(pair, RESAMPLES)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians[:, 1] / medians[:, 0], [tail, 1 - tail])
    a, b = np.median(pair, axis=0)
    return Ratio(float(b / a), float(low), float(high))


def half_width(samples: np.ndarray, resamples: int = QUICK_RESAMPLES) -> float:
    """Compute the relative half width of the widest 95 % interval of the columns' ratios to the first.

    Args:
        samples: Samples, (rounds, models); with a single model, its median takes the place of the ratios.
        resamples: Number of bootstrap resamples.

    Returns:
        Half of the interval's width, as a share of its centre.
    """
    medians = bootstrap(samples, resamples)
    shown = medians if samples.shape[1] == 1 else medians[:, 1:] / medians[:, :1]
    low, high = np.quantile(shown, [0.025, 0.975], axis=0)
    return float(np.max((high - low) / 2 / np.median(shown, axis=0)))


def bootstrap(samples: np.ndarray, resamples: int) -> np.ndarray:
    """Resample the medians of all columns by a circular block bootstrap (Künsch 1989).

    Args:
        samples: Samples, (rounds, models).
        resamples: Number of resamples.

    Returns:
        Medians, (resamples, models).
    """
    rounds = len(samples)
    length = max(1, round(rounds ** (1 / 3)))
    rng = np.random.default_rng(rounds)
    medians = np.empty((resamples, samples.shape[1]))
    for index in range(resamples):  # one at a time: all at once would not fit the memory
        starts = rng.integers(0, rounds, ceil(rounds / length))
        picked = ((starts[:, None] + np.arange(length)) % rounds).ravel()[:rounds]
        medians[index] = np.median(samples[picked], axis=0)
    return medians
