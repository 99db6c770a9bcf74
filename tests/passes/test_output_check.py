"""Whether corrected biases bring outputs nearer to the reference's: decibels of known differences."""

from __future__ import annotations

import re

import numpy as np
import pytest

from onnxcompress.errors import ModelError
from onnxcompress.model import Model
from onnxcompress.optimize.synthesis.drawn_inputs import DrawnSet
from onnxcompress.passes.correct_bias.output_check import EXACT, check_nearer
from onnxcompress.statistics.record import ChannelStatistics, write_record
from tests.helpers.folding import graph, weight

IMAGES = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
WEIGHT = weight(6, 4)


def network(*offsets: float) -> Model:
    """Two outputs, each with an offset that it should not have."""
    arrays = {"w": WEIGHT, "b": np.full(4, offsets[0], np.float32), "c": np.full(4, offsets[1], np.float32)}
    body = "y = Gemm(x, w, b) r = Gemm(x, w, c) z = Relu(r)"
    return Model.from_proto(graph("(float[N,6] x) => (float[N,4] y, float[N,4] z)", body, arrays))


def decibels(output: np.ndarray, offset: float) -> float:
    """The variance of an output over the square of what it has too much."""
    return float(10 * np.log10(output.astype(np.float64).var() / offset**2))


def test_the_worst_output_before_and_after_is_told_in_decibels() -> None:
    """Of the images that were kept aside: here the second output is right, the first gets better."""
    found = check_nearer(network(0, 0), network(0.5, 0), network(0.2, 0), DrawnSet(IMAGES))
    y = IMAGES @ WEIGHT
    assert (found.before, found.after) == pytest.approx((decibels(y, 0.5), decibels(y, 0.2)), abs=0.01)
    same = check_nearer(network(0, 0), network(0, 0), network(0, 0), DrawnSet(IMAGES))
    assert (same.before, same.after) == (EXACT, EXACT)


def test_any_output_that_gets_further_away_refuses_the_correction() -> None:
    """More than a twentieth of a decibel, even where another output gains more."""
    y = IMAGES @ WEIGHT
    for lost, refused in ((0.04, False), (0.06, True)):
        worse = 0.5 * 10 ** (lost / 20)
        after = network(worse, 0.0)
        if not refused:
            check_nearer(network(0, 0), network(0.5, 0.8), after, DrawnSet(IMAGES))
            continue
        text = (
            f"would bring output 'y' further from the reference's, from {decibels(y, 0.5):.1f} to "
            f"{decibels(y, worse):.1f} dB of signal to noise on 40 images kept aside"
        )
        with pytest.raises(ModelError, match=re.escape(text)):
            check_nearer(network(0, 0), network(0.5, 0.8), after, DrawnSet(IMAGES))


def test_noise_has_the_recorded_statistics_of_the_input() -> None:
    """Ten times the deviation: the same offset is twenty decibels less."""
    found = []
    for std in (1.0, 10.0):
        reference, before, after = network(0, 0), network(0.5, 0), network(0.5, 0)
        for model in (reference, before, after):
            known = ChannelStatistics(np.zeros(6, np.float32), np.full(6, std, np.float32))
            write_record(model, {"x": known})
            model.touch()
        found.append(check_nearer(reference, before, after, None).after)
    assert found[1] - found[0] == pytest.approx(20, abs=0.01)


def test_values_that_are_not_finite_any_more_are_the_worst() -> None:
    with pytest.raises(ModelError, match=r"from \d+\.\d to -120\.0 dB"):
        check_nearer(network(0, 0), network(0.5, 0), network(np.inf, 0), DrawnSet(IMAGES))
