"""The facts that a report is made from: results of passes, what --json prints, and what it alone needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxcompress.evaluation import gate_results
from onnxcompress.evaluation.guard import GuardMeasurements, Verdict
from onnxcompress.pipeline.chain import Step
from onnxcompress.runtime.block_latency import LatencyChange


@dataclass(frozen=True)
class File:
    """A file that was read or written."""

    role: str
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LayerSize:
    """Bytes of the weights of a layer, before and after; None where the model does not have the layer."""

    name: str
    before: int | None
    after: int | None
    layer: bool = True
    """Whether it is one layer; otherwise all nodes of an operator that is not a layer."""


@dataclass(frozen=True)
class Pictures:
    """Sample images side by side in one PNG."""

    title: str
    text: str
    png: bytes


@dataclass(frozen=True)
class Material:
    """All facts that a report presents."""

    command: str
    account: Mapping[str, Any]
    """What --json prints; of commands other than passes the report reads it."""
    steps: Sequence[Step] = ()
    """The passes that ran."""
    guard: GuardMeasurements | None = None
    """Comparison of the result of several passes with their input."""
    verdict: Verdict | None = None
    """The verdict on that comparison."""
    latency: LatencyChange | None = None
    """Latency of the input of several passes and of their result."""
    gates: Sequence[gate_results.Verdict] = ()
    argv: Sequence[str] = ()
    """The command line, without the program's name."""
    created: str = ""
    """When the report was made."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Machine and software: name -> version."""
    files: Sequence[File] = ()
    comparison: Mapping[str, Any] | None = None
    """`Comparison.as_dict()` of the models before and after."""
    compared_on: str = ""
    """Description of the inputs on which the outputs were compared."""
    learned_from: bool = False
    """Whether a pass learned from these inputs."""
    not_compared: str = ""
    """Why there is no comparison."""
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Model -> milliseconds of each run."""
    layers: Sequence[LayerSize] = ()
    pictures: Sequence[Pictures] = ()
