"""The figures of passes: in JSON as published, restored by a cache as they were, never changed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from pydantic import TypeAdapter

from onnxcompress.account import Change, Figures, InputSource, Refusal, StageSeconds, as_json, json_name
from onnxcompress.model import Model
from onnxcompress.passes import CATALOGUE, Pass, PassResult, load_pass, run
from onnxcompress.pipeline import Pipeline
from onnxcompress.pipeline.cache import Cache
from onnxcompress.pipeline.cache_keys import step_key
from onnxcompress.progress import Progress, silent
from onnxcompress.report.sections.passes import ELSEWHERE
from tests.helpers.folding import graph, weight

COMMON = {"inputs", "seconds", "output_snr_db", "effort", "target_missed"}
PUBLISHED = {
    "fold-bn": ({"folded", "left", "recorded"}, set[str]()),
    "equalize": (
        {"layers", "equalized", "sweeps", "converged", "largest_scale", "lost_bits", "nodes_added",
         "recorded"},
        set[str](),
    ),
    "absorb-bias": ({"layers", "channels", "largest", "approximated"}, set[str]()),
    "calibrate": ({"tensors", "estimated", "kept", "dead", "agreement"}, set[str]()),
    "correct-bias": ({"layers", "left", "largest"}, set[str]()),
    "prune": ({"sparsity", "weights", "zeros", "bytes", "speed"}, {"layers"}),
    "quantize": (
        {"layers", "channel_ranges", "runtime"}, {"budget", "float_tensors", "float_layers", "tuning"}
    ),
    "fp16": (
        {"error", "all_float16", "max_error", "converted", "kept_float32", "seconds"}, {"runtime"}
    ),
    "drop-blocks": (
        {"feature", "preprocess", "latency", "blocks"},
        {"noisy_latency", "order", "choosing_loss", "feature_error", "tuning", "additivity"},
    ),
    "drop-channels": (
        {"feature", "preprocess", "latency", "groups"}, {"macs", "parameters", "feature_error", "tuning"}
    ),
}  # fmt: skip
"""Pass -> keys of its JSON that are always there, and keys that may be left out."""

KINDS = [(entry.name, load_pass(entry.name).figures) for entry in CATALOGUE]


def test_every_pass_has_figures_of_its_own() -> None:
    assert {name for name, _ in KINDS} == PUBLISHED.keys()
    assert len({kind for _, kind in KINDS}) == len(KINDS)
    for _, kind in KINDS:
        assert issubclass(kind, Figures)
        with pytest.raises(dataclasses.FrozenInstanceError):
            object.__new__(kind).inputs = ()  # type: ignore[misc]


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize(("name", "kind"), KINDS, ids=[name for name, _ in KINDS])
def test_figures_are_published_by_their_keys_and_restored_as_they_were(
    name: str, kind: type[Figures], filled: bool
) -> None:
    figures = sample(kind, filled)
    always, sometimes = PUBLISHED[name]
    assert as_json(figures).keys() == (always | sometimes | COMMON if filled else always)
    assert json.dumps(as_json(figures))
    stored = json.loads(json.dumps(dataclasses.asdict(figures)))
    assert TypeAdapter(kind).validate_python(stored) == figures


def sample(hint: Any, filled: bool) -> Any:
    """A value of a type, different for each kind of number; not filled: None wherever that may be."""
    inner, parts = get_origin(hint), get_args(hint)
    if inner in (Union, UnionType):
        return sample(parts[0], True) if filled else None
    if inner is Literal:
        return parts[-1]
    if inner is Mapping:
        return {sample(parts[0], filled): sample(parts[1], filled)}
    if inner is tuple:
        return tuple(sample(part, filled) for part in parts if part is not ...)
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        hints = get_type_hints(hint)
        return hint(**{name: sample(part, filled) for name, part in hints.items()})
    return {float: math.inf, int: 3, str: "text", bool: True}[hint]


def test_none_is_left_out_only_where_it_is_the_default() -> None:
    @dataclass(frozen=True)
    class Some(Figures):
        needed: int | None
        extra: int | None = None
        renamed: tuple[float, ...] = dataclasses.field(default=(), metadata=json_name("shares"))

    assert as_json(Some(None)) == {"needed": None, "shares": []}
    seconds = StageSeconds(inputs=1.5)
    source = InputSource("images", 3, 0, "asked for", "unit")
    values = as_json(Some(1, 2, (0.5,), inputs=(source,), seconds=seconds, output_snr_db={"y": 3.0}))
    assert values == {
        "needed": 1,
        "extra": 2,
        "shares": [0.5],
        "inputs": [dataclasses.asdict(source)],
        "seconds": {"inputs": 1.5},
        "output_snr_db": {"y": 3.0},
    }
    assert next(iter(values)) == "needed"  # what is the pass's own comes first


def test_the_report_hides_fields_that_there_are() -> None:
    for kind, names in ELSEWHERE.items():
        assert set(names) <= {f.name for f in fields(kind)}


def test_a_result_is_never_changed() -> None:
    changes = [Change("a", "b")]
    result = PassResult(changes, [Refusal("c", "d")], None)
    changes.clear()
    assert result.changes == (Change("a", "b"),)
    assert result.modified
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.refusals = ()  # type: ignore[misc]
    assert (result.inputs, result.measured_json()) == ((), {})
    assert PassResult(input_shape={"x": (1, 3)}).measured_json() == {"input_shape": {"x": [1, 3]}}


@dataclass(frozen=True)
class CountFigures(Figures):
    """What `count` counted."""

    nodes: int


@dataclass(frozen=True)
class Count(Pass):
    """Count the nodes and note it."""

    name: ClassVar[str] = "count"
    figures: ClassVar[type[Figures]] = CountFigures
    number: ClassVar[type[int]] = int

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[CountFigures]:
        model.set_metadata("nodes", str(len(model.graph.nodes)))
        return PassResult([Change("model", "counted")], measured=CountFigures(self.number(1)))


class Undeclared(Count):
    """One that says nothing of its figures."""

    figures: ClassVar[type[Figures]] = Figures


class Wrong(Count):
    """One whose figures are of another type than they say."""

    number: ClassVar[type[int]] = str  # type: ignore[assignment]


class Unwritable(Count):
    """One whose figures are no JSON values."""

    number: ClassVar[type[int]] = np.int64  # type: ignore[assignment]


def small() -> Model:
    return Model.from_proto(
        graph("(float[N,3] x) => (float[N,3] y)", "y = MatMul(x, w)", {"w": weight(3, 3)})
    )


def test_figures_of_another_class_are_a_defect_of_the_pass() -> None:
    with pytest.raises(TypeError, match="count: it measured CountFigures, and its class attribute"):
        run([Undeclared()], small())


@pytest.mark.parametrize("kind", [Wrong, Unwritable])
def test_what_could_not_be_restored_is_not_kept_and_said(
    kind: type[Count], tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache, model = Cache(tmp_path_factory.mktemp("cache")), small()
    with pytest.warns(UserWarning, match="the result is not kept: its CountFigures: "):
        found = Pipeline([kind()]).run(model, cache=cache)
    assert found.steps[0].result.modified
    assert cache.find(step_key(model.digest(), kind()), CountFigures) is None
    assert list(cache.folder.iterdir()) == []
    Pipeline([Count()]).run(model, cache=cache)
    entry = cache.find(step_key(model.digest(), Count()), CountFigures)
    assert entry is not None
    assert entry.result.measured == CountFigures(1)
