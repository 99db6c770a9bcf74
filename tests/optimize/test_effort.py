"""Effort: counts, how `auto` chooses, what is said before the work starts, what an option overrides."""

from __future__ import annotations

import itertools
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onnxcompress.formatting import roughly
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import InputRequest
from onnxcompress.optimize.effort import (
    DROP_BLOCKS,
    PASSES,
    PRUNE,
    QUANTIZE,
    Effort,
    announce,
    choose_effort,
    computed_numbers,
)
from onnxcompress.optimize.reconstruction.gptq import nearest, reconstruct
from onnxcompress.optimize.reconstruction.ridge import LayerMoments
from onnxcompress.optimize.reconstruction.saturation import SaturationBounds
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.quantize import Quantize, engine
from tests.helpers.folding import graph, norm, weight

EFFORTS: tuple[Effort, ...] = ("fast", "balanced", "best")


def network(side: int = 8, batch: str = "N") -> Model:
    """Two convolutions with BatchNorm on square images, a global pool and a Gemm."""
    body = """c = Conv<pads=[1, 1, 1, 1]>(x, w) n = BatchNormalization(c, g, b, m, v) r = Relu(n)
    d = Conv<pads=[1, 1, 1, 1]>(r, w2, b2) s = Relu(d) p = GlobalAveragePool(s) f = Flatten(p)
    y = Gemm<transB=1>(f, wg, bg)"""
    arrays = {"w": weight(6, 3, 3, 3), **norm(6), "w2": weight(6, 6, 3, 3, seed=1), "b2": weight(6, seed=2)}
    arrays |= {"wg": weight(4, 6, seed=3), "bg": weight(4, seed=4)}
    return Model.from_proto(
        graph(f"(float[{batch},3,{side},{side}] x) => (float[{batch},4] y)", body, arrays)
    )


@pytest.mark.parametrize("table", [QUANTIZE, PRUNE, DROP_BLOCKS])
def test_more_effort_is_never_less_work(table: dict[Effort, object]) -> None:
    for less, more in itertools.pairwise(astuple(table[effort]) for effort in EFFORTS):  # type: ignore[call-overload]
        assert less != more
        assert all(a <= b for a, b in zip(less, more, strict=True))


@pytest.mark.parametrize(
    ("options", "effort"),
    [
        ({}, "fast"),
        ({"for_runtime": "tensorrt"}, "balanced"),
        ({"symmetric": True, "activation_type": "int8"}, "balanced"),
        ({"weight_bits": 4}, "balanced"),
    ],
)
def test_coarse_grids_are_never_fitted_with_the_least_work(options: dict[str, Any], effort: Effort) -> None:
    """Symmetric ranges of 8 bits leave 7 behind a ReLU."""
    _, _, work = engine.work_of(Quantize(effort="fast", **options).resolved(), network())
    assert (work.sweeps, work.stretch) == (QUANTIZE[effort].sweeps, QUANTIZE[effort].stretch)


@pytest.mark.parametrize("pass_", list(PASSES))
def test_auto_is_best_for_small_networks_only(pass_: str) -> None:
    small, large = network(8), network(2048)
    assert computed_numbers(large) == pytest.approx(computed_numbers(small) * 256**2, rel=0.01)
    assert choose_effort("auto", small, pass_, 128) == "best"
    assert choose_effort("auto", large, pass_, 128) == "balanced"
    assert choose_effort("fast", small, pass_, 128) == "fast"


def test_the_numbers_that_a_network_computes_are_those_of_its_tensors() -> None:
    """Of one image, whatever the batch; those of the input are not computed."""
    maps, rest = 5 * 6 * 8 * 8, 6 + 6 + 4  # two convolutions, a norm, two Relus; pool, Flatten, Gemm
    assert computed_numbers(network()) == computed_numbers(network(batch="4")) == maps + rest


@pytest.mark.parametrize(("pass_", "seconds"), [("quantize", 30), ("prune", 380), ("drop-blocks", 900)])
def test_auto_is_best_where_that_takes_no_longer_than_it_may(
    pass_: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a thousand million numbers a second: 35, 240 and 115 times over the numbers of each input."""
    times = {"quantize": 35, "prune": 240, "drop-blocks": 115}[pass_]
    model = network()
    for factor, effort in ((0.99, "best"), (1.01, "balanced")):
        numbers = int(factor * seconds * 1e9 / times / 128)
        monkeypatch.setattr("onnxcompress.optimize.effort.computed_numbers", lambda _, n=numbers: n)
        assert choose_effort("auto", model, pass_, 128) == effort
        assert choose_effort("balanced", model, pass_, 128) == "balanced"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, 35), ({"steps": 0}, 20), ({"steps": 3000}, 175), ({"time": "4m"}, 260)],
    ids=str,
)
def test_the_expected_time_has_the_steps_or_the_time_of_fine_tuning(
    given: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 s to start and 10 to time; 500 inputs 75 times over, 32 inputs a step 10 times over."""
    told: list[str] = []
    monkeypatch.setattr("onnxcompress.optimize.effort.computed_numbers", lambda model: 1000)
    monkeypatch.setattr("onnxcompress.optimize.effort.measured_rate", lambda device: 1000 * 500 * 75 / 6)
    options = replace(DropBlocks(blocks=1, effort="best"), **given)
    resolved = options.with_counts("drop-blocks", network())
    resolved.announce("drop-blocks", network(), lambda stage, done, total: told.append(stage), 500)
    assert told == [f"best effort on 500 inputs, about {expected} s"]


@pytest.mark.parametrize(("rate", "said"), [(1e9, 5), (1e6, 30), (1e5, 270)])
def test_the_expected_time_is_the_work_over_the_rate(
    rate: float, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four seconds at least, in steps of five: here 35 times over 7600 numbers of 100 inputs."""
    monkeypatch.setattr("onnxcompress.optimize.effort.measured_rate", lambda device: rate)
    monkeypatch.setattr("onnxcompress.optimize.effort.computed_numbers", lambda model: 7600)
    told: list[str] = []
    announce("quantize", "best", network(), lambda stage, done, total: told.append(stage), 100)
    assert told == [f"best effort on 100 inputs, about {said} s"]


@pytest.mark.parametrize(("seconds", "said"), [(0, "5 s"), (300, "5 min"), (3740, "62 min")])
def test_long_times_are_in_minutes(seconds: float, said: str) -> None:
    assert roughly(seconds) == said


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 9),
        ({"images": "i.npz"}, 5),
        ({"images": "i.npz", "count": 3}, 3),
        ({"images": "i.npz", "inputs": "distilled"}, 14),
    ],
    ids=str,
)
def test_the_expected_count_is_that_of_real_images_where_there_are_any(
    options: dict[str, Any], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("i.npz", x=np.zeros((5, 4, 4, 3), np.uint8))
    assert InputRequest(**options, synthetic=9).expected == count


@pytest.mark.parametrize(
    ("pixels", "counts"),
    [
        (224 * 224, (8, 16, 128)),
        (448 * 448, (8, 16, 128)),
        (112 * 112, (32, 64, 128)),
        (28 * 28, (128, 128, 128)),
        (0, (8, 16, 128)),
    ],
)
def test_small_images_are_made_in_greater_number(pixels: int, counts: tuple[int, ...]) -> None:
    """As many as have the pixels of those of 224 x 224, up to 128; 0: no pictures."""
    assert tuple(QUANTIZE[effort].count(pixels) for effort in EFFORTS) == counts


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("cls", [Quantize, Prune])
def test_the_effort_and_the_expected_time_are_said_first(
    cls: type[Quantize] | type[Prune], effort: Effort
) -> None:
    said: list[tuple[str, int, int]] = []
    model = network()
    result = cls(effort=effort, synthetic=4).apply(model, lambda *step: said.append(step))
    assert said[0][0].startswith(f"{effort} effort on 4 inputs, about ")
    assert said[0][1:] == (0, 0)
    assert result.inputs[0].count == 4
    assert result.measured is not None
    assert result.measured.effort == effort


def test_an_effort_gives_the_count_of_inputs_unless_an_option_does() -> None:
    def count(**options: object) -> int:
        result = Quantize(inputs="procedural", **options).apply(network())  # type: ignore[arg-type]
        return result.inputs[0].count

    assert count(effort="fast", synthetic=3) == 3
    assert count(effort="fast") == QUANTIZE["fast"].count(64) == QUANTIZE["fast"].most_inputs
    assert QUANTIZE["fast"].count(224 * 224) == QUANTIZE["fast"].inputs < QUANTIZE["best"].inputs


def test_more_effort_rounds_better() -> None:
    """Of 4 bits on correlated inputs, by the counts of each effort: over the error of `fast`."""
    generator = torch.Generator().manual_seed(0)
    rows, mix = torch.randn(1, 16, 48, generator=generator), torch.randn(1, 48, 48, generator=generator)
    x = mix @ torch.randn(1, 48, 800, generator=generator)
    moments = LayerMoments.empty(rows)
    moments.add(x, torch.zeros(1, 16, 800))
    errors = []
    for effort in EFFORTS:
        work, allowed = QUANTIZE[effort], SaturationBounds(-8, 7)
        found = reconstruct(
            rows,
            moments,
            allowed,
            True,
            ridge=1e-3,
            target=float("inf"),
            ratios=work.ratios,
            sweeps=work.sweeps,
        )
        errors.append(float(((found.weight - rows) @ x).var(2).mean()))
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.97 * errors[1]


def test_without_sweeps_each_weight_is_rounded_to_its_nearest() -> None:
    """And the bias makes up for the mean of what its rounding changes."""
    generator = torch.Generator().manual_seed(0)
    rows, x = torch.randn(1, 5, 12, generator=generator), torch.rand(1, 12, 400, generator=generator)
    moments = LayerMoments.empty(rows)
    moments.add(x, torch.zeros(1, 5, 400))
    allowed = SaturationBounds(-127, 127)
    found = reconstruct(rows, moments, allowed, True, ridge=0.1, target=float("inf"), sweeps=0)
    np.testing.assert_array_equal(found.integers, torch.round(rows / found.scale).clamp(-127, 127))
    lost = (rows - found.weight)[0].double() @ x[0].double().mean(1)
    np.testing.assert_allclose(found.shift[0], lost, atol=1e-6)
    swept = reconstruct(rows, moments, allowed, True, ridge=0.1, target=float("inf"), sweeps=1)
    assert swept.error < 1 == nearest(rows, allowed, True).error


@pytest.mark.parametrize("effort", EFFORTS)
def test_steps_of_fine_tuning_are_those_of_the_effort_unless_they_are_given(effort: Effort) -> None:
    options = DropBlocks(blocks=1, effort=effort)
    counted = options.with_counts("drop-blocks", network())
    assert counted.effort == effort
    assert (counted.steps, counted.synthetic) == (DROP_BLOCKS[effort].steps, DROP_BLOCKS[effort].inputs)
    given = replace(options, steps=7)
    assert given.with_counts("drop-blocks", network()).steps == 7
