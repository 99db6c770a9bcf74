"""Confidence intervals of medians, and of ratios of two models' latencies: block bootstrap over rounds.

Two models are compared round by round, since what slows a machine down for seconds or minutes slows both:
where it is slow for half of the time, a median over all rounds lies anywhere between the two speeds, and
a ratio of two such medians, too.

Neighbouring rounds share their disturbances, so blocks of rounds are drawn, not single rounds (Künsch 1989,
The jackknife and the bootstrap for general stationary observations).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, nan

import numpy as np

RESAMPLES, QUICK_RESAMPLES = 2000, 300


@dataclass(frozen=True)
class Ratio:
    """The median of b / a over the rounds, with its confidence interval: below 1, b is faster.

    The ends of the interval of a single round are not numbers (NaN).
    """

    value: float
    low: float
    high: float


def ratio_of(pair: np.ndarray, confidence: float) -> Ratio:
    """Estimate the median ratio of two columns, with its confidence interval.

    Args:
        pair: Samples, (rounds, 2); the second column is divided by the first.
        confidence: Confidence level of the interval, between 0 and 1.

    Returns:
        The ratio and its interval.
    """
    ratios = pair[:, 1:] / pair[:, :1]
    if len(ratios) < 2:
        return Ratio(float(ratios[0, 0]), nan, nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(bootstrap(ratios, RESAMPLES), [tail, 1 - tail])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def half_width(samples: np.ndarray, resamples: int = QUICK_RESAMPLES) -> float:
    """Compute the relative half width of the widest 95 % interval of the columns' ratios to the first.

    Args:
        samples: Samples, (rounds, models); with a single model, its median takes the place of the ratios.
        resamples: Number of bootstrap resamples.

    Returns:
        Half of the interval's width, as a share of its centre; infinite for a single round.
    """
    if len(samples) < 2:
        return inf
    shown = bootstrap(samples if samples.shape[1] == 1 else samples[:, 1:] / samples[:, :1], resamples)
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
