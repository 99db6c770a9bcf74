"""Search for the best models under limits: cheap proxies first, full repair for the few on the front.

    Study --batch--> candidates --compress, fast--> proxies --latency of the structure--> tell   (many)
    proxies about as fast as asked --timed together--> their ratios                                    (few)
    the front of the proxies --compress, in full--> results --timed together--> Front                  (few)

The latency of a proxy is measured once for each structure, a graph without the values of its weights: how
well weights are repaired changes no latency. What is on the way lies in `work` and is found again by a
search that was killed; results of passes, scores and folded models are shared through the cache.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from onnxcompress.errors import CompressError
from onnxcompress.evaluation.guard import Guard
from onnxcompress.progress import Progress, silent
from onnxcompress.search.aim import wanted_ratio
from onnxcompress.search.front import (
    choose_for_repair,
    contenders,
    is_measured,
    loss_of,
    pareto_front,
    pick,
    violations,
)
from onnxcompress.search.question import Search, alone, claim
from onnxcompress.search.results import Results, write_bytes
from onnxcompress.search.space import Candidate, Extent, extent_for, few_images
from onnxcompress.search.study import Study, Told
from onnxcompress.search.trial import Result, Row, Trial, compress
from onnxcompress.search.workers import Workers

PROXY_SHARE = 0.5
"""Share of the time for proxies; the rest is for repair and the last timing."""
CONTENDERS = 8
"""Proxies about as fast as asked that are timed together before some are chosen for repair."""
HOPELESS = 50.0
"""Loss from which on a proxy is of no use, and none that drops more is looked at."""


@dataclass(frozen=True)
class Found:
    """A fully repaired result."""

    trial: Trial
    row: Row


@dataclass(frozen=True)
class Front:
    """The outcome of a search."""

    found: tuple[Found, ...]
    """The Pareto front of latency, loss and size, the fastest first."""
    picked: int | None
    """Index of the result to take; None: no limit was given, or none keeps all of them."""
    proxies: tuple[Told, ...]
    dominated: tuple[Found, ...] = ()
    """Repaired results that others beat in everything."""
    failures: tuple[str, ...] = ()


def search(
    asked: Search, workers: Workers, *, cache: str | None = None, progress: Progress = silent
) -> Front:
    """Search, or go on with a search that was killed.

    Args:
        asked: What to search for.
        workers: Where candidates are made.
        cache: Folder that keeps results of passes; None: nothing is kept.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The front, whose files lie in `front` in the search's folder.

    Raises:
        OptionError: The folder holds another search, or one that is at work, or a limit lacks the images
            that it needs.
        RuntimeUnavailable: Optuna is not installed.
        CompressError: The model cannot be handled, or no candidate could be made at all.
    """
    from onnxcompress.model import load

    asked.check()
    extent = extent_for(load(asked.model), asked.gates, asked.inputs)
    claim(asked)
    with alone(asked):
        return _search(asked, extent, workers, cache, progress)


def _search(
    asked: Search, extent: Extent, workers: Workers, cache: str | None, progress: Progress
) -> Front:
    journal = asked.work / "study.journal"
    study = Study(journal, asked.seed, extent, asked.gates)
    if study.count() and not study.told():  # what failed then, all of it, may be mended
        journal.unlink()
        study = Study(journal, asked.seed, extent, asked.gates)
    clock = _Clock(study)
    _look_at_proxies(asked, study, workers, cache, clock, progress)
    proxies = study.told()
    if not proxies:
        failures = study.failures()
        raise CompressError(f"none of {len(failures)} candidates could be made, the first: {failures[0]}")
    repaired, failures = _repair(asked, proxies, workers, cache, clock, progress)
    progress("timing all together", 0, 1)
    timed = _timed(asked, repaired, workers)
    progress("timing all together", 1, 1)
    front = _outcome(asked, proxies, timed, [*study.failures(), *failures])
    clock.note()
    shutil.rmtree(asked.work / "proxies", ignore_errors=True)
    return front


class _Clock:
    """The time that the search took, in earlier runs, too."""

    def __init__(self, study: Study) -> None:
        self._study, self._before, self._start = study, study.spent, time.monotonic()

    @property
    def spent(self) -> float:
        return self._before + time.monotonic() - self._start

    def note(self) -> None:
        self._study.spent = self.spent


def _look_at_proxies(
    asked: Search,
    study: Study,
    workers: Workers,
    cache: str | None,
    clock: _Clock,
    progress: Progress,
) -> None:
    results = Results(asked.work / "proxies")
    progress("proxies", study.count(), asked.trials)
    in_time = asked.seconds is None or not study.count() or clock.spent <= PROXY_SHARE * asked.seconds
    while in_time and (batch := study.batch(workers.jobs, asked.trials)):
        rows = _proxies(asked, study, [candidate for _, candidate in batch], results, workers, cache)
        for (number, _), row in zip(batch, rows, strict=True):
            missed = [] if "error" in row else violations(row, asked.gates, loss=False)
            study.tell(number, row, missed)
        clock.note()
        progress("proxies", study.count(), asked.trials)
        in_time = asked.seconds is None or clock.spent <= PROXY_SHARE * asked.seconds


def _proxies(
    asked: Search,
    study: Study,
    candidates: Sequence[Candidate],
    results: Results,
    workers: Workers,
    cache: str | None,
) -> list[Row]:
    """Make candidates by closed forms on few inputs, and measure them."""
    hopeless = {one.candidate for one in study.told() if one.row["loss"] > HOPELESS}
    trials = [_trial(asked, one, effort="fast", repair=False) for one in candidates]
    rows: list[Row] = [
        {"error": "hopeless: it loses too much already with less dropped"}
        if hopeless.intersection(one.milder())
        else {}
        for one in candidates
    ]
    todo = [index for index, row in enumerate(rows) if not row]
    made = _made([trials[index] for index in todo], results, workers, cache)
    for index, row in zip(todo, made, strict=True):
        rows[index] = row
        if "error" not in row:
            latency = asked.latencies.of_structure(results.path(trials[index]), workers)
            rows[index] = _with_objectives(row | latency)
    return rows


def _made(trials: Sequence[Trial], results: Results, workers: Workers, cache: str | None) -> list[Row]:
    """Figures of trials, made now or found from before."""
    rows: list[Row | None] = [results.find(trial) for trial in trials]
    todo = [index for index, row in enumerate(rows) if row is None]
    keys = [trials[index].key for index in todo]  # of files as they are now
    calls = [partial(compress, trials[index], cache) for index in todo]
    for at, returned in workers.run(calls):
        result = Result({"error": str(returned)}) if isinstance(returned, CompressError) else returned
        if result.files:
            results.store(trials[todo[at]], result, keys[at])
        rows[todo[at]] = result.row
    return [row or {} for row in rows]


def _trial(
    asked: Search, candidate: Candidate, *, effort: str, repair: bool, dropped: Sequence[str] = ()
) -> Trial:
    """A trial of a candidate; of a full repair, with the recipe that is read from its file."""
    from onnxcompress.pipeline.recipe import Recipe, parse_recipe, write_recipe

    inputs = {"seed": asked.seed, **asked.inputs}
    if not repair:
        inputs |= few_images(asked.inputs)
    passes = candidate.passes(inputs, effort=effort, repair=repair, dropped=tuple(dropped))
    recipe = Recipe(passes, asked.gates, Guard(force=not repair))
    if repair:
        folder = asked.folder / "front"
        recipe = parse_recipe(write_recipe(recipe, folder), str(folder / f"{candidate.name}.yaml"))
    return Trial(candidate.name, asked.model, recipe, {"candidate": candidate.name})


def _with_objectives(row: Row) -> Row:
    if "error" in row:
        return row
    if not is_measured(row):
        return {"error": "nothing tells what it loses: no output could be compared; give --gate-images"}
    return row | {"loss": loss_of(row), "size": row["bytes"] / row["bytes_before"]}


def _repair(
    asked: Search,
    proxies: Sequence[Told],
    workers: Workers,
    cache: str | None,
    clock: _Clock,
    progress: Progress,
) -> tuple[list[Found], list[str]]:
    """Repair the most promising proxies in full, as long as there is time, and one at least."""
    rows = _surer(asked, proxies, workers)
    chosen = choose_for_repair(rows, asked.gates, asked.repairs)
    trials = [
        _trial(
            asked,
            proxies[index].candidate,
            effort=asked.effort,
            repair=True,
            dropped=proxies[index].row["dropped"],
        )
        for index in chosen
    ]
    results = Results(asked.work / "repaired")
    found: list[Found] = []
    failures: list[str] = []
    longest = 0.0
    progress("repairs", 0, len(trials))
    for start in range(0, len(trials), workers.jobs):
        begun = clock.spent
        if found and asked.seconds is not None and begun + longest > asked.seconds:
            break  # another one would not end in time
        batch = trials[start : start + workers.jobs]
        for trial, row in zip(batch, _made(batch, results, workers, cache), strict=True):
            if "error" in row:
                failures.append(f"{trial.name}: {row['error']}")
            else:
                found.append(Found(trial, row))
        longest = max(longest, clock.spent - begun)
        clock.note()
        progress("repairs", min(start + workers.jobs, len(trials)), len(trials))
    if not found:
        raise CompressError(f"no candidate could be repaired: {'; '.join(failures)}")
    return found, failures


def _surer(asked: Search, proxies: Sequence[Told], workers: Workers) -> list[Row]:
    """Return the figures of the proxies; of those about as fast as asked with ratios timed together."""
    rows = [one.row for one in proxies]
    if (wanted := wanted_ratio(asked.gates, rows)) is None:
        return rows
    results = Results(asked.work / "proxies")
    near = contenders(rows, wanted, CONTENDERS)
    trials = [_trial(asked, proxies[at].candidate, effort="fast", repair=False) for at in near]
    files = {rows[at]["sha256"]: results.path(trial) for at, trial in zip(near, trials, strict=True)}
    surer = asked.latencies.of_contenders(files, workers)
    return [_with_objectives(row | surer.get(row["sha256"], {})) for row in rows]


def _timed(asked: Search, repaired: Sequence[Found], workers: Workers) -> list[Found]:
    """Time all results together, run by run, unless that is done."""
    results = Results(asked.work / "repaired")
    files = {found.trial.name: str(results.path(found.trial)) for found in repaired}
    hashes = {found.trial.name: found.row["sha256"] for found in repaired}
    rows = asked.latencies.of_front(files, hashes, workers)
    return [
        dataclasses.replace(found, row=_with_objectives(found.row | rows[found.trial.name]))
        for found in repaired
    ]


def _outcome(
    asked: Search, proxies: Sequence[Told], repaired: Sequence[Found], failures: Sequence[str]
) -> Front:
    """Sort out the front, and put its files and recipes where the user finds them."""
    from onnxcompress.pipeline.recipe import write_recipe

    ordered = sorted(repaired, key=lambda found: (found.row["ratio"], found.row["loss"]))
    values = [(f.row["ratio"], f.row["loss"], f.row["size"]) for f in ordered]
    chosen = pick([found.row for found in ordered], asked.gates)  # it may keep a limit that is no objective
    on_front = {*pareto_front(values)} | ({chosen} if chosen is not None else set())
    front = [ordered[index] for index in sorted(on_front)]
    dominated = [found for found in ordered if found not in front]
    source, target = Results(asked.work / "repaired"), Results(asked.folder / "front")
    names = {file.stem for file in source.folder.glob("*.json")}
    for old in target.folder.iterdir():
        earlier = old.name.split(".onnx")[0] in names or old.stem in names
        if earlier and not old.is_dir():
            old.unlink()
    placed = []
    for found in front:
        for file in source.folder.glob(f"{found.trial.name}.onnx*"):
            write_bytes(target.folder / file.name, file.read_bytes())
        _write(target.path(found.trial, ".yaml"), write_recipe(found.trial.recipe, target.folder))
        placed.append(Found(found.trial, found.row | {"output": str(target.path(found.trial))}))
    picked = pick([found.row for found in placed], asked.gates)
    return Front(tuple(placed), picked, tuple(proxies), tuple(dominated), tuple(failures))


def _write(path: Path, text: str) -> None:
    write_bytes(path, text.encode())
