"""Trials: a recipe that is applied to a model, and what is measured of the result.

    Trial --compress--> Result, with the files' bytes and a row of figures
    Result --time_result--> latency, where nothing else runs

Both are functions of values that can be sent to another process or machine. A trial is known by its content
(`Trial.key`): the model, the passes with their options and files, how it is measured, and the software.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcompress.errors import CompressError, CompressWarning, one_line
from onnxcompress.evaluation.gate_results import GateMeasurements, Verdict, judge
from onnxcompress.evaluation.gates import LIMITS, Gates
from onnxcompress.formatting import counted
from onnxcompress.runtime.clocks import Clock

if TYPE_CHECKING:
    import numpy as np

    from onnxcompress.data.image_set import ImageSet
    from onnxcompress.pipeline import Run
    from onnxcompress.pipeline.recipe import Recipe

TIMED = ("max_latency", "min_speedup")
"""Limits that only timing tells."""
Row = dict[str, Any]
"""Figures of a trial by name, as JSON values."""


@dataclass(frozen=True)
class Trial:
    """A recipe to apply to a model."""

    name: str
    """Name of the files that come of it, without a suffix."""
    model: str
    """Path of the model."""
    recipe: Recipe
    """The passes, the guard, and gates that say how the result is measured and judged."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """What tells the trial from others, as columns of a table."""

    @property
    def key(self) -> str:
        """SHA-256, in hexadecimal, of all that the result depends on: limits only judge it."""
        from onnxcompress.pipeline.cache_keys import content_digest, step_key

        digest, gates = _digest(self.model, _stamp(self.model)), dataclasses.asdict(self.recipe.gates)
        images = gates.pop("images")
        parts = {
            "passes": [step_key(digest, pass_) for pass_ in self.recipe.passes],
            "guard": dataclasses.asdict(self.recipe.guard),
            "measured": {name: value for name, value in gates.items() if name not in LIMITS},
            "images": content_digest(Path(images)) if images else None,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Result:
    """What became of a trial."""

    row: Row
    """Its figures; with `error` alone where it failed."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Suffix, such as `.onnx`, -> content of the file; none where it failed."""


def compress(trial: Trial, cache: str | None = None) -> Result:
    """Apply a trial's recipe, and measure all but the latency.

    Args:
        trial: The trial.
        cache: Folder that keeps results of passes; None: nothing is kept.

    Returns:
        The model's files and the figures. Nothing is raised: an error is part of the result.
    """
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", CompressWarning)
        try:
            row, files = _compressed(trial, cache)
        except CompressError as error:
            return Result({"error": str(error)})
        except Exception as error:  # one trial of many: the others go on
            return Result({"error": f"{type(error).__name__}: {one_line(error)}"})
    texts = [str(one.message) for one in told if issubclass(one.category, CompressWarning)]
    notes = {"notes": "; ".join(dict.fromkeys(texts))}
    return Result(row | notes | {"seconds": round(time.monotonic() - start, 3)}, files)


def time_result(model: str, result: str | Path, gates: Gates, seconds: float, clock: Clock = "wall") -> Row:
    """Time a result against the model that it was made from, run by run.

    Args:
        model: Path of the model.
        result: Path of the result.
        gates: How it is measured: provider, batch, threads, shapes.
        seconds: Time limit, by one clock.
        clock: As for `time_together`.

    Returns:
        As `time_together` for one result.

    Raises:
        CompressError: onnxruntime refuses a model.
    """
    return time_together(model, {"after": str(result)}, gates, seconds, clock)["after"]


def time_together(
    model: str, results: Mapping[str, str], gates: Gates, seconds: float, clock: Clock = "wall"
) -> dict[str, Row]:
    """Time results against the model that they were made from, all run by run.

    Args:
        model: Path of the model.
        results: Paths of the results by name.
        gates: How they are measured: provider, batch, threads, shapes.
        seconds: Time limit, by one clock.
        clock: `wall`, which turns to `processor`, the time of one thread, where the machine is too busy to
            tell ratios within two percent.

    Returns:
        By name the keys latency_ms, latency_before_ms, ratio, ratio_low, ratio_high (after over before),
        clock and device.

    Raises:
        CompressError: onnxruntime refuses a model.
    """
    from onnxcompress.runtime.stopwatch import Stopwatch

    stopwatch = Stopwatch(gates.runs_on, gates.batch, gates.threads, clock=clock, shapes=gates.shapes)
    changes = stopwatch.changes(model, results, seconds)
    by = ", processor time of one thread" if stopwatch.clock == "processor" else ""
    return {
        name: {
            "latency_ms": change.after_ms,
            "latency_before_ms": change.before_ms,
            "ratio": change.ratio,
            "ratio_low": change.low,
            "ratio_high": change.high,
            "clock": change.clock,
            "device": f"{change.provider}, batch {change.batch}{by}",
        }
        for name, change in changes.items()
    }


def structure(file: str | Path) -> str:
    """Identify a model by all but the values of its weights, on which its latency does not depend.

    Args:
        file: The model's file.

    Returns:
        A SHA-256 in hexadecimal.
    """
    import onnx

    proto = onnx.load(file, load_external_data=False)
    tensors = [*proto.graph.initializer, *(t.values for t in proto.graph.sparse_initializer)]
    for tensor in tensors:
        for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "external_data"):
            tensor.ClearField(name)
    for name in ("metadata_props", "doc_string"):
        proto.ClearField(name)
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def verdicts(row: Row, gates: Gates) -> list[Verdict]:
    """Judge the figures of a trial by the limits that they are enough for.

    Args:
        row: The figures.
        gates: The limits.

    Returns:
        A verdict for each limit; none on latency where it was not measured.

    Raises:
        OptionError: A limit on accuracy lacks labelled images.
    """
    from onnxcompress.runtime.latency import Ratio

    top1 = row.get("top1_before"), row.get("top1")
    ratio = row.get("ratio")
    measured = GateMeasurements(
        bytes=row["bytes"],
        inputs=row.get("inputs", ""),
        top1=None if top1[0] is None or top1[1] is None else (top1[0], top1[1]),
        agreement=row.get("agreement"),
        latency_ms=row.get("latency_ms"),
        ratio=None if ratio is None else Ratio(ratio, row["ratio_low"], row["ratio_high"]),
        device=row.get("device", ""),
        preprocess=row.get("preprocess", ""),
    )
    untimed = () if ratio is not None else TIMED
    return judge({name: limit for name, limit in gates.limits.items() if name not in untimed}, measured)


def _compressed(trial: Trial, cache: str | None) -> tuple[Row, dict[str, bytes]]:
    from onnxcompress.model import load, save
    from onnxcompress.model.model_like import model_bytes
    from onnxcompress.optimize.calibration import InputRequest
    from onnxcompress.optimize.intermediate_results import keeping
    from onnxcompress.pipeline import Pipeline
    from onnxcompress.pipeline.cache import Cache

    gates, kept = trial.recipe.gates, None if cache is None else Cache(cache)
    judged_by = InputRequest(gates.images, gates.preprocess, input_shape=gates.input_shape)
    with keeping(kept) if kept is not None else nullcontext():
        run = Pipeline(trial.recipe.passes).run(
            load(trial.model), cache=kept, guard=trial.recipe.guard, judged_by=judged_by
        )
    with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
        file = Path(folder) / "result.onnx"
        save(run.model, file)
        files = {one.name.removeprefix("result"): one.read_bytes() for one in Path(folder).iterdir()}
        sizes = {"bytes_before": model_bytes(trial.model), "bytes": model_bytes(file)}
        scores = {} if gates.images is None else _scores(trial.model, file, gates)
    sha = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
    figures = [step.result.figures for step in run.steps]
    missed = "; ".join(filter(None, (one.target_missed for one in figures)))
    dropped = [name for one in figures for name in getattr(one, "order", None) or ()]
    row = {"sha256": sha, **sizes, "target_missed": missed, "dropped": dropped, **_noise(run), **scores}
    return row, files


def _noise(run: Run) -> Row:
    """Noise of the outputs on inputs that no pass learned from, over their variation between inputs."""
    found = [step.result.guard for step in run.steps] + [run.guard]
    measured = next((one for one in reversed(found) if one is not None and one.fidelity is not None), None)
    if measured is None or measured.fidelity is None:
        return {}
    levels = [o.variation_db for o in measured.fidelity.outputs if o.variation_db is not None]
    return {"noise": 10 ** (-min(levels) / 10)} if levels else {}


def _scores(before: str, after: Path, gates: Gates) -> Row:
    from onnxcompress.evaluation.accuracy import agreement, logits, topk
    from onnxcompress.pipeline.cache_keys import content_digest

    measuring = dataclasses.replace(gates, **dict[str, Any](dict.fromkeys(LIMITS)))
    stamp = _digest(before, _stamp(before)), content_digest(Path(gates.images or ""))
    images, scores, preprocess = _baseline(before, measuring, stamp)
    now = logits(after, images, provider=gates.runs_on, threads=gates.threads)
    row: Row = {"inputs": counted(len(images), "image"), "preprocess": preprocess}
    row["agreement"] = agreement(scores, now)
    if images.y is not None:
        row |= {"top1_before": topk(scores, images.y)[0], "top1": topk(now, images.y)[0]}
    return row


@lru_cache(maxsize=4)
def _baseline(model: str, gates: Gates, stamp: tuple[str, str]) -> tuple[ImageSet, np.ndarray, str]:
    """Images to judge by and the scores of the model before: the same for many trials of a process."""
    from onnxcompress.data.image_set import load_images
    from onnxcompress.evaluation.accuracy import logits, preprocessing

    assert gates.images is not None
    choice = preprocessing(model, gates.preprocess, gates.input_shape)
    images = load_images(gates.images, preprocess=choice.preprocess)
    return images, logits(model, images, provider=gates.runs_on, threads=gates.threads), str(choice)


@lru_cache(maxsize=256)
def _digest(model: str, stamp: int) -> str:
    from onnxcompress.pipeline.cache_keys import model_file_digest

    return model_file_digest(Path(model))


def _stamp(path: str) -> int:
    """When a file was last changed: what is remembered of it holds until then."""
    return Path(path).stat().st_mtime_ns
