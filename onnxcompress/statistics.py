"""The record: mean and standard deviation of each channel of tensors, inside the ONNX file.

A BatchNorm's output has mean beta and standard deviation |gamma| over the training set (per channel): all
that a data-free method knows of the data (Horton et al., arXiv 2011.09058, §3.1). Folding would destroy
it, so it is kept in metadata_props, keyed by tensor name, and follows what later passes do to the tensor.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

import numpy as np

from onnxcompress.batchnorm import BatchNorm, is_batch_norm, read_batch_norm
from onnxcompress.model import Model

KEY = "onnxcompress.statistics"
"""Key in metadata_props: JSON {tensor: {"mean": base64 of float32 little endian, "std": …, "source"}}."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Per-channel statistics of one tensor; channels are axis 1."""

    mean: np.ndarray
    """Shape (channels,), float32."""
    std: np.ndarray
    """Shape (channels,), float32, not negative."""
    source: str = "batch-norm"
    """`batch-norm`, or how they were estimated."""


def read_record(model: Model) -> dict[str, ChannelStatistics]:
    """The record in the model's file, by tensor name; empty where there is none."""
    try:
        entries = json.loads(model.metadata.get(KEY, "{}"))
        return {
            name: ChannelStatistics(_decode(e["mean"]), _decode(e["std"]), e["source"])
            for name, e in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):  # a record that something else broke
        return {}


def write_record(model: Model, record: dict[str, ChannelStatistics]) -> None:
    """Put the record into the model's metadata, sorted by name; an empty one removes it."""
    entries = {
        name: {"mean": _encode(s.mean), "std": _encode(s.std), "source": s.source}
        for name, s in sorted(record.items())
    }
    model.set_metadata(KEY, json.dumps(entries) if entries else None)


def known_statistics(model: Model) -> dict[str, ChannelStatistics]:
    """The record, and what the BatchNorms that are still in the graph say of their outputs, by tensor."""
    norms = [read_batch_norm(model, node) for node in model.graph.nodes if is_batch_norm(node)]
    return read_record(model) | {
        norm.node.outputs[0].name: ChannelStatistics(
            norm.beta.astype("float32"), abs(norm.gamma).astype("float32")
        )
        for norm in norms
        if isinstance(norm, BatchNorm)
    }


def drop_missing(model: Model) -> None:
    """Forget the statistics of tensors that the graph no longer has."""
    record = read_record(model)
    alive = {t.name for node in model.graph.nodes for t in node.outputs}
    alive |= {t.name for t in model.graph.inputs}
    if any(name not in alive for name in record):
        write_record(model, {n: s for n, s in record.items() if n in alive})


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
