"""Calls that make many results: a search, and a sweep."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from onnxcompress.api.models import model_of
from onnxcompress.api.results import Front, shown
from onnxcompress.errors import require
from onnxcompress.evaluation.gates import Gates
from onnxcompress.model import save
from onnxcompress.pipeline.cache import Cache
from onnxcompress.progress import Progress, silent
from onnxcompress.search.workers import Processes, Workers


def search_best(
    model: Any,
    out: str | os.PathLike[str],
    *,
    gates: Gates = Gates(),  # noqa: B008  it is frozen
    images: str | os.PathLike[str] | None = None,
    preprocess: str | None = None,
    count: int | None = None,
    inputs: Literal["auto", "images", "distilled", "procedural", "layerwise"] = "auto",
    input_shape: str | None = None,
    trials: int = 40,
    repairs: int = 6,
    seconds: float | None = None,
    effort: Literal["auto", "fast", "balanced", "best"] = "auto",
    latency_seconds: float = 2.0,
    seed: int = 0,
    workers: Workers | None = None,
    cache: Cache | None = None,
    progress: Progress = silent,
) -> Front:
    """Find the best models under limits on speed, loss and size; `onnxcompress search` in Python.

    Args:
        model: A path, a ModelProto or its bytes, a `Model`, or an `onnx_ir.Model`; it is not changed.
        out: Folder of the outcome: the models, their recipes and cards, a table and a page.
        gates: The limits, the images to judge by, and how results are measured.
        images: Images to learn from; None: inputs are made.
        preprocess: As --preprocess, of the images to learn from.
        count: Use this many of the images, drawn with the seed.
        inputs: What passes learn from.
        input_shape: Sizes of an input that the file leaves open.
        trials: Candidates to look at.
        repairs: Candidates of the front that are repaired in full.
        seconds: Time for all of it; None: no limit.
        effort: Effort of the full repair.
        latency_seconds: Time for the latency of a candidate's structure.
        seed: Random seed.
        workers: Where candidates are made; None: one at a time, in a process of its own.
        cache: Where results of passes are kept and looked up; None: nowhere.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The front, of which `found[picked]` keeps all limits.

    Raises:
        RuntimeUnavailable: Optuna is not installed.
        CompressError: As `onnxcompress.search.search.search`.
    """
    from onnxcompress.search.outcome import front_rows, write_outcome
    from onnxcompress.search.page import front_page
    from onnxcompress.search.question import Search
    from onnxcompress.search.search import search

    require("search_best", "optuna")
    learning = {
        "images": None if images is None else os.fspath(images),
        "preprocess": preprocess,
        "count": count,
        "inputs": inputs,
        "input_shape": input_shape,
    }
    given = {name: value for name, value in learning.items() if value is not None}
    with _as_file(model) as path, _where(workers) as where:
        asked = Search(
            path, Path(out), gates, given, trials, repairs, seconds, effort, latency_seconds, seed
        )
        kept = None if cache is None else str(cache.folder)
        front = search(asked, where, cache=kept, progress=progress)
    write_outcome(front, front_rows(front, gates), asked)
    return shown(Front, front, partial(front_page, front, asked.model, gates))


def sweep(
    plan: str | os.PathLike[str],
    table: str | os.PathLike[str],
    *,
    models: str | os.PathLike[str] | None = None,
    workers: Workers | None = None,
    cache: Cache | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Run recipes on models, with all values of their variables; what is done is not done again.

    Args:
        plan: The plan, a YAML file.
        table: The table of results, `.csv`, `.jsonl` or `.parquet`.
        models: Folder of the results; None: `table` without its suffix.
        workers: Where runs take place; None: one at a time, in a process of its own.
        cache: Where results of passes are kept and looked up; None: nowhere.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        A row for each run, with `status` done, missed or failed; nothing is raised for those that failed.

    Raises:
        OptionError: Something in the plan is wrong; the message names the line.
    """
    from onnxcompress.search.plan import read_plan
    from onnxcompress.search.results import FIGURES, Results, check_table, write_table
    from onnxcompress.search.sweep import sweep as run_all

    target, read = Path(table), read_plan(os.fspath(plan))
    check_table(target)
    columns = ["model", "recipe", *read.variables, *FIGURES]
    folder = Path(models) if models is not None else target.with_suffix("")
    with _where(workers) as where:
        return run_all(
            read,
            Results(folder),
            where,
            cache=None if cache is None else str(cache.folder),
            report=lambda rows: write_table(target, columns, rows),
            progress=progress,
        )


@contextmanager
def _where(workers: Workers | None) -> Iterator[Workers]:
    """The workers that were given, which stay open, or a process of their own."""
    own = workers or Processes(1)
    try:
        yield own
    finally:
        if workers is None:
            own.close()


@contextmanager
def _as_file(model: Any) -> Iterator[str]:
    """Give the path of a model, which candidates read; one in memory is written for the while."""
    if isinstance(model, str | os.PathLike):
        yield os.fspath(model)
        return
    read = model_of(model)
    with TemporaryDirectory() as folder:
        path = Path(folder, Path(read.name).stem + ".onnx")
        save(read, path)
        yield str(path)
