"""The figures that `fp16` measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from onnxcompress.account import Figures, json_name


@dataclass(frozen=True)
class KeptNode:
    """A node that stays float32 to limit the error."""

    name: str
    op: str
    error_alone: float
    """Error of the outputs with this node alone in float16 (`error_search.worst_error`)."""


@dataclass(frozen=True)
class ProviderRun:
    """A run of the result in onnxruntime."""

    provider: str
    error: float
    """Error of the outputs there (`error_search.worst_error`)."""


@dataclass(frozen=True)
class HalfPrecisionFigures(Figures):
    """The figures of `fp16`. Errors are root mean squares over the deviation of the output."""

    error: float
    """Error of the outputs with the converted nodes in float16, simulated."""
    all_float16: float
    """Error of the outputs with all nodes in float16, simulated; infinite where a value overflows."""
    max_error: float
    """Largest error that the options allow."""
    converted: int
    """Number of nodes that compute in float16."""
    kept_float32: tuple[KeptNode, ...]
    """The nodes that could be converted and were not."""
    total_seconds: float = field(metadata=json_name("seconds"))
    """Time of the whole pass."""
    runtime: ProviderRun | None = None
    """The run of the result; None: nothing was converted."""
