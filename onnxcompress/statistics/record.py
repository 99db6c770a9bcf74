"""The record: mean and standard deviation of each channel of tensors, stored inside the ONNX file.

A BatchNorm's output has mean beta and standard deviation |gamma| over the training set, per channel (see
`graph.batch_norm` for what is exact): all that a data-free method knows of the data (Horton et al., arXiv
2011.09058, §3.1). Folding would destroy it, so it is kept in metadata_props, keyed by tensor name, and
later passes update it with the tensors.

Other tools keep metadata_props (onnxslim and onnxsim do), but rename and remove tensors: an entry counts
only while its tensor is in the graph, with as many channels. Statistics that no BatchNorm has can be
estimated (`onnxcompress calibrate`); such entries are marked.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.errors import ModelError
from onnxcompress.graph.batch_norm import BatchNorm, is_batch_norm, read_batch_norm
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model, Shape

KEY = "onnxcompress.statistics"
"""Key in metadata_props: JSON {tensor: {"mean": base64 of float32 little endian, "std": …, "source"}}."""
BATCH_NORM = "batch-norm"
"""Source of statistics from a BatchNorm, which hold for the training set."""
ESTIMATED = "estimated"
"""Beginning of the source of statistics that were measured on other inputs."""
DEAD = 1e-3
"""Share of the largest deviation up to which a channel is dead: running variances reach zero slowly."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Per-channel statistics of one tensor; channels are axis 1."""

    mean: np.ndarray
    """Shape (channels,), float32."""
    std: np.ndarray
    """Shape (channels,), float32, not negative."""
    source: str = BATCH_NORM
    """`batch-norm`, or `estimated: …` with the way in which they were estimated."""

    @property
    def estimated(self) -> bool:
        """Whether the statistics were measured on other inputs than the training set."""
        return self.source.startswith(ESTIMATED)

    def scaled(self, factors: np.ndarray) -> ChannelStatistics:
        """Describe the tensor after its channels were multiplied.

        Args:
            factors: A positive factor for each channel, shape (channels,), float64.

        Returns:
            Mean and deviation times the factors, from the same source.
        """
        mean, std = ((part * factors).astype(np.float32) for part in (self.mean, self.std))
        return ChannelStatistics(mean, std, self.source)

    def shifted(self, amounts: np.ndarray) -> ChannelStatistics:
        """Describe the tensor after a constant was added to each channel.

        Args:
            amounts: The constant for each channel, shape (channels,), float64.

        Returns:
            The mean plus the amounts and the same deviation, from the same source.
        """
        return ChannelStatistics((self.mean + amounts).astype(np.float32), self.std, self.source)

    @property
    def dead(self) -> list[int]:
        """Channels that hardly vary: their deviation is at most DEAD times the largest of any channel."""
        return [int(channel) for channel in np.flatnonzero(self.std <= DEAD * self.std.max(initial=0))]


def read_record(model: Model) -> dict[str, ChannelStatistics]:
    """Read the record from the model's metadata; broken entries are left out.

    Args:
        model: The model.

    Returns:
        Statistics by tensor name: a new dictionary, whose values are decoded once and must not be changed.
    """
    return dict(model.parsed_metadata(KEY, _parse_record))


def write_record(model: Model, record: Mapping[str, ChannelStatistics]) -> None:
    """Write the record to the model's metadata.

    Args:
        model: The model.
        record: Statistics by tensor name; an empty record is removed from the metadata.
    """
    entries = {
        name: {"mean": _encode(s.mean), "std": _encode(s.std), "source": s.source}
        for name, s in sorted(record.items())
    }
    model.set_metadata(KEY, json.dumps(entries) if entries else None)


def live_record(model: Model) -> dict[str, ChannelStatistics]:
    """Read the entries of the record whose tensor is in the graph, with as many channels.

    Args:
        model: The model.

    Returns:
        Statistics by tensor name.
    """
    present, record = {t.name for t in _tensors(model)}, read_record(model)
    try:
        shapes = tensor_shapes(model) if record else {}
    except ModelError:  # they contradict each other: the file's reader says so, this does not
        shapes = {}
    return {
        name: statistics
        for name, statistics in record.items()
        if name in present and _fits(shapes.get(name, ()), len(statistics.mean))
    }


def graph_statistics(model: Model) -> dict[str, ChannelStatistics]:
    """Read the statistics of the outputs of the BatchNorms that are still in the graph.

    Args:
        model: The model.

    Returns:
        Statistics by tensor name.
    """
    norms = [read_batch_norm(model, node) for node in model.graph.nodes if is_batch_norm(node)]
    return {
        norm.node.outputs[0].name: ChannelStatistics(
            norm.beta.astype("float32"), norm.output_std.astype("float32")
        )
        for norm in norms
        if isinstance(norm, BatchNorm)
    }


def known_statistics(model: Model) -> dict[str, ChannelStatistics]:
    """Read all statistics of a model: the live record, and those of BatchNorms that are still in the graph.

    Where both know a tensor the BatchNorm prevails, unless the record was estimated over it on purpose
    (`calibrate --overwrite`).

    Args:
        model: The model.

    Returns:
        Statistics by tensor name.
    """
    record = live_record(model)
    return record | {
        name: statistics
        for name, statistics in graph_statistics(model).items()
        if name not in record or not record[name].estimated
    }


def write_present(model: Model, record: Mapping[str, ChannelStatistics]) -> None:
    """Write those entries of a record whose tensor is in the graph to the model's metadata.

    Args:
        model: The model.
        record: Statistics by tensor name.
    """
    present = {t.name for t in _tensors(model)}
    write_record(model, {name: known for name, known in record.items() if name in present})


def _tensors(model: Model) -> Iterator[gs.Tensor]:
    """Iterate over the tensors that are computed or are graph inputs, without weights."""
    yield from model.graph.inputs
    for node in model.graph.nodes:
        yield from node.outputs


def _fits(shape: Shape, channels: int) -> bool:
    """Return whether a tensor of this shape, as far as it is known, has that many channels."""
    return len(shape) < 2 or not isinstance(shape[1], int) or shape[1] == channels


def _parse_record(text: str | None) -> dict[str, ChannelStatistics]:
    try:
        entries = json.loads(text or "{}")
    except (ValueError, RecursionError):  # RecursionError: nested too deep
        return {}
    parsed = {} if not isinstance(entries, dict) else {n: _parse(entry) for n, entry in entries.items()}
    return {name: statistics for name, statistics in parsed.items() if statistics is not None}


def _parse(entry: Any) -> ChannelStatistics | None:
    try:
        mean, std, source = _decode(entry["mean"]), _decode(entry["std"]), entry["source"]
    except (ValueError, KeyError, TypeError):
        return None
    whole = isinstance(source, str) and mean.size and mean.shape == std.shape
    whole = whole and np.isfinite(mean).all() and np.isfinite(std).all()
    return ChannelStatistics(mean, std, source) if whole and (std >= 0).all() else None


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
