"""Candidates that are expected to be just as fast as a limit asks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from onnxcompress.evaluation.gates import Gates
from onnxcompress.search.aim import aimed, wanted_ratio
from onnxcompress.search.space import CHANNELS, Candidate, Extent

INT8 = Candidate(weights="int8", activations=8)
HALF = Candidate(weights="float16")
EXTENT = Extent(20, 40)


def ratio(one: Candidate, *, fixed: float = 0.0) -> float:
    """Latency of a network whose blocks take 4 % each, but `fixed`, and a percent of channels 0.6 %."""
    kind = {"float32": 1.0, "int8": 0.8, "float16": 1.2}[one.weights]
    return fixed + (1 - fixed) * kind * (1 - 0.04 * one.blocks) * (1 - 0.006 * one.channels)


KNOWN = [Candidate(5), Candidate(10), INT8, HALF, Candidate(channels=20)]


@pytest.mark.parametrize("wanted", [0.75, 0.6, 0.45])
def test_each_kind_is_aimed_at_with_the_fewest_blocks_that_are_enough(wanted: float) -> None:
    found = list(aimed({one: ratio(one) for one in KNOWN}, wanted, EXTENT))
    assert {one.weights for one in found} == {"float32", "int8"}  # half precision gains no time
    assert Candidate(weights="float32", blocks=found[0].blocks) == found[0]
    for one in found:
        assert ratio(one) <= wanted
        if one.blocks:
            assert ratio(replace(one, blocks=one.blocks - 1)) > 0.985 * wanted
    floats = [one.channels for one in found if one.weights == "float32" and one.blocks]
    assert floats == list(range(0, floats[-1] + 1, CHANNELS[2]))


def test_what_is_measured_corrects_what_is_expected() -> None:
    """A fifth of the time is in no block: the first answer is too slow, the one after it is not."""
    known = {one: ratio(one, fixed=0.2) for one in (Candidate(4), INT8)}
    for _ in range(4):
        first = next(aimed(known, 0.5, EXTENT))
        if first in known:
            break
        known[first] = ratio(first, fixed=0.2)
    assert known[first] <= 0.5 < ratio(replace(first, blocks=first.blocks - 2), fixed=0.2)


@pytest.mark.parametrize("known", [[], [INT8], [Candidate(channels=20)]])
def test_without_a_dropped_block_nothing_is_aimed_at(known: list[Candidate]) -> None:
    assert list(aimed({one: ratio(one) for one in known}, 0.5, EXTENT)) == []


def test_more_blocks_than_there_are_are_not_asked_for() -> None:
    found = list(aimed({one: ratio(one) for one in KNOWN}, 0.5, Extent(6, 0)))
    assert all(one.blocks <= 6 and one.channels == 0 for one in found)


def test_the_limit_that_asks_for_more_counts() -> None:
    rows = [{"latency_before_ms": 10.0}, {}]
    assert wanted_ratio(Gates(min_speedup=2), rows) == 0.5
    assert wanted_ratio(Gates(min_speedup=2, max_latency=4), rows) == pytest.approx(0.4)
    assert wanted_ratio(Gates(max_size=1), rows) is None
    assert wanted_ratio(Gates(max_latency=4), [{}]) is None
