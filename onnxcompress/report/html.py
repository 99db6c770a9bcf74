"""Render the page: a Story as one HTML file that refers to nothing outside itself.

It is well-formed XML, too: characters in names of a file that XML does not allow are replaced.
"""

from __future__ import annotations

import base64
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from onnxcompress.model.tensor_storage import write_files
from onnxcompress.report.charts import Chart, svgs
from onnxcompress.report.elements import Story
from onnxcompress.version import __version__

_UNIT = re.compile(r"(?<=\d) (?=(?:%|ms|B|kB|MB|GB|dB|points|pixels)(?!\w))")
_DIGEST = re.compile("[0-9a-f]{64}")
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def render(story: Story) -> str:
    """Render a page as HTML.

    Args:
        story: The content.

    Returns:
        The text of the page.
    """
    folder = files("onnxcompress.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["joined"] = lambda text: _UNIT.sub("\u00a0", text)  # a unit stays with its number
    environment.tests["digest"] = lambda text: bool(_DIGEST.fullmatch(text))
    template = environment.from_string(folder.joinpath("page.html").read_text("utf-8"))
    style = Markup(folder.joinpath("page.css").read_text("utf-8"))  # text of this package, not of users
    numbers: dict[str, int] = {}

    def drawn(chart: Chart) -> dict[str, Any]:
        numbers["figures"] = numbers.get("figures", 0) + 1
        wide, narrow = svgs(chart, f"f{numbers['figures']}")
        return {"wide": Markup(wide), "narrow": Markup(narrow)}  # matplotlib escapes texts

    text = template.render(story=story, style=style, drawn=drawn, png=_data, version=__version__)
    return _NOT_XML.sub("\ufffd", text)


def write_page(path: str | os.PathLike[str], story: Story) -> None:
    """Write a page to a file, completely or not at all.

    Args:
        path: The file.
        story: The content.

    Raises:
        ModelError: The file cannot be written.
    """
    data = render(story).encode()

    def fill(file: Any) -> None:
        file.write(data)

    write_files([(Path(path), fill)])


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
