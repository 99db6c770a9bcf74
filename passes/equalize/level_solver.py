"""Levels of layers that meet, by least squares. See `_equalize_solve`.

Unknown are the levels y, one for each tied stream and one for each side of a loose one. The log ranges of
both sides of a layer move by y(rows) - y(columns). What must vanish, given the ranges t of the sides:

    tied     mean over readers of t  -  mean over writers of t          one row a stream
    loose    t of each side  -  mean over all sides of t                one row a side

Each side is in at most one stream, so both maps and their transposes cost one pass over the sides, and
the system is solved by LSMR (Fong & Saunders, 2011), which takes no matrix. From zero it goes to the
solution of least norm. Levels change no layer's precision, so an end before the last digit, as on
thousands of layers in a row, costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RELATIVE_TOLERANCE = 1e-11
"""What may be left of the gradient, relative to the system and the residual."""
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
        from scipy.sparse.linalg import LinearOperator, lsmr

        shape = (self.groups + len(self.loose), self.count)
        moved = LinearOperator(
            shape, lambda y: self._unequal(self._moved(y)), rmatvec=self._back, dtype=np.float64
        )
        unequal = self._unequal(tops)
        y = lsmr(moved, -unequal, atol=RELATIVE_TOLERANCE, btol=0.0, conlim=0.0, maxiter=STEPS)[0]
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
