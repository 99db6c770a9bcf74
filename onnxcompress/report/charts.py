"""Charts as data, and how matplotlib draws each of them: axes with units, in a wide and a narrow form.

A chart states its height and draws itself into axes of that height; the narrow form puts the labels of rows
above them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcompress.formatting import milliseconds
from onnxcompress.report.chain_chart import ChainChart
from onnxcompress.report.label_layout import Named, elided, elided_apart, name_points
from onnxcompress.report.svg import ACCENT, INK, MUTED, PAPER, SECOND, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, NARROW = 720, 360
"""Widths of the two forms, in pixels."""
LONGEST = {False: 34, True: 46}
"""Longest label of a row in characters, by whether the form is narrow."""


@dataclass(frozen=True)
class Point:
    """A point of a Scatter."""

    name: str
    x: float
    low: float
    high: float
    """`low` and `high` are the interval of x."""
    y: float
    picked: bool


@dataclass(frozen=True)
class Scatter:
    """Points with intervals along x; picked points are filled and labelled first."""

    points: Sequence[Point]
    x_label: str
    y_label: str
    picked: str
    others: str

    def height(self, narrow: bool) -> int:
        """Compute the height of the chart.

        Args:
            narrow: Whether the form is narrow.

        Returns:
            Pixels.
        """
        return 330 if narrow else 380

    def draw(self, axes: Axes, narrow: bool) -> None:
        """Draw the chart.

        Args:
            axes: Where to draw.
            narrow: Whether the form is narrow.
        """
        for picked, label in ((False, self.others), (True, self.picked)):
            chosen = [p for p in self.points if p.picked == picked]
            if not chosen:
                continue
            x, y = [p.x for p in chosen], [p.y for p in chosen]
            reach = [[p.x - p.low for p in chosen], [p.high - p.x for p in chosen]]
            colour = ACCENT if picked else MUTED
            axes.errorbar(
                x, y, xerr=np.maximum(reach, 0), fmt="none", ecolor=colour, elinewidth=1.2, alpha=0.6
            )
            face = ACCENT if picked else PAPER
            axes.plot(
                x,
                y,
                "o",
                ms=9 if len(self.points) <= 12 else 7,
                mfc=face,
                mec=colour,
                mew=1.8,
                ls="",
                label=label,
                clip_on=False,
            )
        values = [p.y for p in self.points]
        if min(values) > 0 and max(values) > 6 * min(values):
            _log_scale(axes, min(values), max(values))
        else:
            low, high = min(0.0, *values), max(*values, 1e-9)
            axes.set_ylim(low - (0.08 * (high - low) if low < 0 else 0), high + 0.12 * (high - low))
        low, high = min(p.low for p in self.points), max(p.high for p in self.points)
        margin = 0.25 * (high - low) or 0.5
        axes.set_xlim(low - margin if low < margin or low > 2 * margin else 0, high + margin)
        _axes(axes, self.x_label, self.y_label, grid="both")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.1, handletextpad=0.1)
        names = [(elided(p.name, 22), p.x, p.low, p.high, p.y, p.picked) for p in self.points]
        name_points(axes, [Named(*fields) for fields in sorted(names, key=lambda fields: not fields[-1])])


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, one or two in a row; a value of None has no bar."""

    rows: Sequence[tuple[str, Sequence[float | None]]]
    x_label: str
    series: Sequence[str] = ()

    def height(self, narrow: bool) -> int:
        """Compute the height of the chart.

        Args:
            narrow: Whether the form is narrow.

        Returns:
            Pixels.
        """
        each = (30 if narrow else 20) + (12 if self._count > 1 else 2)
        return each * len(self.rows) + (70 if self._count > 1 else 48)

    @property
    def _count(self) -> int:
        return max(len(values) for _, values in self.rows)

    def draw(self, axes: Axes, narrow: bool) -> None:
        """Draw the chart.

        Args:
            axes: Where to draw.
            narrow: Whether the form is narrow.
        """
        count = self._count
        thick = (0.4 if narrow else 0.36 + 0.18 * count) / count
        top = 0.06 if narrow else -thick * count / 2  # of the bars; in the narrow form names are above them
        colours = [SECOND, ACCENT][-count:]
        for place in range(count):
            held = [(at, v[place]) for at, (_, v) in enumerate(self.rows) if v[place] is not None]
            y = [at + top + thick * (place + 0.5) for at, _ in held]
            widths = [float(v or 0) for _, v in held]
            label = self.series[place] if self.series else None
            axes.barh(y, widths, height=thick * 0.88, color=colours[place], label=label)
        _rows(axes, [name for name, _ in self.rows], narrow, above=0.2)
        _axes(axes, self.x_label, "", grid="x")
        if count > 1:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)


@dataclass(frozen=True)
class Spread:
    """Distributions: a histogram, the middle half and the middle 90 % as lines, and the median."""

    rows: Sequence[tuple[str, Sequence[float]]]
    x_label: str

    def height(self, narrow: bool) -> int:
        """Compute the height of the chart.

        Args:
            narrow: Whether the form is narrow.

        Returns:
            Pixels.
        """
        return 86 * len(self.rows) + 50

    def draw(self, axes: Axes, narrow: bool) -> None:
        """Draw the chart.

        Args:
            axes: Where to draw.
            narrow: Whether the form is narrow.
        """
        low, high = self.limits
        for at, (_, samples) in enumerate(self.rows):
            colour = SECOND if at == 0 and len(self.rows) > 1 else ACCENT
            counts, edges = np.histogram(samples, 70, (low, high))
            shape = 0.48 * counts / max(counts.max(), 1)
            axes.stairs(at + 0.16 - shape, edges, baseline=at + 0.16, fill=True, color=colour, alpha=0.55)
            p5, q1, middle, q3, p95 = np.percentile(samples, [5, 25, 50, 75, 95])
            axes.plot([p5, p95], [at + 0.28] * 2, color=colour, lw=1.5)
            axes.plot([q1, q3], [at + 0.28] * 2, color=colour, lw=6, solid_capstyle="butt")
            axes.plot([middle] * 2, [at + 0.2, at + 0.36], color=INK, lw=2)
        names = [f"{name}: median {milliseconds(float(np.median(samples)))}" for name, samples in self.rows]
        _rows(axes, names, True, above=0.42)
        axes.set_xlim(low, high)
        _axes(axes, self.x_label, "", grid="x")

    @property
    def limits(self) -> tuple[float, float]:
        """Range of the x axis, without outliers among the slow runs."""
        low = min(min(samples) for _, samples in self.rows)
        high = max(_usual(samples) for _, samples in self.rows)
        margin = 0.06 * (high - low) or 0.01 * high
        return max(low - margin, 0.0), high + margin


@dataclass(frozen=True)
class Intervals:
    """Values with their intervals, one in a row."""

    rows: Sequence[tuple[str, float, float, float]]
    """Name, value, and low and high end of its interval."""
    x_label: str

    def height(self, narrow: bool) -> int:
        """Compute the height of the chart.

        Args:
            narrow: Whether the form is narrow.

        Returns:
            Pixels.
        """
        return 52 * len(self.rows) + 50

    def draw(self, axes: Axes, narrow: bool) -> None:
        """Draw the chart.

        Args:
            axes: Where to draw.
            narrow: Whether the form is narrow.
        """
        for at, (_, value, low, high) in enumerate(self.rows):
            colour = SECOND if at == 0 and len(self.rows) > 1 else ACCENT
            axes.plot([low, high], [at + 0.18] * 2, color=colour, lw=2)
            axes.plot([value], [at + 0.18], "o", color=colour, ms=9)
        _rows(
            axes, [f"{n}: {v:.2f} ({lo:.2f} to {hi:.2f})" for n, v, lo, hi in self.rows], True, above=0.22
        )
        low, high = min(r[2] for r in self.rows), max(r[3] for r in self.rows)
        margin = 0.08 * (high - low) or 1.0
        axes.set_xlim(low - margin, high + margin)
        _axes(axes, self.x_label, "", grid="x")


Chart = Scatter | Bars | Spread | Intervals | ChainChart


def svgs(chart: Chart, name: str) -> tuple[str, str]:
    """Draw a chart in its wide and its narrow form.

    Args:
        chart: The chart.
        name: Prefix of the ids in the SVG, different for each chart of a page.

    Returns:
        Inline SVG of the wide and of the narrow form.
    """

    def form(narrow: bool) -> str:
        width = NARROW if narrow else WIDE
        suffix = "n" if narrow else "w"
        return draw(lambda a: chart.draw(a, narrow), width, chart.height(narrow), f"{name}{suffix}")

    return form(False), form(True)


def _axes(axes: Axes, x_label: str, y_label: str, *, grid: Any) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis=grid, which="major")
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(_ticks())


def _usual(samples: Sequence[float]) -> float:
    """The slowest run up to four interquartile ranges above the middle half, among the fastest 98 %."""
    q1, q3, p98 = (float(v) for v in np.percentile(samples, [25, 75, 98]))
    fence = q3 + 4 * (q3 - q1)
    return max(s for s in samples if s <= max(min(fence, p98), q3))


def _log_scale(axes: Axes, low: float, high: float) -> None:
    """A logarithmic y axis from below `low` to above `high`, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_ylim(low / 1.6, high * 1.6)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, min_n_ticks=3)


def _rows(axes: Axes, names: Sequence[str], narrow: bool, *, above: float) -> None:
    """Label the rows, the first on top: at the left of each row, or above it in the narrow form."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    shown = elided_apart(names, LONGEST[narrow])
    if not narrow:
        axes.set_yticks(range(len(names)), shown)
        axes.tick_params(axis="y", labelcolor=INK, pad=7)
        return
    axes.set_yticks([])
    for at, name in enumerate(shown):
        where = axes.get_yaxis_transform()
        axes.text(0, at - above, name, transform=where, va="center", fontsize=12, color=INK)
