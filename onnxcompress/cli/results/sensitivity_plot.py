"""The plot of `onnxcompress sensitivity`: output error by layer, in the order of the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnxcompress.model.tensor_storage import write_files
from onnxcompress.sensitivity.rows import Row

LONGEST = 32
"""Characters of a layer's name."""
MARKERS = "osD^vPX*<>"
LEAST = 1e-8
"""Errors below are drawn here: the axis is logarithmic."""


def write_plot(path: Path, rows: Sequence[Row], model: str) -> None:
    """Draw to PNG, SVG or PDF, by the name. Raises ModelError where the file cannot be written."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    names = list(dict.fromkeys((row.weight, row.layer) for row in rows))
    series: dict[str, list[float]] = {}
    for row in rows:
        series.setdefault(title(row), []).append(max(row.error, LEAST))
    figure = Figure(figsize=(9, max(3.0, 1.6 + 0.19 * len(names))), layout="constrained")
    axes = figure.add_subplot()
    for index, (label, errors) in enumerate(series.items()):
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(errors, range(len(names)), marker, markersize=4.5, label=label)
    axes.set_yticks(range(len(names)), [_short(layer) for _, layer in names], fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlabel("squared error of the outputs, over their variance (log scale)")
    axes.set_ylabel("layer, in the order of the network")
    axes.grid(alpha=0.3)
    figure.suptitle(f"{model}: output error of one layer changed alone", fontsize=11)
    figure.legend(loc="outside lower center", ncols=min(4, len(series)), fontsize=8)
    kind = path.suffix.lower().lstrip(".")
    rcParams["svg.hashsalt"] = "onnxcompress"  # the same figures give the same bytes
    plain = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    write_files([(path, lambda file: figure.savefig(file, format=kind, dpi=150, metadata=plain))])


def _short(name: str) -> str:
    """The end of a long name, where layers differ; of `/a/a.0/conv1/Conv` the operator is left out."""
    parts = [part for part in name.split("/") if part]
    if len(parts) > 1 and parts[-1] in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
        parts = parts[:-1]
    kept = [p for i, p in enumerate(parts) if not any(q.startswith(p + ".") for q in parts[i + 1 :])]
    text = "/".join(kept)
    return text if len(text) <= LONGEST else "…" + text[1 - LONGEST :]


def title(row: Row) -> str:
    """For a person: `weight 4 bits`, `input 8 bits`, `50 % zeros`."""
    if row.kind == "sparsity":
        return f"{100 * row.value:g} % zeros"
    return f"{'weight' if row.kind == 'weight_bits' else 'input'} {row.value:g} bits"
