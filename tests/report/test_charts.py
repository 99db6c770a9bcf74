"""Where charts draw their figures: ends of intervals, lengths of bars, ranges of axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onnxcompress.report.charts import Bars, Intervals, Point, Scatter, Spread


def drawn(chart: Any) -> Axes:
    axes: Axes = Figure(figsize=(7, 4)).add_subplot()
    chart.draw(axes, False)
    return axes


def test_intervals_of_points_reach_from_low_to_high() -> None:
    points = [Point("a", 10.0, 8.0, 15.0, 1.0, False), Point("b", 20.0, 19.0, 21.0, 2.0, True)]
    axes = drawn(Scatter(points, "x", "y", "picked", "others"))
    reach: list[Any] = [line for lines in axes.collections for line in lines.get_segments()]  # type: ignore[attr-defined]
    assert [np.round(line, 6).tolist() for line in reach] == [
        [[8.0, 1.0], [15.0, 1.0]],
        [[19.0, 2.0], [21.0, 2.0]],
    ]
    low, high = axes.get_xlim()
    assert low < 8
    assert high > 21
    assert [line.get_label() for line in axes.lines if line.get_linestyle() == "None"] == [
        "others",
        "picked",
    ]


def test_a_wide_range_of_losses_is_drawn_on_a_scale_that_holds_all() -> None:
    points = [Point(str(y), 1.0, 0.9, 1.1, y, False) for y in (0.01, 0.1, 5.0)]
    axes = drawn(Scatter(points, "x", "y", "picked", "others"))
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert low < 0.01 < 5.0 < high


def test_bars_are_as_long_as_their_values_and_the_first_is_on_top() -> None:
    axes = drawn(Bars([("a", [3.0, 1.0]), ("b", [None, 2.0])], "kB", ("before", "after")))
    assert [(bar.get_width(), round(bar.get_y() + bar.get_height() / 2)) for bar in axes.patches] == [  # type: ignore[attr-defined]
        (3.0, 0),
        (1.0, 0),
        (2.0, 1),
    ]
    bottom, top = axes.get_ylim()
    assert bottom > top


def test_intervals_are_lines_between_their_ends() -> None:
    axes = drawn(Intervals([("a", 90.0, 85.0, 93.0), ("b", 80.0, 77.0, 82.0)], "%"))
    ends = [np.asarray(line.get_xdata()).tolist() for line in axes.lines]
    assert ends == [[85.0, 93.0], [90.0], [77.0, 82.0], [80.0]]
    assert axes.get_xlim() == pytest.approx((77 - 0.08 * 16, 93 + 0.08 * 16))


def test_outliers_among_the_slow_runs_are_not_drawn() -> None:
    """The fastest 98 % are, up to four interquartile ranges above the middle half."""
    runs = [*np.linspace(10, 20, 101), 100.0, 200.0]
    assert Spread([("a", runs)], "ms").limits == pytest.approx((10 - 0.594, 19.9 + 0.594))
    both = Spread([("a", runs), ("b", np.linspace(4, 8, 101).tolist())], "ms")
    assert both.limits == pytest.approx((4 - 0.954, 19.9 + 0.954))
    early = Spread([("a", [*np.linspace(10, 20, 101), *[45.0] * 4])], "ms")
    assert early.limits[1] == pytest.approx(20.6)


def test_a_distribution_is_named_with_its_median() -> None:
    axes = drawn(Spread([("net", [1.0, 2.0, 2.5, 3.0, 100.0])], "ms"))
    assert [text.get_text().replace("\u00a0", " ") for text in axes.texts] == ["net: median 2.50 ms"]
