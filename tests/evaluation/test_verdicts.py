"""Verdicts of the guard on fixed figures: where the floors lie, what is said, what the JSON holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onnxcompress.evaluation.fidelity import Fidelity, OutputFidelity, Part
from onnxcompress.evaluation.guard import (
    LOSSY,
    Floors,
    Guard,
    GuardMeasurements,
    Status,
    Verdict,
    as_dict,
    difference,
    verdict,
)
from onnxcompress.model import Model
from onnxcompress.passes import CATALOGUE, PassResult, load_pass
from onnxcompress.passes.judging import exact_limit
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.prune.figures import PrunedLayerRow, PruneFigures, WeightBytes
from tests.helpers.folding import DTYPES, graph

GOOD = OutputFidelity("good", 40.0, 38.0, 0.5, 0.01, 0.97)


def measured(*outputs: OutputFidelity, **others: Any) -> GuardMeasurements:
    return GuardMeasurements("16 images", 16, 1.5, Fidelity(outputs), **others)


def of_db(decibels: float) -> OutputFidelity:
    """An output whose variation is as much above the noise; the plain signal is 5 dB more."""
    return OutputFidelity("y", decibels + 5, decibels, 0.25, 0.02, 0.75)


def judged(decibels: float, floors: Floors) -> str:
    return verdict(measured(GOOD, of_db(decibels)), floors).status


@pytest.mark.parametrize(
    ("floors", "warn", "refuse"), [(Floors(), 7, 3), (LOSSY, 5, 0), (Floors(9, 8), 9, 8)]
)
def test_below_the_first_floor_is_a_warning_and_below_the_second_a_refusal(
    floors: Floors, warn: float, refuse: float
) -> None:
    above = [judged(floor + 0.01, floors) for floor in (warn, refuse)]
    below = [judged(floor - 0.01, floors) for floor in (warn, refuse)]
    assert (above, below) == (["kept", "warned"], ["warned", "refused"])


def test_passes_that_remove_parts_may_lose_more() -> None:
    floors = {entry.name: load_pass(entry.name).floors for entry in CATALOGUE}
    lossy = {name for name, own in floors.items() if own == LOSSY}
    assert lossy == {"prune", "drop-blocks", "drop-channels"}
    assert all(own == Floors(7, 3) for name, own in floors.items() if name not in lossy)


@pytest.mark.parametrize(
    ("after", "status"),
    [(20.0, "kept"), (19.6, "kept"), (19.4, "warned"), (17.1, "warned"), (16.9, "refused"), (25, "kept")],
)
def test_against_a_reference_only_what_is_lost_counts(after: float, status: Status) -> None:
    """Half a decibel less is a warning, three a refusal; more is no fault."""
    found = verdict(measured(of_db(after), before=Fidelity((of_db(20.0),))), Floors(90, 80))
    assert found.status == status
    if status in ("warned", "refused"):
        assert found.text == (
            f"outputs kept 20.0 dB of the reference's before, and would keep {after:.1f} dB"
        )


def test_what_is_said_of_each_fault() -> None:
    part = Part(1, 4, 2, 0.345, 3.04, 1.06)
    crushed = replace(GOOD, name="boxes", worst_part=part)
    integers = OutputFidelity("index", None, None, 3.0, 0.5, 0.876, integers_db=6.24)
    broken = replace(GOOD, name="nan", not_finite=7, constant=True)
    far = replace(GOOD, name="far", max_rel=0.25)

    def text(*outputs: OutputFidelity, **others: Any) -> str:
        return verdict(measured(*outputs, **others), Floors()).text

    assert text(GOOD, crushed) == (
        "output 'boxes': variation to noise 1.1 dB (signal to noise 3.0 dB) in 2 channels from 4 on of "
        "dimension 1 (values near 0.34), below 3 dB"
    )
    assert text(GOOD) == "output 'good': variation to noise 38.0 dB (signal to noise 40.0 dB)"
    ratio = "87.6 % of the values are the same, which counts as 6.2 dB"
    assert text(integers) == f"output 'index': {ratio}, below 7 dB"
    assert text(GOOD, integers) == text(GOOD)
    low = replace(integers, agreement=0.1, integers_db=-9.0)
    assert text(low, GOOD) == (
        "output 'index': 10.0 % of the values are the same, which counts as -9.0 dB, below 3 dB"
    )
    assert verdict(measured(low, GOOD), Floors()).status == "warned"
    assert verdict(measured(low), Floors()).status == "refused"
    exact = replace(integers, agreement=0.9989, integers_db=29.0)
    assert text(exact, max_rel=1e-4).endswith("change, and the pass may change 0.1 % of them at most")
    assert verdict(measured(GOOD, exact, max_rel=1e-2), Floors()).status == "kept"
    few = measured(replace(GOOD, max_rel=1e-7), exact, max_rel=1e-4)  # a ranking with ties
    assert verdict(few, Floors()).status == "warned"
    assert verdict(measured(exact, max_rel=1e-4), Floors()).status == "refused"
    assert verdict(measured(GOOD, exact, max_rel=5e-2), Floors()).status == "kept"
    assert text(GOOD, broken) == (
        "output 'nan' would have 7 values that are not finite; output 'nan' would no longer depend on the "
        "input"
    )
    assert text(GOOD, far, max_rel=1e-4) == (
        "output 'far' changes by 0.25 of its largest magnitude, and the pass may change it by 0.0001 at "
        "most"
    )
    assert text(GOOD, problem="it does not run") == "it does not run"
    assert text(skipped="it never ran") == "outputs not compared: it never ran"


def test_inputs_without_a_yes_are_a_warning_unless_the_function_is_kept() -> None:
    unseen = replace(GOOD, name="text", unseen=True)
    found = verdict(measured(unseen), Floors())
    assert (found.status, found.text) == (
        "warned",
        "output 'text' says no everywhere on these inputs, which tell nothing of a yes: compare the files "
        "on --images of your own",
    )
    assert verdict(measured(unseen, max_rel=0.1), Floors()).status == "kept"


def test_a_warning_names_the_three_layers_that_lose_most() -> None:
    rows = tuple(
        PrunedLayerRow(f"layer{at}", "Conv", f"w{at}", 0.5, db)
        for at, db in enumerate([9.0, 3.0, 7.0, 5.0, 8.0])
    )
    guard = measured(of_db(4.0))
    result = PassResult(measured=PruneFigures(0.5, 10, 5, WeightBytes(10, 5), "", rows), guard=guard)
    found = result.verdict(Prune(), Guard())
    assert found is not None
    assert found.advice[0] == (
        "the layers that lose most: layer1 (3.0 dB), layer3 (5.0 dB), layer2 (7.0 dB)"
    )


@pytest.mark.parametrize(("kind", "limit"), [("float", 1e-4), ("float16", 5e-2)])
def test_a_pass_that_keeps_the_function_may_change_it_by_the_rounding_of_its_type(
    kind: str, limit: float
) -> None:
    arrays = {"w": np.ones((3, 3), DTYPES[kind])}
    proto = graph(f"({kind}[N,3] x) => ({kind}[N,3] y)", "y = MatMul(x, w)", arrays)
    assert exact_limit(Model.from_proto(proto)) == limit
    for factor, status in ((0.99, "kept"), (1.01, "refused")):
        found = verdict(measured(replace(GOOD, max_rel=factor * limit), max_rel=limit), Floors())
        assert found.status == status


def test_json_has_each_figure_under_its_key() -> None:
    before = replace(GOOD, name="before")
    facts = measured(of_db(6.0), before=Fidelity((before,)), max_rel=0.1)
    values = as_dict(facts, Verdict("warned", "text", ("advice",), Floors(7.5, 2.5)))
    outputs = [values.pop(key)[0] for key in ("outputs", "outputs_before")]
    assert values == {
        "status": "warned", "text": "text", "advice": ["advice"], "warn_snr_db": 7.5, "min_snr_db": 2.5,
        "max_rel": 0.1, "inputs": "16 images", "count": 16, "seconds": 1.5,
    }  # fmt: skip
    assert [one["name"] for one in outputs] == ["y", "before"]
    assert [one["snr_db"] for one in outputs] == [11.0, 40.0]
    assert [one["variation_db"] for one in outputs] == [6.0, 38.0]
    assert difference(measured(GOOD, of_db(20))) == {"max_abs": 0.25, "max_rel": 0.02, "output": "y"}
    assert difference(measured(skipped="it never ran")) == {"skipped": "it never ran"}


def test_the_worst_output_counts_wherever_it_stands() -> None:
    """In noise, in difference and in the share of inputs that keep their class."""
    for outputs in ((GOOD, of_db(6)), (of_db(6), GOOD)):
        found = Fidelity(outputs)
        assert (found.worst.name, found.furthest.name, found.agreement) == ("y", "y", 0.75)
    unclassed = replace(GOOD, agreement=None)
    assert Fidelity((unclassed,)).agreement is None
