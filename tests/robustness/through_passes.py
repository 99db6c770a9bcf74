"""A case through a pass: a valid model with the right outputs comes out, or a clear no.

    passed      the result is written, valid and loads where the original did; a pass that preserves the
                function leaves the outputs, within TOLERANCE of the largest magnitude; any other gives
                outputs of the same types and shapes, finite where the original's were
    refused     a CompressError of one line
    failed      any other exception, an invalid model, other outputs

Outputs are onnxruntime's with graph optimizations off; onnx's reference implementation computes them where
it has no kernel. Where neither runs the original, or two runs of it differ (random operators), the result
only has to be valid.
"""

from __future__ import annotations

import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from onnxcompress.errors import CompressError
from onnxcompress.model import load, save
from onnxcompress.passes.absorb_bias import AbsorbBias
from onnxcompress.passes.base import Pass, run
from onnxcompress.passes.calibrate import Calibrate
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.drop_channels import DropChannels
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.quantize import Quantize
from tests.helpers.suites import Case, in_runtime

TOLERANCE = 1e-5
FLOOR = 2.5e-7
"""And this: what onnxruntime's Sigmoid rounds to near 0, whatever its size."""
IMAGES = 4


def _perturbed(source: Path) -> Path:
    """The model with other weights, by up to 5 %, as a file beside it: the reference of correct-bias."""
    proto = onnx.load(source)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1:
            values = onnx.numpy_helper.to_array(tensor)
            other = values * (1 + 0.05 * np.cos(np.arange(values.size))).reshape(values.shape)
            tensor.CopyFrom(onnx.numpy_helper.from_array(other.astype(np.float32), tensor.name))
    target = source.with_name("reference.onnx")
    onnx.save(proto, target)
    return target


MAKERS: Mapping[str, Callable[[Path], list[Pass]]] = {
    "read and write": lambda _: [],
    "fold-bn": lambda _: [FoldBatchNorm()],
    "fold-bn --copy-shared": lambda _: [FoldBatchNorm(copy_shared=True)],
    "equalize": lambda _: [FoldBatchNorm(), Equalize()],
    "equalize --assumption-free": lambda _: [
        FoldBatchNorm(copy_shared=True),
        Equalize(clip="per-channel", assumption_free=True),
    ],
    "calibrate": lambda _: [Calibrate(inputs="procedural", synthetic=IMAGES)],
    "correct-bias": lambda source: [
        CorrectBias(reference=str(_perturbed(source)), inputs="procedural", synthetic=IMAGES)
    ],
    "absorb-bias": lambda _: [Calibrate(inputs="procedural", synthetic=IMAGES), AbsorbBias()],
    "prune": lambda _: [Prune(synthetic=IMAGES, inputs="procedural", scope="layer")],
    "prune 2:4 sparse": lambda _: [Prune(reconstruct=False, pattern="2:4", storage="sparse")],
    "quantize": lambda _: [Quantize(synthetic=IMAGES, inputs="procedural")],
    "fp16": lambda _: [HalfPrecision(inputs="procedural")],
    "drop-channels": lambda _: [
        DropChannels(macs_reduction=20, synthetic=IMAGES, inputs="procedural", steps=1)
    ],
    "drop-blocks": lambda _: [DropBlocks(blocks=1, synthetic=IMAGES, inputs="procedural", steps=1)],
}
"""Name -> the passes, given the file that they are applied to."""
EXACT = {
    name
    for name in MAKERS
    if not name.startswith(("absorb", "correct", "prune", "quantize", "drop", "fp16"))
}
"""Those that leave the outputs what they were."""


@dataclass(frozen=True)
class Outcome:
    """What came of one case and one pass."""

    kind: Literal["passed", "refused", "failed"]
    why: str = ""
    changed: bool = False
    """Whether the graph differs; a record of statistics alone does not count."""
    compared: bool = False
    """Whether outputs were compared."""


class Subject:
    """A case, with what its model computes."""

    def __init__(self, case: Case) -> None:
        self.case = case

    @property
    def text(self) -> str:
        """Its model, to read."""
        return onnx.printer.to_text(self.case.model)

    @cached_property
    def valid(self) -> bool:
        """Whether onnx's checker accepts it, strict shape inference included."""
        return not invalid(self.case.model)

    @cached_property
    def runs(self) -> Callable[[onnx.ModelProto, Mapping[str, Any]], list[Any] | None] | None:
        """What computes the same outputs of the original twice."""
        for runner in (in_runtime, in_reference):
            first = runner(self.case.model, self.case.feeds)
            if first is not None:
                again = runner(self.case.model, self.case.feeds)
                same = again is not None and not differing(first, again, 0.0)
                self.before = first
                return runner if same else None
        return None


def outcome(subject: Subject, name: str) -> Outcome:
    """Write the case's model, take it through the passes of `name`, and judge the result."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, target = Path(folder, "in.onnx"), Path(folder, "out.onnx")
        source.write_bytes(subject.case.model.SerializeToString())
        try:
            model = load(source)
            run(MAKERS[name](source), model)
            save(model, target)
        except CompressError as error:
            text = str(error)
            return Outcome("refused", text) if "\n" not in text else Outcome("failed", f"two lines: {text}")
        except Exception as error:
            return Outcome("failed", _traceback(error))
        after = onnx.load(target)
    return judge(subject, after, TOLERANCE if name in EXACT else None)


def judge(subject: Subject, after: onnx.ModelProto, tolerance: float | None) -> Outcome:
    """What the result is worth; `tolerance` None: the passes may change the function."""
    before = subject.case.model
    if after == before:
        return Outcome("passed")
    changed = after.graph != before.graph
    if subject.valid and (why := invalid(after)):
        return Outcome("failed", f"not valid: {why}")
    if [o.name for o in after.graph.output] != [o.name for o in before.graph.output]:
        return Outcome("failed", "other outputs")
    runner = subject.runs
    if runner is None:
        return Outcome("passed", changed=changed)
    found = runner(after, subject.case.feeds)
    if found is None:
        return Outcome("failed", "it does not run any more")
    why = differing(subject.before, found, tolerance)
    return Outcome("failed" if why else "passed", why, changed=changed, compared=True)


def _traceback(error: Exception) -> str:
    """The exception and the innermost line of ours that it came through, in one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "onnxcompress" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return " ".join(f"{type(error).__name__} at {place}: {error}".split())[:400]


def invalid(model: onnx.ModelProto) -> str:
    """Why onnx's checker refuses a model, in one line; empty where it accepts it."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # ValidationError, InferenceError, and what numpy raises in between
        return " ".join(str(error).split())[:300]
    return ""


def in_reference(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> list[Any] | None:
    """The outputs in onnx's reference implementation; None where it cannot, or is wrong: of a grouped
    ConvTranspose it adds the first group's biases to all groups."""
    convolutions = [n for n in model.graph.node if n.op_type == "ConvTranspose"]
    if any(a.name == "group" and a.i > 1 for n in convolutions for a in n.attribute):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(ReferenceEvaluator(model).run(None, dict(feeds)))
    except Exception:  # whatever numpy raises
        return None


def differing(before: list[Any], after: list[Any], tolerance: float | None) -> str:
    """How outputs differ by more than `tolerance`, relative to the largest magnitude; None: type, shape
    and finiteness only. Empty where they do not."""
    for at, (a, b) in enumerate(zip(before, after, strict=True)):
        if isinstance(a, list | tuple | dict) or a is None:
            if tolerance is not None and repr(a) != repr(b):
                return f"output {at} is another {type(a).__name__}"
            continue
        a, b = np.asarray(a), np.asarray(b)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"output {at}: {a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}"
        if why := _distance(a, b, tolerance):
            return f"output {at}: {why}"
    return ""


def _distance(a: np.ndarray, b: np.ndarray, tolerance: float | None) -> str:
    if a.dtype.kind not in "fiubc" and a.dtype.name != "bfloat16":
        return "" if tolerance is None or (a == b).all() else "values differ"
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    left, right = a.astype(wide), b.astype(wide)
    if tolerance is None:
        return "" if np.isfinite(right[np.isfinite(left)]).all() else "not finite any more"
    with np.errstate(invalid="ignore"):
        gap = np.where((left == right) | (np.isnan(left) & np.isnan(right)), 0.0, np.abs(left - right))
    size = np.abs(left[np.isfinite(left)]).max(initial=0.0)
    worst = float(gap.max(initial=0.0))
    close = worst <= tolerance * size + FLOOR * (tolerance > 0)
    return "" if close else f"off by {worst:g}, the largest is {size:g}"
