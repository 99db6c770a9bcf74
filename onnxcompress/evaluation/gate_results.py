"""Verdicts of gates: each limit with the measured value, in one clause."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxcompress.errors import OptionError

if TYPE_CHECKING:
    from onnxcompress.evaluation.compare import Comparison
    from onnxcompress.runtime.latency import Ratio

MEGABYTE = 1e6


@dataclass(frozen=True)
class GateMeasurements:
    """The measurements that gates judge; None where nothing was measured."""

    bytes: int
    inputs: str = ""
    """Description of the inputs of accuracy and agreement, such as `2000 images`."""
    top1: tuple[float, float] | None = None
    """Top-1 accuracy before and after, from 0 to 1."""
    agreement: float | None = None
    """Share of inputs with the same top-1 class, from 0 to 1."""
    latency_ms: float | None = None
    ratio: Ratio | None = None
    """Latency after over latency before."""
    device: str = ""
    preprocess: str = ""
    """Description of how images were preprocessed."""

    @staticmethod
    def of(comparison: Comparison, preprocess: str = "") -> GateMeasurements:
        """Take the measurements from a comparison.

        Args:
            comparison: The comparison.
            preprocess: Description of how images were preprocessed.

        Returns:
            The measurements.
        """
        a, b = comparison.a, comparison.b
        top1 = None if a.top1 is None or b.top1 is None else (a.top1, b.top1)
        device = f"{b.timing.device}, batch {b.timing.batch}"
        return GateMeasurements(
            bytes=b.bytes,
            inputs=comparison.inputs,
            top1=top1,
            agreement=comparison.agreement,
            latency_ms=b.timing.median_ms,
            ratio=comparison.latency,
            device=device,
            preprocess=preprocess,
        )


@dataclass(frozen=True)
class Verdict:
    """Whether a limit was kept."""

    gate: str
    limit: float
    measured: float
    passed: bool
    text: str
    """The measurement and the limit, in one clause."""
    preprocess: str = ""
    """Description of how the images were preprocessed; empty where none were used."""


def summary(verdicts: list[Verdict]) -> str:
    """Join the limits that were missed in one sentence.

    Args:
        verdicts: The verdicts.

    Returns:
        The sentence; empty where no limit was missed.
    """
    missed = [v.text for v in verdicts if not v.passed]
    return f"not worth it: {'; '.join(missed)}" if missed else ""


def judge(limits: Mapping[str, float], measurements: GateMeasurements) -> list[Verdict]:
    """Judge measurements by limits.

    Args:
        limits: Limits by name, as in `gates.LIMITS`.
        measurements: The measurements.

    Returns:
        A verdict for each limit.

    Raises:
        OptionError: A limit on accuracy lacks labelled images.
    """
    return [_JUDGES[name](limit, measurements) for name, limit in limits.items()]


def _max_drop(limit: float, measurements: GateMeasurements) -> Verdict:
    if measurements.top1 is None:
        raise OptionError("--max-drop needs labels: class folders, or y in the .npz")
    before, after = measurements.top1
    drop = 100 * (before - after)
    moved = f"{'rose' if drop < 0 else 'fell'} by {abs(drop):.2f}"
    text = (
        f"top-1 accuracy {moved} points ({before:.2%} to {after:.2%} on {measurements.inputs}), "
        f"it may fall by {limit:g}"
    )
    return Verdict("max_drop", limit, drop, _rounded(drop) <= limit, text, measurements.preprocess)


def _min_agreement(limit: float, measurements: GateMeasurements) -> Verdict:
    assert measurements.agreement is not None
    percent = 100 * measurements.agreement
    text = f"the same top-1 class for {percent:.2f} % of {measurements.inputs}, "
    text += f"at least {limit:g} % is asked for"
    return Verdict(
        "min_agreement", limit, percent, _rounded(percent) >= limit, text, measurements.preprocess
    )


def _max_latency(limit: float, measurements: GateMeasurements) -> Verdict:
    assert measurements.latency_ms is not None
    median = measurements.latency_ms
    text = f"median latency {median:.3g} ms ({measurements.device}), at most {limit:g} ms is allowed"
    return Verdict("max_latency", limit, median, median <= limit, text)


def _min_speedup(limit: float, measurements: GateMeasurements) -> Verdict:
    assert measurements.ratio is not None
    ratio = measurements.ratio
    speed = 1 / ratio.value
    text = (
        f"{speed:.3f} times as fast (95 % interval {1 / ratio.high:.3f} to {1 / ratio.low:.3f}; "
        f"{measurements.device}), at least {limit:g} is asked for"
    )
    return Verdict("min_speedup", limit, speed, speed >= limit, text)


def _max_size(limit: float, measurements: GateMeasurements) -> Verdict:
    size = measurements.bytes / MEGABYTE
    text = f"{size:.3f} MB, at most {limit:g} MB is allowed"
    return Verdict("max_size", limit, size, size <= limit, text)


def _rounded(percent: float) -> float:
    """Remove rounding errors of 100 × share, so that 1 point is within a limit of 1."""
    return round(percent, 9)


_JUDGES: dict[str, Callable[[float, GateMeasurements], Verdict]] = {
    "max_drop": _max_drop,
    "min_agreement": _min_agreement,
    "max_latency": _max_latency,
    "min_speedup": _min_speedup,
    "max_size": _max_size,
}
