"""Solve for the levels of layers that meet, by least squares. See `scales`.

The unknowns are the levels y: one for each stream with a shared scale, and one for each side of a stream
with per-layer scales. The log ranges of both sides of a layer move by y(rows) - y(columns). Given the log
ranges t of the sides, the following must vanish:

    shared scale       mean over readers of t  -  mean over writers of t          one equation per stream
    per-layer scale    t of each side  -  mean over all sides of t                one equation per side

Each side is in at most one stream, so both maps and their transposes cost one pass over the sides, and the
system is solved by LSMR (Fong & Saunders, 2011), which needs no matrix. Started at zero, it converges to
the solution of least norm. Levels change no layer's precision, so it costs nothing to stop before the last
digit, as happens with thousands of layers in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RELATIVE_TOLERANCE = 1e-11
"""Size of the gradient, relative to the system and the residual, at which the solver stops."""
STEPS = 2000
"""Iterations of the solver, at most."""


@dataclass(frozen=True)
class Meeting:
    """The sides that meet in one stream; side 2i is the rows of layer i, side 2i + 1 its columns."""

    sides: Sequence[int]
    shared_scale: bool


class LevelSystem:
    """The linear system whose solution equalizes the largest ranges of layers that meet."""

    def __init__(self, unknown: np.ndarray, signs: np.ndarray, meetings: Sequence[Meeting]) -> None:
        """Set up the system.

        Args:
            unknown: Number of the level of each side, (sides,); -1: it has none.
            signs: 1 for rows, -1 for columns, (sides,).
            meetings: The streams, each side in one of them at most.
        """
        self.unknown, self.signs = unknown, signs
        self.moves = np.flatnonzero(unknown >= 0)
        self.count = int(unknown.max(initial=-1)) + 1
        self.group = np.full(len(unknown), -1)
        self.weight = np.zeros(len(unknown))
        per_layer_scale = np.zeros(len(unknown), np.bool_)
        self.groups = len(meetings)
        for at, meeting in enumerate(meetings):
            members = np.array(meeting.sides)
            self.group[members] = at
            if meeting.shared_scale:
                reads = signs[members] < 0
                self.weight[members] = np.where(reads, 1 / max(reads.sum(), 1), -1 / max((~reads).sum(), 1))
            else:
                self.weight[members] = 1 / len(members)
                per_layer_scale[members] = True
        self.per_layer_scale = np.flatnonzero(per_layer_scale)
        self.shared_scale = np.flatnonzero((self.group >= 0) & ~per_layer_scale)

    def solve(self, tops: np.ndarray) -> np.ndarray:
        """Solve for the levels by LSMR (Fong & Saunders, 2011).

        Args:
            tops: Log of the largest range of each side, (sides,).

        Returns:
            The level of each side, (sides,); 0 where it has none.
        """
        from scipy.sparse.linalg import LinearOperator, lsmr

        shape = (self.groups + len(self.per_layer_scale), self.count)
        moved = LinearOperator(
            shape, lambda y: self._unequal(self._moved(y)), rmatvec=self._back, dtype=np.float64
        )
        unequal = self._unequal(tops)
        y = lsmr(moved, -unequal, atol=RELATIVE_TOLERANCE, btol=0.0, conlim=0.0, maxiter=STEPS)[0]
        levels = np.zeros(len(self.unknown))
        levels[self.moves] = y[self.unknown[self.moves]]
        return levels

    def _moved(self, y: np.ndarray) -> np.ndarray:
        """Compute by how much the levels move the ranges, (sides,)."""
        own = np.zeros(len(self.unknown))
        own[self.moves] = self.signs[self.moves] * y[self.unknown[self.moves]]
        return np.repeat(own.reshape(-1, 2).sum(1), 2)

    def _unequal(self, ranges: np.ndarray) -> np.ndarray:
        """Compute what must vanish, (streams + sides with per-layer scales,)."""
        means = np.bincount(
            self.group[self.shared_scale], (self.weight * ranges)[self.shared_scale], self.groups
        )
        return np.concatenate([means, self._centred(ranges)[self.per_layer_scale]])

    def _back(self, residual: np.ndarray) -> np.ndarray:
        """Apply the transpose of `_unequal` after `_moved`, (levels,)."""
        ranges = np.zeros(len(self.unknown))
        ranges[self.per_layer_scale] = residual[self.groups :]
        ranges = self._centred(ranges)
        ranges[self.shared_scale] = self.weight[self.shared_scale] * residual[self.group[self.shared_scale]]
        ranges = self.signs * np.repeat(ranges.reshape(-1, 2).sum(1), 2)
        return np.bincount(self.unknown[self.moves], ranges[self.moves], self.count)

    def _centred(self, ranges: np.ndarray) -> np.ndarray:
        """Subtract the stream's mean from sides with per-layer scales, (sides,); 0 elsewhere."""
        centred = np.zeros(len(ranges))
        at = self.per_layer_scale
        means = np.bincount(self.group[at], (self.weight * ranges)[at], self.groups)
        centred[at] = ranges[at] - means[self.group[at]]
        return centred
