"""What a page is made of, as data: a Story of Sections of Parts; `page.html` has a macro for each."""

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
    """A table; the first `left` columns are text, the others numbers, the first cell of a row its head."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    marked: frozenset[int] = frozenset()
    """Rows that stand out."""
    tone: str = "marked"
    """How they do: `marked` or `missed`."""


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
    """A chart, with what is to be seen in it."""

    kind: ClassVar[str] = "plot"
    title: str
    finding: str
    chart: Chart


@dataclass(frozen=True)
class Picture:
    """A PNG."""

    kind: ClassVar[str] = "picture"
    title: str
    text: str
    png: bytes


@dataclass(frozen=True)
class Fold:
    """Parts that are shown when asked for."""

    kind: ClassVar[str] = "fold"
    summary: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Heading:
    """Of what follows, below the section's own."""

    kind: ClassVar[str] = "heading"
    text: str
    note: str = ""


Part = Prose | Table | Terms | Code | Plot | Picture | Fold | Heading


@dataclass(frozen=True)
class Section:
    name: str
    """Its anchor."""
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Tile:
    """One figure of the outcome."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Story:
    title: str
    subtitle: str
    missed: Sequence[str]
    """What was asked for and is not so."""
    lead: Sequence[str]
    """Sentences that state the outcome."""
    tiles: Sequence[Tile]
    sections: Sequence[Section]
