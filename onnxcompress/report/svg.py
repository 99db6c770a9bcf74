"""Draw matplotlib figures as SVG that fits the page: with its colours, its font, and ids of their own."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("ink", "muted", "grid", "accent", "second", "paper")
"""Custom properties of the page's style (`--ink`), numbered as in the hexadecimal colours below."""
INK, MUTED, GRID, ACCENT, SECOND, PAPER = (f"#0{n}0{n}0{n}" for n in range(1, 7))
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.dpi": 72,
    "font.family": "DejaVu Sans",
    "font.size": 12.5,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
}  # fmt: skip


def draw(paint: Callable[[Axes], None], width: int, height: int, name: str) -> str:
    """Draw a figure as inline SVG.

    Args:
        paint: Function that draws into the axes.
        width: Pixels.
        height: Pixels.
        name: Prefix of the ids, different for each chart of a page.

    Returns:
        The SVG.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for glyphs that the font lacks: the browser has another font
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03)
        figure = Figure(figsize=(width / 72, height / 72), layout=layout)
        FigureCanvasAgg(figure)  # makes the sizes of texts known
        paint(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), name)


def _inline(text: str, name: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    for number, colour in enumerate(COLOURS, 1):
        text = text.replace(f"#0{number}0{number}0{number}", f"var(--{colour})")
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    attributes = f'{box.group()} aria-hidden="true" focusable="false"'
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"<svg {names} {attributes}>{_blank_lines(rest)}"


def _blank_lines(text: str) -> str:
    return re.sub(r"\n\s*", "\n", text)
