"""The record: mean and standard deviation of each channel of tensors, inside the ONNX file.

A BatchNorm's output has mean beta and standard deviation |gamma| over the training set, per channel (see
`graph.batch_norm` for what is exact): all that a data-free method knows of the data (Horton et al., arXiv
2011.09058, §3.1). Folding would destroy it, so it is kept in metadata_props, keyed by tensor name, and
follows what later passes do to the tensor.

Other tools keep metadata_props (onnxslim and onnxsim do), but rename and remove tensors: an entry counts
only while its tensor is in the graph, with as many channels. What no BatchNorm knows can be estimated
(`onnxcompress calibrate`); such entries say so.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.graph.batch_norm import BatchNorm, is_batch_norm, read_batch_norm
from onnxcompress.model import Model

KEY = "onnxcompress.statistics"
"""Key in metadata_props: JSON {tensor: {"mean": base64 of float32 little endian, "std": …, "source"}}."""
BATCH_NORM = "batch-norm"
"""Source of what a BatchNorm knew: it holds for the training set."""
ESTIMATED = "estimated"
"""How the source of what was measured on other inputs begins."""
DEAD = 1e-3
"""Running variances of channels that are constant take long to reach zero."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Per-channel statistics of one tensor; channels are axis 1."""

    mean: np.ndarray
    """Shape (channels,), float32."""
    std: np.ndarray
    """Shape (channels,), float32, not negative."""
    source: str = BATCH_NORM
    """`batch-norm`, or how they were estimated: `estimated: …`."""

    @property
    def estimated(self) -> bool:
        return self.source.startswith(ESTIMATED)

    @property
    def dead(self) -> list[int]:
        """Channels that do not vary, or hardly: by less than DEAD of the one that varies most."""
        return [int(channel) for channel in np.flatnonzero(self.std <= DEAD * self.std.max(initial=0))]


def read_record(model: Model) -> dict[str, ChannelStatistics]:
    """The record as it is in the file, by tensor name; entries that something else broke are left out."""
    try:
        entries = json.loads(model.metadata.get(KEY, "{}"))
    except (ValueError, RecursionError):  # RecursionError: nested too deep
        return {}
    found = {} if not isinstance(entries, dict) else {n: _parse(entry) for n, entry in entries.items()}
    return {name: one for name, one in found.items() if one is not None}


def write_record(model: Model, record: dict[str, ChannelStatistics]) -> None:
    """Put the record into the model's metadata, sorted by name; an empty one removes it."""
    entries = {
        name: {"mean": _encode(s.mean), "std": _encode(s.std), "source": s.source}
        for name, s in sorted(record.items())
    }
    model.set_metadata(KEY, json.dumps(entries) if entries else None)


def live_record(model: Model) -> dict[str, ChannelStatistics]:
    """The entries of the record that name a tensor of the graph with as many channels."""
    record = read_record(model)
    tensors = {t.name: t for t in _tensors(model)} if record else {}
    return {n: s for n, s in record.items() if n in tensors and _fits(tensors[n], len(s.mean))}


def graph_statistics(model: Model) -> dict[str, ChannelStatistics]:
    """What the BatchNorms that are still in the graph say of their outputs, by tensor."""
    norms = [read_batch_norm(model, node) for node in model.graph.nodes if is_batch_norm(node)]
    return {
        norm.node.outputs[0].name: ChannelStatistics(
            norm.beta.astype("float32"), norm.output_std.astype("float32")
        )
        for norm in norms
        if isinstance(norm, BatchNorm)
    }


def known_statistics(model: Model) -> dict[str, ChannelStatistics]:
    """The live record, and what the BatchNorms that are still in the graph say of their outputs.

    Where both know a tensor the BatchNorm is right, unless the record was estimated over it on purpose
    (`calibrate --overwrite`).
    """
    record = live_record(model)
    return record | {
        name: found
        for name, found in graph_statistics(model).items()
        if name not in record or not record[name].estimated
    }


def drop_missing(model: Model) -> None:
    """Forget the statistics of tensors that the graph no longer has."""
    record = read_record(model)
    alive = {t.name for t in _tensors(model)} if record else set()
    if any(name not in alive for name in record):
        write_record(model, {n: s for n, s in record.items() if n in alive})


def _tensors(model: Model) -> Iterator[gs.Tensor]:
    """Tensors that are computed or given; no weights."""
    yield from model.graph.inputs
    for node in model.graph.nodes:
        yield from node.outputs


def _fits(tensor: gs.Tensor, channels: int) -> bool:
    """Whether the shape that the file states, if any, has that many channels."""
    shape = tensor.shape
    known = shape is not None and len(shape) > 1 and isinstance(shape[1], int)
    return not known or shape[1] == channels


def _parse(entry: Any) -> ChannelStatistics | None:
    try:
        mean, std, source = _decode(entry["mean"]), _decode(entry["std"]), entry["source"]
    except (ValueError, KeyError, TypeError):
        return None
    whole = mean.shape == std.shape and np.isfinite(mean).all() and np.isfinite(std).all()
    return ChannelStatistics(mean, std, source) if whole and (std >= 0).all() else None


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
