"""Inputs kept aside from learning: which they are, and what takes their place where there are too few."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from onnxcompress.account import InputSource
from onnxcompress.data.image_set import ImageSet
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import Inputs
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction.held_out import FEWEST, MADE, MOST, HeldOut, keep_aside
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome, tuning_text
from onnxcompress.optimize.synthesis.synthetic_inputs import synthetic_images
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
    for seed in (0, 1):  # such as somebody might learn from
        mine = synthetic_images(network(), "procedural", MADE, Preprocess(scale=1.0), seed).array()
        assert not np.array_equal(aside.numpy(), mine)


def held_out(count: int = 10) -> tuple[HeldOut, Tensor]:
    """With batches of 4, of which the last one is smaller."""
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return HeldOut(Executor.from_model(network()), x, "x", "y", batch=4), x


def test_mean_squares_are_over_all_inputs() -> None:
    judge, x = held_out()
    teacher = Executor.from_model(network())
    made = teacher.run({"x": x}, ["y"])["y"]
    found = judge.mean_squares(teacher, ["y", "x"])
    assert found == pytest.approx([float(made.square().mean()), float(x.square().mean())], rel=1e-5)


def test_an_error_is_relative_to_all_features_and_of_the_values_that_are_tried() -> None:
    """Of a weight 1.1 times as large the features lack 0.1² of their energy."""
    judge, _ = held_out()
    student = Executor.from_model(network())
    assert judge.error(student, "y") == pytest.approx(0, abs=1e-10)
    larger = {"w": 1.1 * student.parameters["w"]}
    assert judge.error(student, "y", larger) == pytest.approx(0.01, rel=1e-3)
    assert judge.error(student, "y", {"w": torch.full_like(larger["w"], float("nan"))}) == float("inf")


def test_tuning_is_discarded_where_no_step_was_better() -> None:
    kept, discarded = (TuningOutcome(12, 70, step, 0.0225, 0.0144, 70) for step in (1, 0))
    assert not kept.discarded
    assert tuning_text(kept) == (
        "fine-tuning: relative error 0.150 before it, the weights of step 1 of 70 kept"
    )
    assert tuning_text(discarded) == (
        "fine-tuning was discarded: none of 70 steps was better than the relative error 0.150"
    )
