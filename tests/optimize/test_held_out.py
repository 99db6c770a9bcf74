"""Inputs kept aside from learning: which they are, and what takes their place where there are too few."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnxcompress.account import InputSource
from onnxcompress.data.image_set import ImageSet
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import Inputs
from onnxcompress.optimize.reconstruction.held_out import FEWEST, MADE, MOST, keep_aside
from tests.helpers.folding import graph, weight


def network() -> Model:
    arrays = {"w": weight(4, 3, 3, 3)}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,6,6] y)", "y = Conv(x, w)", arrays))


def inputs(*counts: int) -> Inputs:
    """As many images of each source; image i has the number i in each pixel."""
    total = sum(counts)
    x = np.broadcast_to(np.arange(total, dtype=np.uint8).reshape(-1, 1, 1, 1), (total, 8, 8, 3))
    images = ImageSet(np.ascontiguousarray(x), None, ("",) * total, Preprocess(scale=1.0))
    return Inputs(images, tuple(InputSource("images", n, 0, "") for n in counts))


@pytest.mark.parametrize("count", [32, 100, 200])
def test_an_eighth_is_kept_aside_from_everywhere_and_nothing_is_on_both_sides(count: int) -> None:
    given = inputs(count)
    values = torch.from_numpy(given.images.array())
    learned, aside, shares = keep_aside(network(), given, values, 0)
    numbers, apart = (x[:, 0, 0, 0].int().tolist() for x in (learned, aside))
    assert sorted(numbers + apart) == list(range(count))
    assert len(apart) == count // 8
    assert max(np.diff(apart)) == min(np.diff(apart)) == 8
    assert shares is None


def test_no_more_are_kept_aside_than_help() -> None:
    values = torch.zeros(1000, 3, 8, 8)
    given = Inputs(inputs(1).images, (InputSource("images", 1000, 0, ""),))
    learned, aside, _ = keep_aside(network(), given, values, 0)
    assert (len(learned), len(aside)) == (1000 - len(aside), 62)
    assert len(aside) <= MOST


def test_each_source_keeps_its_weight() -> None:
    given = inputs(40, 120)
    learned, _, shares = keep_aside(network(), given, torch.from_numpy(given.images.array()), 0)
    assert shares is not None
    first = learned[:, 0, 0, 0] < 40
    assert float(shares[first].sum()) == pytest.approx(float(shares[~first].sum()), rel=0.01)


def test_where_a_few_would_be_missed_others_are_made() -> None:
    given = inputs(8 * FEWEST - 1)
    values = torch.from_numpy(given.images.array())
    learned, aside, _ = keep_aside(network(), given, values, 0)
    assert torch.equal(learned, values)
    assert aside.shape == (MADE, 3, 8, 8)
    other = keep_aside(network(), given, values, 1)[1]
    assert not torch.equal(aside, other)
