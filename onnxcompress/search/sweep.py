"""Carry out a plan: what is done is not done again, what fails is listed and gone on from.

Plan --compress, several at once--> Results --time_result, one at a time--> table
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from onnxcompress.errors import CompressError
from onnxcompress.progress import Progress, silent
from onnxcompress.search.card import model_card
from onnxcompress.search.plan import Plan
from onnxcompress.search.results import Results, write_bytes
from onnxcompress.search.trial import Result, Row, Trial, compress, time_result, verdicts
from onnxcompress.search.workers import Workers

Report = Callable[[list[Row]], None]
"""Called with all rows as they are, each time one of them changes."""


def sweep(
    plan: Plan,
    results: Results,
    workers: Workers,
    *,
    cache: str | None = None,
    report: Report = lambda rows: None,
    progress: Progress = silent,
) -> list[Row]:
    """Carry out the runs of a plan that are not done.

    Args:
        plan: The plan.
        results: Where results are kept, and found again.
        workers: Where the runs take place.
        cache: Folder that keeps results of passes; None: nothing is kept.
        report: Called after each run, so that a table is never far behind.
        progress: Called with the stage, the runs done and the runs in all.

    Returns:
        A row for each run, in the plan's order; `status` is done, missed (a limit), failed or waiting.
    """
    _check_places(plan, results)
    found = [results.find(trial) for trial in plan.trials]
    rows: list[Row] = [_row(t, row, results) for t, row in zip(plan.trials, found, strict=True)]

    def keep(index: int, row: Row | None) -> None:
        trial = plan.trials[index]
        rows[index] = _row(trial, row, results)
        if rows[index]["status"] != "failed":
            write_bytes(results.path(trial, ".md"), _card(trial, rows[index]).encode())
        report(rows)

    report(rows)
    for index, row in enumerate(found):
        if row is not None:  # judged anew
            keep(index, row)
    _compress(plan.trials, rows, results, workers, cache, keep, progress)
    if plan.latency_seconds:
        _time(plan, rows, results, workers, keep, progress)
    return rows


def preview(plan: Plan, results: Results | None) -> list[Row]:
    """List the runs of a plan, and which of them are done.

    Args:
        plan: The plan.
        results: Where results are kept; None: nowhere yet.

    Returns:
        A row for each run.

    Raises:
        CompressError: A pass cannot start: a file or a package is missing, or options contradict each
            other.
    """
    from onnxcompress.data.image_set import image_count
    from onnxcompress.pipeline import Pipeline

    for trial in plan.trials:
        Pipeline(trial.recipe.passes).check()
    judged = {(g.images, g.max_drop is not None) for g in (trial.recipe.gates for trial in plan.trials)}
    for images, labels in judged:
        if images is not None:
            image_count(images, labels=labels)
    if results is not None:
        _check_places(plan, results)
    found = [None if results is None else results.find(trial) for trial in plan.trials]
    return [_row(trial, row, results) for trial, row in zip(plan.trials, found, strict=True)]


def _check_places(plan: Plan, results: Results) -> None:
    """Refuse results that would replace what is read, or what no sweep wrote. Raises OptionError."""
    inputs = {Path(trial.model).resolve() for trial in plan.trials}
    for trial in plan.trials:
        results.check_place(trial, inputs)


def _compress(
    trials: Sequence[Trial],
    rows: list[Row],
    results: Results,
    workers: Workers,
    cache: str | None,
    keep: Callable[[int, Row | None], None],
    progress: Progress,
) -> None:
    todo = [index for index, row in enumerate(rows) if row["status"] == "waiting"]
    keys = _keys([trials[index] for index in todo])
    calls = [partial(compress, trials[index], cache) for index in todo]
    for done, (at, found) in enumerate(workers.run(calls), 1):
        result = Result({"error": str(found)}) if isinstance(found, CompressError) else found
        if "error" not in result.row:
            results.store(trials[todo[at]], result, keys[at])
        keep(todo[at], result.row)
        progress("runs", done, len(todo))


def _keys(trials: Sequence[Trial]) -> list[str]:
    """Compute the keys of trials by the files as they are now; of one whose model is broken, none."""
    keys = []
    for trial in trials:
        try:
            keys.append(trial.key)
        except CompressError:
            keys.append("")
    return keys


def _time(
    plan: Plan,
    rows: list[Row],
    results: Results,
    workers: Workers,
    keep: Callable[[int, Row | None], None],
    progress: Progress,
) -> None:
    todo = [at for at, row in enumerate(rows) if row["status"] != "failed" and row.get("ratio") is None]
    for done, index in enumerate(todo, 1):
        trial = plan.trials[index]
        file = results.path(trial)
        call = partial(time_result, trial.model, str(file), trial.recipe.gates, plan.latency_seconds)
        try:
            keep(index, results.add(trial, workers.run_alone(call)))
        except CompressError as error:
            keep(index, {**rows[index], "error": f"latency: {error}"})
        progress("latencies", done, len(todo))


def _card(trial: Trial, row: Row) -> str:
    """The model card of a run; its recipe lies where the plan says."""
    labels = dict(trial.labels)
    recipe = f"`{Path(labels.pop('recipe')).name}`"
    values = ", ".join(f"{name}={value}" for name, value in labels.items() if name != "model")
    return model_card(trial, row, f"{recipe} with {values}" if values else recipe)


def _row(trial: Trial, figures: Row | None, results: Results | None) -> Row:
    """A trial's row of the table."""
    if figures is None or results is None:
        return {**trial.labels, "status": "waiting"}
    if "error" in figures:
        return {**trial.labels, **figures, "status": "failed"}
    output = str(results.path(trial))
    try:
        missed = [verdict.text for verdict in verdicts(figures, trial.recipe.gates) if not verdict.passed]
    except CompressError as error:  # --max-drop on images without labels
        return {**trial.labels, **figures, "output": output, "status": "failed", "error": str(error)}
    missed += [figures["target_missed"]] if figures.get("target_missed") else []
    status = "missed" if missed else "done"
    return {**trial.labels, **figures, "output": output, "status": status, "missed": "; ".join(missed)}
