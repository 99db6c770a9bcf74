"""Figures that `equalize` tells, of weights whose ranges are powers of two."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.model import Model
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.equalize.equalize import EqualizeFigures
from tests.helpers.folding import graph
from tests.helpers.results import figures_of


def figures(rows: list[float], columns: list[float], body: str = "y = Conv(r, v)") -> EqualizeFigures:
    """Of a pair of layers: rows of the first and columns of the second have these largest magnitudes."""
    w = np.array(rows, np.float32).reshape(-1, 1, 1, 1) * np.array([1, -0.5], np.float32).reshape(
        1, 2, 1, 1
    )
    v = np.array(columns, np.float32).reshape(1, -1, 1, 1) * np.array([0.25, 1, -0.75]).reshape(3, 1, 1, 1)
    arrays = {"w": w, "v": v.astype(np.float32)}
    model = Model.from_proto(
        graph("(float[N,2,4,4] x) => (float[N,3,4,4] y)", f"c = Conv(x, w) r = Relu(c) {body}", arrays)
    )
    return figures_of(Equalize().apply(model), EqualizeFigures)


def test_bits_that_one_scale_costs_are_the_mean_distance_to_the_largest_range() -> None:
    """Rows 3, 2, 1 and 0 bits below it, columns the other way round; then all are alike."""
    found = figures([1, 2, 4, 8], [8, 4, 2, 1])
    assert found.lost_bits.before == pytest.approx(1.5)
    assert found.lost_bits.after == pytest.approx(0, abs=1e-3)
    assert found.largest_scale == pytest.approx(8**0.5, rel=1e-3)  # sqrt(8 / 1), of the first row
    assert (found.layers, found.equalized, found.nodes_added, found.recorded) == (2, 1, 0, 0)
    assert found.converged


def test_what_cannot_be_shared_out_is_halved() -> None:
    """Columns that are alike take over half of what the rows differ by."""
    found = figures([1, 2, 4, 8], [1, 1, 1, 1])
    assert found.lost_bits.before == pytest.approx((3 + 2 + 1 + 0) / 8)
    assert found.lost_bits.after == pytest.approx((1.5 + 1 + 0.5 + 0) / 4, abs=1e-3)


def test_a_channel_a_thousandth_of_the_largest_is_dead() -> None:
    """It keeps its scale and costs no bits; one that is ten times as large counts."""
    alive, dead = (figures([8, 8, 8, 8 * part], [1, 1, 1, 1]) for part in (0.01, 0.0005))
    assert alive.lost_bits.before == pytest.approx(np.log2(100) / 8)
    assert alive.largest_scale == pytest.approx((1 / 0.08) ** 0.5, rel=1e-3)
    assert dead.lost_bits.before == 0
