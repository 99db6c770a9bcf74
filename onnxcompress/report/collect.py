"""Collect facts that no account contains: digests, bytes by layer, versions, sample images."""

from __future__ import annotations

import contextlib
import io
import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues
from PIL import Image

from onnxcompress.data.contact_sheet import contact_sheet
from onnxcompress.data.image_set import ImageSet
from onnxcompress.graph.linear_layer import LINEAR_OPS
from onnxcompress.graph.query import consumers, node_label
from onnxcompress.model import Model
from onnxcompress.model.model_like import model_bytes
from onnxcompress.model.tensor_storage import file_digest
from onnxcompress.report.run_data import File, LayerSize, Pictures
from onnxcompress.version import __version__

PICTURES = 16
"""Largest number of images shown."""
SIDE = 96
"""Largest length of a thumbnail's longer side, in pixels."""
_LIBRARIES = ("numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "torch")
_HALF_BYTES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


def file_facts(role: str, path: Path, name: str | None = None) -> File:
    """Measure a file.

    Args:
        role: What the file was in the run, such as `input`.
        path: The file.
        name: Name that people know it by; the path by default.

    Returns:
        Its size, external data included, and its digest.
    """
    size = model_bytes(path) if path.suffix.lower() == ".onnx" else path.stat().st_size
    return File(role, name or str(path), size, file_digest(path))


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Describe the machine and the software.

    Args:
        extra: More entries.

    Returns:
        Values by name: processor, operating system, Python and libraries with their versions.
    """
    found = {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "Python": platform.python_version(),
        "onnxcompress": __version__,
    }
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**found, **(extra or {})}


def now() -> str:
    """Format the current time in UTC.

    Returns:
        Such as `2025-01-31 14:05 UTC`.
    """
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def layer_sizes(before: Model, after: Model | None = None) -> list[LayerSize]:
    """Sum the bytes of weights by layer, in the order of the network.

    A weight counts for the first layer that reads it, directly or through a DequantizeLinear. Nodes that
    are not layers, such as Add, share one row for each operator.

    Args:
        before: The original model.
        after: The compressed model, if there is one.

    Returns:
        A row for each layer, then one for each other operator.
    """
    left, right = _held(before), ({}, {}) if after is None else _held(after)
    return [
        LayerSize(name, old.get(name), new.get(name), layer)
        for old, new, layer in zip(left, right, (True, False), strict=True)
        for name in dict.fromkeys([*old, *new])
    ]


def pictures(title: str, images: ImageSet) -> Pictures:
    """Lay out sample images in a contact sheet.

    Args:
        title: Heading of the sheet.
        images: The images; PICTURES of them, evenly spread, are shown as they were before normalization.

    Returns:
        The sheet as a PNG.
    """
    shown = images.spread(PICTURES).x
    height, width = shown.shape[1:3]
    if max(height, width) > SIDE:
        size = max(1, width * SIDE // max(height, width)), max(1, height * SIDE // max(height, width))
        shown = np.stack([_reduced(image, size) for image in shown])
    file = io.BytesIO()
    contact_sheet(shown).save(file, "PNG", optimize=True)
    text = f"{len(shown)} of {len(images)} images, {height}×{width} pixels, before they are normalized."
    return Pictures(title, text, file.getvalue())


def _reduced(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    flat = image[..., 0] if image.shape[2] == 1 else image
    small = np.asarray(Image.fromarray(flat).resize(size, Image.Resampling.BOX))
    return small[..., None] if image.shape[2] == 1 else small


def _held(model: Model) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of weights by layer, and by operator for nodes that are not layers."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    others: dict[str, int] = {}
    for node in model.graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                reader = _reader(node)
                layer = reader.op in LINEAR_OPS
                name = node_label(reader) if layer else f"all {reader.op} nodes"
                counts = found if layer else others
                counts[name] = counts.get(name, 0) + _bytes(tensor)
    return found, others


def _reader(node: gs.Node) -> gs.Node:
    """The layer that reads a DequantizeLinear of constants; any other node itself."""
    while node.op == "DequantizeLinear" and all(isinstance(t, gs.Constant) for t in node.inputs):
        readers = consumers(node.outputs[0])
        if not readers:
            break
        node = readers[0]
    return node


def _bytes(tensor: Any) -> int:
    values = tensor._values
    if isinstance(values, LazyValues) and values.tensor.data_type in _HALF_BYTES:
        return (int(np.prod(values.shape)) + 1) // 2
    return int(values.nbytes)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
