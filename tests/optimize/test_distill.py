"""Distilled images and twins: what they must match, and what must not change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from onnxcompress.data.image_set import ImageSet
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import ModelError
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model, load
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.synthesis.distillation import MORE_STEPS, distill
from onnxcompress.optimize.synthesis.statistics_alignment import standardize
from onnxcompress.optimize.synthesis.statistics_mismatch import mismatch
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.statistics.record import (
    ChannelStatistics,
    known_statistics,
    read_record,
    write_record,
)
from tests.helpers.folding import graph, norm, weight
from tests.helpers.paths import MODELS

pytestmark = pytest.mark.usefixtures("whole_learning")

FASHION = Preprocess.parse("fashion-mnist")


def _folded(name: str = "resnet20-fashion.onnx") -> Model:
    model = load(MODELS / name)
    FoldBatchNorm().apply(model)
    return model


def _blobs(count: int) -> ImageSet:
    """Smooth random images: nothing like clothes."""
    rng = np.random.default_rng(0)
    x = np.kron(rng.integers(0, 256, (count, 4, 4, 1)), np.ones((1, 7, 7, 1))).astype(np.uint8)
    return ImageSet(x, None, tuple(map(str, range(count))), FASHION)


def _mismatch(model: Model, images: ImageSet) -> float:
    """Mean relative error of the deviations of all recorded tensors, on these images."""
    record = read_record(model)
    found = Executor.from_model(model).run({"input": torch.from_numpy(images.array())}, list(record))
    errors = [
        np.abs(found[n].detach().std((0, 2, 3)).numpy() / s.std - 1)[s.std > 1e-3].mean()
        for n, s in record.items()
        if found[n].dim() == 4
    ]
    return float(np.mean(errors))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20-fashion.onnx", "mobilenetv2-fashion.onnx"])
def test_distilled_images_have_the_statistics_of_the_training_set(name: str) -> None:
    model = _folded(name)
    start = _blobs(48)
    made = distill(model, start, steps=15)
    assert made.x.shape == start.x.shape
    assert made.x.dtype == np.uint8
    assert _mismatch(model, made) < 0.65 * _mismatch(model, start)


def test_distilling_follows_its_seed_and_leaves_the_model_alone() -> None:
    model = _folded()
    before = model.digest()
    first, again, other = (distill(model, _blobs(8), steps=2, seed=seed).x for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    assert model.digest() == before


@pytest.mark.parametrize("text", ["mean=0.2,0.3,0.4 order=bgr", "layout=nhwc std=0.5 order=bgr", "raw"])
def test_pixels_survive_the_way_there_and_back(text: str) -> None:
    """Without a step the images come back as they were, in whatever layout and order."""
    from onnxcompress.optimize.synthesis.distillation import _Pixels

    x = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3)).astype(np.uint8)
    images = ImageSet(x, None, ("a", "b", "c"), Preprocess.parse(text))
    pixels = _Pixels.of(images, "cpu")
    shares = pixels.shares(x)
    assert (pixels.rounded(shares) == x).all()
    assert np.allclose(pixels.normalized(shares).numpy(), images.array(), atol=1e-4)


def test_a_file_without_statistics_is_refused() -> None:
    model = _folded()
    write_record(model, {})
    with pytest.raises(ModelError, match="no tensor of the graph has known statistics"):
        distill(model, _blobs(8))


def test_a_twin_has_the_recorded_statistics_on_noise() -> None:
    model = _folded()
    noise = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    feature = Topology(model).feature()
    assert feature is not None
    alignment = standardize(model, noise, feature.name)
    worn = model.copy()
    alignment.apply(worn)
    record = known_statistics(model)
    found = Executor.from_model(worn).run({"input": noise}, list(record))
    for name, wanted in record.items():
        axes = (0, 2, 3)
        deviation = found[name].detach().std(axes).numpy()
        seen = (deviation > 0) & (deviation < 10 * wanted.std)  # a dead channel cannot be scaled
        assert seen.mean() > 0.9
        assert np.allclose(deviation[seen], wanted.std[seen], rtol=0.01), name
        assert np.allclose(found[name].detach().mean(axes).numpy(), wanted.mean, atol=1e-3), name


def test_a_twin_is_taken_off_without_a_trace() -> None:
    model = _folded()
    images = torch.from_numpy(replace(_blobs(32)).array())
    executor = Executor.from_model(model)
    feature = Topology(model).feature()
    assert feature is not None
    alignment = standardize(model, images, feature.name)
    alignment.apply(model)
    worn = Executor.from_model(model).parameters
    assert any(not torch.equal(worn[n], executor.parameters[n]) for n in alignment.weights)
    restored = alignment.restored(worn)
    for name, value in executor.parameters.items():
        assert torch.allclose(restored[name], value, rtol=1e-4, atol=1e-5), name
    alignment.revert(model)
    assert model.to_proto() == _folded().to_proto()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "today"), [("resnet20-fashion.onnx", 0.128), ("mobilenetv2-fashion.onnx", 0.147)]
)
def test_distilled_images_come_as_near_to_the_statistics_as_they_did(name: str, today: float) -> None:
    model = _folded(name)
    assert _mismatch(model, distill(model, _blobs(32), steps=12)) == pytest.approx(today, rel=0.05)


def test_pixels_move_by_the_rate_in_the_first_step_and_by_half_of_it_in_the_second() -> None:
    """Adam's first step is the rate itself, 0.023 of 255 pixels' worth."""
    model, start = _folded(), _blobs(8)
    inner = (start.x > 20) & (start.x < 235)
    first, second = (np.abs(distill(model, start, steps=n).x.astype(int) - start.x)[inner] for n in (1, 2))
    assert np.median(first) == 6
    assert first.max() == 6
    assert 7 < np.percentile(second, 90) <= 9


def _small() -> Model:
    body = "c = Conv<pads=[1,1,1,1]>(x, w) y = BatchNormalization(c, g, b, m, v)"
    arrays = {"w": weight(6, 1, 3, 3), **norm(6)}
    return Model.from_proto(graph("(float[N,1,28,28] x) => (float[N,6,28,28] y)", body, arrays))


@pytest.mark.parametrize(("level", "beyond"), [(0, -2.0), (255, 5.0)])
def test_pixels_stay_within_their_range(level: int, beyond: float) -> None:
    """Where statistics ask for more than black or white, none comes out at the other end."""
    model, start = _small(), _blobs(6)
    start.x[:] = level
    start.x[:, ::4] = 128
    std, mean = torch.std_mean(
        Executor.from_model(model).run({"x": torch.full((2, 1, 28, 28), beyond)}, ["c"])["c"].detach(),
        (0, 2, 3),
    )
    given = {"c": ChannelStatistics(mean.numpy(), std.numpy())}
    made = distill(model, start, statistics=given, steps=3).x.astype(int)
    assert (np.abs(made[start.x == level] - level) <= 13).all()
    assert (made[start.x == level] == level).mean() > 0.5


def test_pieces_of_a_chunk_count_by_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 images in pieces of 16 and 4, as of one piece."""
    start = _blobs(20)
    whole = distill(_small(), start, steps=3).x
    monkeypatch.setattr("onnxcompress.optimize.synthesis.distillation.PIECE", 16)
    pieces = distill(_small(), start, steps=3).x
    assert np.abs(whole.astype(int) - pieces).mean() < 0.02


def test_the_statistics_that_are_given_are_matched() -> None:
    """Those that a tensor has of darker images make images darker, those of brighter ones brighter."""
    model, start, found = _small(), _blobs(8), []
    for factor in (0.5, 1.5):
        x = torch.from_numpy(replace(start, x=np.minimum(factor * start.x, 255).astype(np.uint8)).array())
        c = Executor.from_model(model).run({"x": x}, ["c"])["c"].detach()
        std, mean = torch.std_mean(c, (0, 2, 3))
        given = {"c": ChannelStatistics(mean.numpy(), std.numpy())}
        found.append(float(distill(model, start, statistics=given, steps=5).x.mean()))
    assert found[0] + 10 < found[1]


def _taken(factor: float, steps: int | None = None) -> tuple[list[int], float]:
    """Steps in all as each step tells them, and the images' mean, with statistics of darker images."""
    model, start, told = _small(), _blobs(8), []
    x = torch.from_numpy(replace(start, x=(factor * start.x).astype(np.uint8)).array())
    std, mean = torch.std_mean(Executor.from_model(model).run({"x": x}, ["c"])["c"].detach(), (0, 2, 3))
    given = {"c": ChannelStatistics(mean.numpy(), std.numpy())}
    made = distill(
        model, start, statistics=given, steps=steps, progress=lambda _, done, total: told.append(total)
    )
    return told, float(made.x.mean())


def test_twenty_steps_are_taken_where_they_are_enough() -> None:
    assert _taken(0.9)[0] == [20] * 20


def test_more_steps_follow_where_images_are_still_far() -> None:
    wanted, before = float((0.1 * _blobs(8).x).mean()), _taken(0.1, steps=20)[1]
    told, reached = _taken(0.1)
    assert told == [20] * 20 + [20 + MORE_STEPS] * MORE_STEPS
    assert abs(reached - wanted) < 0.5 * abs(before - wanted)


def test_means_and_deviations_count_alike_in_units_of_the_deviation() -> None:
    """A channel that is off by half a deviation, one that varies twice as much, one that is dead."""
    x = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, deviation = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0).sqrt()
    assert float(mismatch(x, mean, deviation)) < 1e-9
    assert float(mismatch(x, mean + 0.5 * deviation, deviation)) == pytest.approx(0.25, rel=1e-3)
    assert float(mismatch(x, mean, 0.5 * deviation)) == pytest.approx(1.0, rel=1e-3)
    some = torch.tensor([1.0, 2.0, 1e-9])
    assert float(mismatch(x * some.view(3, 1, 1), mean * some, deviation * some)) < 1e-9


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_slope_of_the_mismatch_is_that_of_its_formula(memory: torch.memory_format) -> None:
    x = torch.randn(6, 3, 5, 4, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory)
    mean, deviation = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.5, 2.0, 1.0])
    own, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = mismatch(own, mean, deviation)
    variance, center = torch.var_mean(plain, (0, 2, 3), correction=0)
    wanted = (((center - mean) / deviation).square() + (variance.sqrt() / deviation - 1).square()).mean()
    torch.testing.assert_close(found, wanted)
    slopes = torch.autograd.grad(found, own), torch.autograd.grad(wanted, plain)
    torch.testing.assert_close(*slopes)
