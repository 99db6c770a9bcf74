"""Measure the difference between the outputs of two models."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onnxcompress.errors import ModelError
from onnxcompress.model.model_like import ModelLike
from onnxcompress.runtime.inference import Arrays, run


@dataclass(frozen=True)
class Difference:
    """Difference of outputs from the reference's; `output` is the one with the largest `max_rel`."""

    max_abs: float
    max_rel: float
    """Largest |a - b| of an output, divided by the largest magnitude of that output in `a`."""
    output: str
    per_output: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Output name -> (max_abs, max_rel)."""


def difference(a: ModelLike, b: ModelLike, feeds: Arrays, *, optimize: bool = False) -> Difference:
    """Run two models on the same inputs and compare their outputs.

    Outputs are matched by name, or by order where the names differ.

    Args:
        a: The reference.
        b: The other model.
        feeds: An array for each input, by name.
        optimize: Let onnxruntime optimize the graphs.

    Returns:
        The difference.

    Raises:
        ModelError: onnxruntime refuses a model, or the outputs differ in number or shape.
    """
    return difference_of(run(a, feeds, optimize), run(b, feeds, optimize))


def difference_of(a: Arrays, b: Arrays) -> Difference:
    """Compare the outputs of two models.

    NaN in both, or the same infinity in both, counts as equal; in only one the difference is infinite.

    Args:
        a: Outputs of the reference, by name.
        b: Outputs of the other model; matched by order where the names differ.

    Returns:
        The difference.

    Raises:
        ModelError: The outputs differ in number or shape.
    """
    if len(a) != len(b):
        raise ModelError(f"the models have {len(a)} and {len(b)} outputs; expected as many")
    pairs = zip(a, a if set(a) == set(b) else b, strict=True)
    per_output = {name: _distance(name, a[name], b[other]) for name, other in pairs}
    worst = max(per_output, key=lambda name: per_output[name][1], default="")
    return Difference(
        max_abs=max((d[0] for d in per_output.values()), default=0.0),
        max_rel=max((d[1] for d in per_output.values()), default=0.0),
        output=worst,
        per_output=per_output,
    )


def _distance(name: str, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    if a.shape != b.shape:
        raise ModelError(f"output {name!r}: shapes {list(a.shape)} and {list(b.shape)} differ")
    if a.size == 0:
        return 0.0, 0.0
    left, right = a.astype(np.float64), b.astype(np.float64)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(left - right))
    gap = np.where(np.isnan(gap), np.inf, gap)
    max_abs = float(gap.max())
    if max_abs == 0.0:
        return 0.0, 0.0
    finite = np.abs(left[np.isfinite(left)])
    scale = float(finite.max()) if finite.size else 0.0
    return max_abs, max_abs / scale if scale > 0 else float("inf")
