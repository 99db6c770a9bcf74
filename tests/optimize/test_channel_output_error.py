"""Errors of the outputs without channels: refitted as the layers store their weights, and as they are."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from onnxcompress.model import Model
from onnxcompress.optimize.channel_drop import worth
from onnxcompress.optimize.channel_drop.output_error import OutputErrors
from onnxcompress.optimize.channel_drop.worth import Removal, measure_readers, removal_by_refit
from tests.graph.test_channel_cuts import ARRAYS, IMAGE, STEM, VECTOR, P
from tests.helpers.channel_cutting import with_groups
from tests.helpers.folding import graph, weight

TWINS, CONSTANT = (3, 4), 1
OWN = {"bias": weight(5, seed=30), "fc_t": weight(12, 5, seed=14)}
READERS = {
    "1x1": (IMAGE, f"{STEM} y = Conv(r, v, bias)"),
    "3x3": (IMAGE, f"{STEM} d = Conv(r, u, e) y = Conv(d, v)"),
    "transposed": (IMAGE, f"{STEM} d = ConvTranspose<strides = [2,2]>(r, up) y = Conv(d, six)"),
    "depthwise between": (IMAGE, f"{STEM} d = Conv<group = 12, {P}>(r, dw, e) y = Conv(d, v)"),
    "Gemm": (VECTOR, f"{STEM} m = GlobalAveragePool(r) f = Flatten(m) y = Gemm(f, fc_t, bias)"),
    "Gemm, transB": (VECTOR, f"{STEM} m = GlobalAveragePool(r) f = Flatten(m) y = Gemm<transB = 1>(f, fc)"),
    "two readers": (IMAGE, f"{STEM} d = Conv<{P}>(r, u, e) s = Add(r, d) y = Conv(s, v)"),
}
IMAGES = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 4, 8, 8)).astype(np.float32))


def errors_of(signature: str, body: str) -> tuple[OutputErrors, np.ndarray]:
    """Errors of a network in which two channels are the same, and one is a constant; the labels."""
    arrays = {name: values.copy() for name, values in (ARRAYS | OWN).items()}
    for name in ("w", "b", "dw", "u", "e"):
        arrays[name][TWINS[1]] = arrays[name][TWINS[0]]
    arrays["w"][CONSTANT], arrays["b"][CONSTANT] = 0, 2
    used = {name: arrays[name] for name in set(re.findall(r"\w+", body)) & arrays.keys()}
    model, groups = with_groups(lambda: Model.from_proto(graph(signature, body, used)))
    readers = measure_readers(model, groups, IMAGES, "x", ["y"], ridge=1e-7, batch=32)
    stem = next(x for x in groups.channels.layers if x.linear.node.outputs[0].name == "a")
    return OutputErrors.of(model, readers, IMAGES, "x", ["y"], batch=24), stem.writes


@pytest.mark.parametrize("apart", [False, True], ids=["taps together", "taps apart"])
@pytest.mark.parametrize("name", READERS)
def test_what_others_say_as_well_is_lost_without_an_error(
    name: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twin takes the weights, in whatever layout a layer stores them; others cannot."""
    if apart:
        monkeypatch.setattr(worth, "MAX_FAN_IN", 1)
    errors, labels = errors_of(*READERS[name])
    assert errors.without(labels[[TWINS[0]]]) < 1e-5
    assert errors.without(labels[[TWINS[1]]]) < 1e-5
    assert min(errors.without(labels[[0]]), errors.without(labels[list(TWINS)])) > 1e-3


@pytest.mark.parametrize("name", ["1x1", "3x3", "Gemm"])
def test_a_bias_makes_up_for_a_constant(name: str) -> None:
    errors, labels = errors_of(*READERS[name])
    assert errors.without(labels[[CONSTANT]]) < 1e-8


def test_nothing_lost_is_no_error_and_all_lost_is_what_the_outputs_vary() -> None:
    errors, labels = errors_of(*READERS["1x1"])
    assert errors.without(labels[:0]) == 0
    wanted = torch.cat([batch["y"] for batch in errors.wanted])
    size = wanted.square().mean((0, 2, 3))
    expected = float((wanted.var((0, 2, 3), correction=0) / size).mean())
    assert errors.without(labels) == pytest.approx(expected, rel=0.01)


def test_in_front_of_a_pool_errors_that_all_places_share_are_seen() -> None:
    """A pool takes off what differs between places, and nothing of images that are the same everywhere."""
    body = f"{STEM} d = Conv(r, o) m = GlobalAveragePool(d) f = Flatten(m) y = Gemm<transB = 1>(f, fc)"
    arrays = {name: ARRAYS[name] for name in ("w", "b", "o", "fc")}
    model, groups = with_groups(lambda: Model.from_proto(graph(VECTOR, body, arrays)))
    scales = []
    for images in (IMAGES, IMAGES[:, :, :1, :1].expand(-1, -1, 8, 8).contiguous()):
        readers = measure_readers(model, groups, images, "x", ["y"], ridge=1e-3, batch=32)
        removal = removal_by_refit(groups.free[0].group, readers)
        measured = OutputErrors.of(model, readers, images, "x", ["y"], batch=32).rescale(removal, [6])
        scales.append(measured.costs[6] / removal.costs[6])
    assert scales[0] < 3
    assert scales[1] > 5 * scales[0]


def test_costs_are_scaled_to_what_is_measured_and_never_fall() -> None:
    errors, labels = errors_of(*READERS["3x3"])
    removal = Removal(labels, np.linspace(0.0, 1.0, 12))
    scaled = errors.rescale(removal, [3, 9])
    assert scaled.labels is labels
    for lost in (3, 9):
        assert scaled.costs[lost] == pytest.approx(errors.without(labels[:lost]))
    between = [scaled.costs[lost] / removal.costs[lost] for lost in (3, 6, 9)]
    assert between[1] == pytest.approx((between[0] + between[2]) / 2)
    assert (np.diff(scaled.costs) >= 0).all()
    assert errors.rescale(removal, [0]) is removal  # at no cost there is no scale
