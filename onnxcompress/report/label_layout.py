"""Place names beside the points of a chart, where there is room for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from onnxcompress.report.svg import ACCENT, INK, MUTED, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""
Side = tuple[float, float, str, str]
"""Offset in pixels, and the horizontal and vertical alignment of the text."""

NEAR: Sequence[Side] = [
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (10, 5, "left", "bottom"),
    (-10, 5, "right", "bottom"),
    (10, -5, "left", "top"),
    (-10, -5, "right", "top"),
]
FAR: Sequence[Side] = [
    (dx, dy, "left" if dx > 0 else "right", "center")
    for dy in (0, 18, -18, 36, -36)
    for dx in (28, -28, 70, -70)
]
"""Sides for a name that has a line to its point."""


class Named(NamedTuple):
    """A point and its name."""

    name: str
    x: float
    low: float
    high: float
    """`low` and `high` are the interval of x, drawn as a line."""
    y: float
    picked: bool


def name_points(axes: Axes, points: Sequence[Named]) -> None:
    """Name points as long as there is room: no name overlaps another name, a point or a line.

    A picked point may get its name further away with a line to it, across other lines if need be.

    Args:
        axes: The chart, its points drawn and its limits set.
        points: The points; earlier ones get room first.
    """
    figure = axes.figure
    figure.canvas.draw()
    figure.set_layout_engine("none")  # type: ignore[union-attr]
    lines: list[Box] = []
    taken: list[Box] = []
    for point in points:
        ends = axes.transData.transform([(point.low, point.y), (point.x, point.y), (point.high, point.y)])
        (low, y), (x, _), (high, _) = ends
        lines.append((low, y - 2, high, y + 2))
        taken.append((x - 7, y - 7, x + 7, y + 7))
    for point in points:
        box = _placed(axes, point, NEAR, [*taken, *lines])
        if box is None and point.picked:
            box = _placed(axes, point, FAR, taken)
        if box is not None:
            taken.append(box)


def _placed(axes: Axes, point: Named, sides: Sequence[Side], taken: Sequence[Box]) -> Box | None:
    """Write the name at the first side where it fits; returns its box, None where it fits nowhere."""
    from matplotlib.text import Text

    frame = axes.get_window_extent()
    line = {"arrowstyle": "-", "color": ACCENT, "shrinkB": 5, "shrinkA": 0} if sides is FAR else None
    ground = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5} if sides is FAR else None
    for dx, dy, ha, va in sides:
        text = axes.annotate(
            point.name, (point.x, point.y), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=12,
            color=INK if point.picked else MUTED, arrowprops=line, bbox=ground,
        )  # fmt: skip
        text.get_window_extent()  # positions the text
        left, bottom, right, top = (float(v) for v in Text.get_window_extent(text).extents)
        box = left, bottom, right, top
        inside = frame.x0 <= left and right <= frame.x1 and frame.y0 < bottom and top < frame.y1 + 4
        if inside and not any(_overlap(box, other) for other in taken):
            return box
        text.remove()
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def elided(text: str, longest: int) -> str:
    """Shorten a text in its middle: names of layers differ at both ends.

    Args:
        text: The text.
        longest: Characters that are allowed.

    Returns:
        The text, with an ellipsis in place of its middle where it is too long.
    """
    if len(text) <= longest:
        return text
    tail = (longest - 1) * 3 // 5
    return f"{text[: longest - 1 - tail]}…{text[-tail:]}"


def elided_apart(names: Sequence[str], longest: int) -> list[str]:
    """Shorten names so that those which would look alike begin where they differ.

    Args:
        names: The names.
        longest: Characters that are allowed for each.

    Returns:
        A text for each name.
    """
    shown = [elided(name, longest) for name in names]
    for text in {text for text in shown if shown.count(text) > 1}:
        alike = [at for at, label in enumerate(shown) if label == text]
        columns = zip(*(names[at] for at in alike), strict=False)
        first = next((at for at, letters in enumerate(columns) if len(set(letters)) > 1), 0)
        for at in alike:
            rest = names[at][max(names[at].rfind("/", 0, first), 0) :]
            shown[at] = "…" + (rest if len(rest) < longest else rest[: longest - 2] + "…")
    return shown
