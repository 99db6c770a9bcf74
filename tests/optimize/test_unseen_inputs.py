"""Inputs to judge by: no pass learned from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxcompress.data.image_set import ImageSet, image_count, load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.model import Model, load
from onnxcompress.optimize.calibration import InputRequest, Inputs, gather_inputs
from onnxcompress.optimize.unseen_inputs import COUNT, unseen_inputs
from onnxcompress.runtime.random_inputs import SEED
from tests.helpers.folding import graph


def _pixels(inputs: Inputs) -> np.ndarray:
    assert isinstance(inputs.images, ImageSet)
    return inputs.images.x


@pytest.fixture
def net(models: Path) -> Model:
    return load(models / "resnet20-fashion.onnx")


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """200 images, each with its number for its pixels."""
    file = tmp_path / "numbered.npz"
    x = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None, None], (200, 28, 28, 1))
    np.savez(file, x=x, y=np.arange(200) % 10)
    return file


def test_images_left_out_are_not_those_that_are_learned_from(net: Model, numbered: Path) -> None:
    request = InputRequest(str(numbered), "raw", 180, seed=3)
    learned = {int(x.mean()) for x in _pixels(gather_inputs(net, request))}
    found = unseen_inputs(net, [request])
    judged = {
        round(float(x.mean()) * 255) if x.max() <= 1 else int(x.mean())
        for f in found.feeds
        for x in f["input"]
    }
    assert found.description == f"{COUNT} images of {numbered} that no pass learned from"
    assert len(judged) == COUNT
    assert not judged & learned
    assert image_count(numbered) == 200


def test_made_images_have_a_seed_of_their_own(net: Model) -> None:
    found = unseen_inputs(net, [InputRequest(seed=SEED), InputRequest(seed=0)])
    assert found.description == f"{COUNT} procedural images of seed {SEED + 1}"
    learned = gather_inputs(
        net, InputRequest(inputs="procedural", synthetic=COUNT, seed=SEED)
    ).images.array()
    judged = np.concatenate([feed["input"] for feed in found.feeds])
    assert judged.shape == learned.shape
    assert np.abs(judged[:, None] - learned[None]).max(axis=(2, 3, 4)).min() > 0.1


def test_images_of_the_gates_come_first_unless_a_pass_learns_from_them(net: Model, numbered: Path) -> None:
    judge = InputRequest(str(numbered), "raw")
    assert unseen_inputs(net, [InputRequest()], judge).description.endswith("that the gates judge by")
    assert "procedural" in unseen_inputs(net, [judge], judge).description


def test_where_no_picture_fits_inputs_are_random() -> None:
    body = "s = Add (a, b) y = Cast <to = 1> (s)"
    model = Model.from_proto(graph("(float[1,7] a, float[1,7] b) => (float[1,7] y)", body, {}))
    found = unseen_inputs(model, [])
    assert set(found.feeds[0]) == {"a", "b"}
    assert found.description == "8 random inputs"


def test_left_out_images_are_the_rest(numbered: Path) -> None:
    how = Preprocess.parse("raw")
    taken, rest = (
        load_images(numbered, preprocess=how, count=150, seed=5, left_out=left).names
        for left in (None, 100)
    )
    assert len(rest) == 50
    assert not set(taken) & set(rest)
