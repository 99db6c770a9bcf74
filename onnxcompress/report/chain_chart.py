"""The chart of a network as a chain: a row for each size of the image, a box for each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxcompress.report.label_layout import elided
from onnxcompress.report.svg import ACCENT, INK, MUTED, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PIXELS = {False: 600, True: 320}
"""Width of the widest row, by whether the form is narrow."""
LETTER = 6.6
"""Width of a letter in a box, in pixels."""


@dataclass(frozen=True)
class Box:
    """A segment of the chain."""

    name: str
    share: float
    """Percent."""
    droppable: bool


@dataclass(frozen=True)
class ChainChart:
    """Rows of boxes in the order of the network."""

    rows: Sequence[tuple[str, Sequence[Box]]]
    """Size of the image -> its boxes."""
    x_label: str

    def height(self, narrow: bool) -> int:
        """Compute the height of the chart.

        Args:
            narrow: Whether the form is narrow.

        Returns:
            Pixels.
        """
        return (104 if narrow else 78) * len(self.rows) + 84

    def draw(self, axes: Axes, narrow: bool) -> None:
        """Draw the chart.

        Args:
            axes: Where to draw.
            narrow: Whether the form is narrow.
        """
        widest = max(sum(box.share for box in boxes) for _, boxes in self.rows)
        for at, (size, boxes) in enumerate(self.rows):
            left = 0.0
            for box in boxes:
                colour = ACCENT if box.droppable else MUTED
                axes.barh(
                    at, box.share, left=left, height=0.62, color=colour, edgecolor=PAPER, linewidth=1.5,
                    alpha=0.55 if box.droppable else 0.3,
                )  # fmt: skip
                _label(axes, box, left, at, PIXELS[narrow] * box.share / widest)
                left += box.share
            axes.text(0, at - 0.42, size, fontsize=11, color=MUTED, va="center")
        axes.set_ylim(len(self.rows) - 0.5, -0.62)
        axes.set_yticks([])
        axes.set_xlim(0, 1.02 * widest)
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel(self.x_label)
        for droppable, text in ((True, "can be dropped"), (False, "stays")):
            if any(box.droppable == droppable for _, boxes in self.rows for box in boxes):
                colour = ACCENT if droppable else MUTED
                axes.bar(0, 0, color=colour, alpha=0.55 if droppable else 0.3, label=text)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.1)


def _label(axes: Axes, box: Box, left: float, at: int, pixels: float) -> None:
    """Write name and share into a box, a block's name upright where it must, or not at all."""
    letters, share = int(pixels / LETTER), f"{box.share:.1f}"
    centre = left + box.share / 2
    if letters >= 7:
        text, turned = f"{elided(box.name, letters)}\n{share}", 0
    elif pixels >= 11 and box.droppable:
        text, turned = elided(box.name, 9 if pixels < 60 else 12), 90
    else:
        return
    axes.text(centre, at, text, rotation=turned, ha="center", va="center", fontsize=10, color=INK)
