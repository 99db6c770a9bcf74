"""The report: one HTML file that presents a run, and needs no network and no script.

    account of --json, files, timings, images --collect--> Material --tell--> Story --render--> page

`tell` is a pure function whose result is text, tables and charts as data: `charts` draws them with
matplotlib as SVG whose colours are the page's (light, dark, print), each in a wide and a narrow form.
"""

from __future__ import annotations

from onnxcompress.report.build import tell
from onnxcompress.report.html import render, write_page
from onnxcompress.report.run_data import File, LayerSize, Material, Pictures

__all__ = ["File", "LayerSize", "Material", "Pictures", "render", "tell", "write_page"]
