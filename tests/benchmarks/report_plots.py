"""Draw the plots of reports that the guides show, each as a page of its own has it.

    python -m tests.benchmarks.report_plots [FOLDER]

Each plot is taken from the report of a command on a network in models/. Take them on an idle machine:
latencies are in them.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import click

from tests.helpers.paths import ROOT

DOCS = ROOT / "onnxcompress" / "docs"
IMAGES = "--images models/fashion-tiny.npz --preprocess fashion-mnist"
PLOTS = {
    "plot-blocks.svg": (
        f"drop-blocks models/resnet20-fashion.onnx fast.onnx {IMAGES} --blocks 2 --steps 0 "
        "--latency-batch 16",
        "What each block costs, and what is lost without it",
    ),
    "plot-layers.svg": (
        f"quantize models/mobilenetv2-fashion.onnx int8.onnx {IMAGES}",
        "Signal to noise of each layer's output",
    ),
}
"""File -> the command, and the title of the plot in its report."""
SVG = "{http://www.w3.org/2000/svg}"


def page_colours() -> str:
    """Take the colours of light and of dark pages from the style of reports.

    Returns:
        A style for a picture that stands alone.
    """
    style = (ROOT / "onnxcompress" / "report" / "page.css").read_text("utf-8")
    (light,) = re.findall(r":root \{\s*color-scheme: light dark;(.*?)\}", style, re.S)
    (dark,) = re.findall(r"color-scheme: dark\) \{\s*:root \{(.*?)\}", style, re.S)
    return (
        f"svg {{{light}}} @media (prefers-color-scheme: dark) {{ svg {{{dark}}} }} "
        "text { font-family: system-ui, sans-serif !important; }"
    )


def plot_in(page: str, title: str) -> str:
    """Cut a plot out of a report.

    Args:
        page: The report.
        title: The plot's title.

    Returns:
        The plot in its wide form, as a file of its own.

    Raises:
        LookupError: The report has no such plot.
    """
    ElementTree.register_namespace("", SVG[1:-1])
    for figure in ElementTree.fromstring(re.sub("<!DOCTYPE[^>]*>", "", page)).iter():
        if not figure.tag.endswith("figure") or title not in [p.text for p in figure]:
            continue
        drawing = next(figure.iter(f"{SVG}svg"))
        for name in ("aria-hidden", "focusable"):
            drawing.attrib.pop(name, None)
        _, _, width, height = drawing.attrib["viewBox"].split()
        drawing.attrib |= {"role": "img", "width": width, "height": height}
        style = ElementTree.Element(f"{SVG}style")
        style.text = page_colours()
        drawing.insert(0, style)
        return ElementTree.tostring(drawing, encoding="unicode") + "\n"
    raise LookupError(title)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=DOCS)
def main(folder: Path) -> None:
    """Write the plots."""
    for name, (command, title) in PLOTS.items():
        with tempfile.TemporaryDirectory() as work:
            (Path(work) / "models").symlink_to(ROOT / "models")
            argv = [*shlex.split(command), "--report", "report.html", "--no-cache"]
            subprocess.run([sys.executable, "-m", "onnxcompress.cli.main", *argv], cwd=work, check=True)
            text = plot_in((Path(work) / "report.html").read_text("utf-8"), title)
        (folder / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
