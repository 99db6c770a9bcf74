"""Levels without a matrix are those of least squares with one."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.passes.equalize.level_solver import LevelSystem, Meeting


def moves(unknown: np.ndarray, count: int) -> np.ndarray:
    """(sides, levels): both sides of a layer move by the level of its rows less that of its columns."""
    found = np.zeros((len(unknown), count))
    for rows in range(0, len(unknown), 2):
        for side in (rows, rows + 1):
            if unknown[rows] >= 0:
                found[side, unknown[rows]] += 1
            if unknown[rows + 1] >= 0:
                found[side, unknown[rows + 1]] -= 1
    return found


def differences(signs: np.ndarray, meetings: list[Meeting]) -> np.ndarray:
    """What must vanish, (equations, sides): readers less writers of streams with a shared scale, and each
    side less the mean of its stream where layers have their own."""
    shared, separate = [], {}
    for meeting in meetings:
        row = np.zeros(len(signs))
        if meeting.shared_scale:
            readers = [side for side in meeting.sides if signs[side] < 0]
            writers = [side for side in meeting.sides if signs[side] > 0]
            row[readers], row[writers] = 1 / len(readers), -1 / len(writers)
        shared.append(row)
        for side in () if meeting.shared_scale else meeting.sides:
            separate[side] = np.eye(len(signs))[side]
            separate[side][list(meeting.sides)] -= 1 / len(meeting.sides)
    return np.array([*shared, *(separate[side] for side in sorted(separate))])


@pytest.mark.parametrize("seed", range(6))
def test_levels_are_the_least_squares_solution_of_least_norm(seed: int) -> None:
    """Layers in a row, whose streams have a shared scale or one per layer, at random."""
    rng = np.random.default_rng(seed)
    layers = 12
    sides = rng.permutation(2 * layers)
    cuts = np.split(sides, np.sort(rng.choice(np.arange(2, 2 * layers, 2), 5, replace=False)))
    signs = np.where(np.arange(2 * layers) % 2, -1.0, 1.0)
    meetings, unknown, count = [], np.full(2 * layers, -1), 0
    for cut in cuts:
        shared = len(set(signs[cut])) == 2 and bool(rng.integers(2))
        unknown[cut] = count if shared else np.arange(count, count + len(cut))
        count += 1 if shared else len(cut)
        meetings.append(Meeting(cut.tolist(), shared))
    system, tops = LevelSystem(unknown, signs, meetings), rng.normal(size=2 * layers)
    ranges, unequal = moves(unknown, count), differences(signs, meetings)
    matrix = unequal @ ranges
    expected = np.linalg.lstsq(matrix, -unequal @ tops, rcond=1e-10)[0]
    np.testing.assert_allclose(system.solve(tops), expected[unknown], atol=1e-7)
    back = np.stack([system._back(one) for one in np.eye(len(matrix))], axis=1)
    np.testing.assert_allclose(back, matrix.T, atol=1e-12)
