"""The plot of `onnxcompress sensitivity`: output error by layer, in the order of the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnxcompress.model.tensor_storage import write_files
from onnxcompress.sensitivity.rows import Row

LONGEST = 32
"""Largest number of characters of a layer's name."""
MARKERS = "osD^vPX*<>"
LEAST = 1e-8
"""Smaller errors are drawn at this value, because the axis is logarithmic."""


def write_plot(path: Path, rows: Sequence[Row], model: str) -> None:
    """Draw the plot.

    Args:
        path: The file, in PNG, SVG or PDF format by its name.
        rows: Rows of the sensitivity analysis.
        model: Name of the model.

    Raises:
        ModelError: The file cannot be written.
    """
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
    """Shorten a long name to its end, where layers differ, without the operator of `/a/a.0/conv1/Conv`."""
    parts = [part for part in name.split("/") if part]
    if len(parts) > 1 and parts[-1] in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
        parts = parts[:-1]
    kept = [p for i, p in enumerate(parts) if not any(q.startswith(p + ".") for q in parts[i + 1 :])]
    text = "/".join(kept)
    return text if len(text) <= LONGEST else "…" + text[1 - LONGEST :]


def title(row: Row) -> str:
    """Describe the change of a row for people.

    Args:
        row: The row.

    Returns:
        Such as `weight 4 bits`, `input 8 bits` or `50 % zeros`.
    """
    if row.kind == "sparsity":
        return f"{100 * row.value:g} % zeros"
    return f"{'weight' if row.kind == 'weight_bits' else 'input'} {row.value:g} bits"
