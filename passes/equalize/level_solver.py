"""Levels of layers that meet, by least squares. See `_equalize_solve`.

Unknown are the levels y, one for each tied stream and one for each side of a loose one. The log ranges of
both sides of a layer move by y(rows) - y(columns). What must vanish, given the ranges t of the sides:

    tied     mean over readers of t  -  mean over writers of t          one row a stream
    loose    t of each side  -  mean over all sides of t                one row a side

Each side is in at most one stream, so both maps and their transposes cost one pass over the sides, and
conjugate gradients on the normal equations take no matrix (CGLS: Björck, Least Squares Problems, 1996,
§7.4). From zero they go to the solution of least norm. Levels change no layer's precision, so an end before
the last digit, as on thousands of layers in a row, costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ENOUGH = 1e-11
"""Of the gradient at zero: what may be left of it."""
STEPS = 2000


@dataclass(frozen=True)
class Meeting:
    """The sides, two for each layer in turn (rows, columns), that meet in one stream."""

    sides: Sequence[int]
    tied: bool


class LevelSystem:
    """`solve` gives what equalizes the largest ranges of layers that meet."""

    def __init__(self, unknown: np.ndarray, signs: np.ndarray, meetings: Sequence[Meeting]) -> None:
        """unknown: (sides,) number of each side's level, -1: none. signs: (sides,) 1 rows, -1 columns."""
        self.unknown, self.signs = unknown, signs
        self.moves = np.flatnonzero(unknown >= 0)
        self.count = int(unknown.max(initial=-1)) + 1
        self.group = np.full(len(unknown), -1)
        self.weight = np.zeros(len(unknown))
        loose = np.zeros(len(unknown), np.bool_)
        self.groups = len(meetings)
        for at, meeting in enumerate(meetings):
            members = np.array(meeting.sides)
            self.group[members] = at
            if meeting.tied:
                reads = signs[members] < 0
                self.weight[members] = np.where(reads, 1 / max(reads.sum(), 1), -1 / max((~reads).sum(), 1))
            else:
                self.weight[members] = 1 / len(members)
                loose[members] = True
        self.loose = np.flatnonzero(loose)
        self.tied = np.flatnonzero((self.group >= 0) & ~loose)

    def solve(self, tops: np.ndarray) -> np.ndarray:
        """(sides,) the level of each side, 0 where it has none; tops: (sides,) log of the largest range."""
        y = np.zeros(self.count)
        residual = -self._unequal(tops)
        gradient = self._back(residual)
        direction, size = gradient, float(gradient @ gradient)
        enough = ENOUGH**2 * size
        for _ in range(STEPS):
            if size <= enough:
                break
            step = self._unequal(self._moved(direction))
            length = float(step @ step)
            if length == 0.0:
                break
            y = y + (size / length) * direction
            residual = residual - (size / length) * step
            gradient = self._back(residual)
            before, size = size, float(gradient @ gradient)
            direction = gradient + (size / before) * direction
        found = np.zeros(len(self.unknown))
        found[self.moves] = y[self.unknown[self.moves]]
        return found

    def _moved(self, y: np.ndarray) -> np.ndarray:
        """(sides,) by how much the levels move the ranges."""
        own = np.zeros(len(self.unknown))
        own[self.moves] = self.signs[self.moves] * y[self.unknown[self.moves]]
        return np.repeat(own.reshape(-1, 2).sum(1), 2)

    def _unequal(self, ranges: np.ndarray) -> np.ndarray:
        """(groups + loose sides,) what must vanish."""
        means = np.bincount(self.group[self.tied], (self.weight * ranges)[self.tied], self.groups)
        return np.concatenate([means, self._centred(ranges)[self.loose]])

    def _back(self, residual: np.ndarray) -> np.ndarray:
        """(levels,) the transpose of `_unequal` after `_moved`."""
        ranges = np.zeros(len(self.unknown))
        ranges[self.loose] = residual[self.groups :]
        ranges = self._centred(ranges)
        ranges[self.tied] = self.weight[self.tied] * residual[self.group[self.tied]]
        ranges = self.signs * np.repeat(ranges.reshape(-1, 2).sum(1), 2)
        return np.bincount(self.unknown[self.moves], ranges[self.moves], self.count)

    def _centred(self, ranges: np.ndarray) -> np.ndarray:
        """(sides,) those of loose streams less their mean, 0 elsewhere."""
        found = np.zeros(len(ranges))
        at = self.loose
        means = np.bincount(self.group[at], (self.weight * ranges)[at], self.groups)
        found[at] = ranges[at] - means[self.group[at]]
        return found
