"""Elements of a page as data: a Story has Sections, which have Parts; `page.html` has a macro for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from onnxcompress.report.charts import Chart


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    kind: ClassVar[str] = "prose"
    text: str
    tone: str = ""
    """`missed`, `kept` or `quiet`."""


@dataclass(frozen=True)
class Table:
    """A table: the first `left` columns are text, the others numbers; each row begins with its header."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    marked: frozenset[int] = frozenset()
    """Rows to highlight."""
    tone: str = "marked"
    """How they are highlighted: `marked` or `missed`."""


@dataclass(frozen=True)
class Terms:
    """Names and their values."""

    kind: ClassVar[str] = "terms"
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Text to be copied."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Plot:
    """A chart, with a title and a sentence on what it shows."""

    kind: ClassVar[str] = "plot"
    title: str
    finding: str
    chart: Chart


@dataclass(frozen=True)
class Picture:
    """A PNG with a title and a caption."""

    kind: ClassVar[str] = "picture"
    title: str
    text: str
    png: bytes


@dataclass(frozen=True)
class Fold:
    """Parts that are hidden until the reader opens them."""

    kind: ClassVar[str] = "fold"
    summary: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    kind: ClassVar[str] = "heading"
    text: str
    note: str = ""


Part = Prose | Table | Terms | Code | Plot | Picture | Fold | Heading


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    name: str
    """Anchor in the page."""
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Tile:
    """A figure of the outcome, shown large."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Story:
    """The content of a page."""

    title: str
    subtitle: str
    missed: Sequence[str]
    """Targets and gates that were missed."""
    lead: Sequence[str]
    """Sentences that state the outcome."""
    tiles: Sequence[Tile]
    sections: Sequence[Section]
