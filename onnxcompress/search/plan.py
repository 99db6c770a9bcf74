"""Plans of `sweep`: models x recipes x values of their variables, read from YAML.

    models:                       # files, or a file and the values that its variables have
      - resnet20-fashion.onnx
      - mobilenetv2-fashion.onnx: {blocks: 1}
    recipes: [small.yaml, fast.yaml]
    variables:                    # name: the values to try; a recipe takes those that it has
      blocks: [1, 2]
      bits: [8, 4]
    gates:                        # how results are measured and judged, in place of the recipes' own
      images: fashion-test2k.npz
      min_agreement: 90
    latency_seconds: 10           # for each result; 0: latency is not measured

Paths are relative to the plan's folder, those in values, too. A value is text as after -D.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from onnxcompress.errors import InputError
from onnxcompress.evaluation.gates import Gates
from onnxcompress.pipeline.recipe import read_gates, read_recipe, variables_of
from onnxcompress.pipeline.recipe_yaml import Document, read_document, shown
from onnxcompress.search.results import FIGURES
from onnxcompress.search.trial import TIMED, Trial

SECTIONS = ("models", "recipes", "variables", "gates", "latency_seconds")
LATENCY_SECONDS = 10.0
LONGEST_NAME = 200
"""Bytes of the name of a run's files; file systems allow some 255 with what is put behind it."""


@dataclass(frozen=True)
class Plan:
    """The runs of a plan."""

    trials: tuple[Trial, ...]
    variables: tuple[str, ...]
    """Names of all variables, as columns of the table."""
    latency_seconds: float


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan, and every recipe with all values that it is to have.

    Args:
        path: The file.

    Returns:
        The runs, none of them twice.

    Raises:
        OptionError: Something in the plan or a recipe is wrong; the message names the line.
        InputError: A model does not exist.
        RuntimeUnavailable: The package of a pass cannot be imported.
    """
    document = read_document(path)
    top = document.mapping(document.value, (), "section", SECTIONS)
    given = document.mapping(top.get("variables"), ("variables",), "variable", None)
    variables = {n: _values(document, n, value, ("variables", n)) for n, value in given.items()}
    gates = read_gates(document, top["gates"]) if top.get("gates") is not None else None
    models = list(_models(document, top.get("models")))
    recipes = _paths(document, "recipes", top.get("recipes"))
    for index, (_, own) in enumerate(models):
        _check_names(document, own, ("models", index), recipes)
    _check_names(document, variables, ("variables",), recipes)
    trials = [
        trial
        for (model, own), recipe in itertools.product(models, recipes)
        for trial in _trials(document, model, recipe, variables | own, gates)
    ]
    names = dict.fromkeys([*variables, *(name for _, own in models for name in own)])
    seconds = _seconds(document, top)
    timed = {name for trial in trials for name in trial.recipe.gates.limits if name in TIMED}
    if timed and not seconds:
        document.fail(("latency_seconds",), f"latency_seconds: 0, and the limit {min(timed)} needs it")
    return Plan(tuple(_named_apart(trials)), tuple(names), seconds)


def _trials(
    document: Document,
    model: str,
    recipe: str,
    variables: Mapping[str, tuple[str, ...]],
    gates: Gates | None,
) -> Iterator[Trial]:
    """All runs of a recipe on a model: one for each combination of values."""
    taken = [name for name in variables if name in variables_of(recipe)]
    for values in itertools.product(*(variables[name] for name in taken)):
        chosen = dict(zip(taken, values, strict=True))
        read = read_recipe(recipe, chosen, Path(document.name).parent)
        judged = dataclasses.replace(read, gates=read.gates if gates is None else gates)
        judged.gates.check()
        labels = {"model": model, "recipe": recipe, **chosen}
        yield Trial(_name(model, recipe, chosen), model, judged, labels)


def _name(model: str, recipe: str, chosen: Mapping[str, str]) -> str:
    """Name of a run's files: what it is, in letters that every file system takes."""
    words = [Path(model).stem, Path(recipe).stem, *(f"{name}={value}" for name, value in chosen.items())]
    name = re.sub(r"[^\w.=,+-]+", "_", "-".join(words))
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME // 4]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _named_apart(trials: Sequence[Trial]) -> Iterator[Trial]:
    """Runs that differ, under names that differ: two folders may have a file of the same name."""
    labels: dict[str, Mapping[str, Any]] = {}
    for trial in trials:
        if labels.get(trial.name, trial.labels) != trial.labels:
            apart = hashlib.sha256(json.dumps(trial.labels).encode()).hexdigest()[:8]
            trial = dataclasses.replace(trial, name=f"{trial.name}-{apart}")
        if trial.name not in labels:
            labels[trial.name] = trial.labels
            yield trial


def _models(document: Document, listed: Any) -> Iterator[tuple[str, dict[str, tuple[str, ...]]]]:
    if not isinstance(listed, list) or not listed:
        document.fail(("models",), "models: expected a list of ONNX files")
    for index, item in enumerate(listed):
        own = {}
        if isinstance(item, dict) and len(item) == 1:
            item, values = next(iter(item.items()))
            place = ("models", index, item)
            given = document.mapping(values, place, "variable", None)
            own = {name: _values(document, name, value, place) for name, value in given.items()}
        if not isinstance(item, str):
            document.fail(("models", index), f"models: expected a file, got {shown(item)}")
        path = _path(document, item)
        if not Path(path).is_file():
            raise InputError(f"{document.name}: models: {path}: no such file")
        yield path, own


def _paths(document: Document, section: str, listed: Any) -> list[str]:
    if not isinstance(listed, list) or not listed or not all(isinstance(one, str) for one in listed):
        document.fail((section,), f"{section}: expected a list of files")
    return [_path(document, one) for one in listed]


def _path(document: Document, path: str) -> str:
    return os.path.normpath(Path(document.name).parent / path)


def _values(document: Document, name: str, value: Any, place: tuple[Any, ...]) -> tuple[str, ...]:
    """The values of a variable as text, as -D has them."""
    listed = value if isinstance(value, list) else [value]
    if not listed or any(one is None or isinstance(one, dict | list) for one in listed):
        document.fail(place, f"{name}: expected values to try, such as [1, 2]")
    return tuple(str(one).lower() if isinstance(one, bool) else str(one) for one in listed)


def _check_names(
    document: Document, variables: Mapping[str, Any], place: tuple[Any, ...], recipes: list[str]
) -> None:
    known = sorted(set().union(*map(variables_of, recipes)))
    for name in variables:
        if name not in known:
            document.unknown((*place, name), "variable of a recipe", name, known)
        if name in ("model", "recipe", *FIGURES):
            document.fail(
                (*place, name), f"{name}: a column of the table; call the variable something else"
            )


def _seconds(document: Document, top: Mapping[str, Any]) -> float:
    value = top.get("latency_seconds", LATENCY_SECONDS)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < inf:
        document.fail(("latency_seconds",), f"latency_seconds: expected seconds, got {shown(value)}")
    return float(value)
