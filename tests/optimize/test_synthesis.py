"""Inputs that are made: their statistics against numpy's, what they are matched to, how they are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from onnxcompress.data.image_set import ImageSet
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import InputRequest, gather_inputs
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.running_moments import RunningMoments
from onnxcompress.optimize.synthesis.colored_noise import Noise, draw_input, generator
from onnxcompress.optimize.synthesis.drawn_inputs import DrawnSet, drawn_inputs
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment, standardize
from onnxcompress.optimize.synthesis.statistics_mismatch import targets_of
from onnxcompress.statistics.record import ChannelStatistics
from tests.helpers.folding import graph, weight

BODY = "a = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(a) c = Conv<pads=[1,1,1,1]>(r, w1, b1) y = Relu(c)"


def network() -> Model:
    arrays = {"w0": weight(6, 3, 3, 3), "b0": weight(6, seed=5)}
    arrays |= {"w1": weight(4, 6, 3, 3, seed=1), "b1": weight(4, seed=6)}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", BODY, arrays))


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 2 + 1


def known() -> dict[str, ChannelStatistics]:
    rng = np.random.default_rng(0)
    return {
        name: ChannelStatistics(
            rng.normal(size=n).astype(np.float32), rng.uniform(1, 9, n).astype(np.float32)
        )
        for name, n in (("a", 6), ("c", 4))
    }


def test_an_aligned_network_has_the_statistics_layer_by_layer() -> None:
    model, x, statistics = network(), values(20, 3, 8, 8), known()
    alignment = standardize(model, x, "y", batch=7, statistics=statistics)
    assert sorted(alignment.names) == ["b0", "b1", "w0", "w1"]
    executor = Executor.from_model(model)
    aligned = {n: alignment.align(n, executor.parameters[n]) for n in alignment.names}
    with torch.no_grad():
        found = executor.run({"x": x}, ["a", "c"], aligned)
    for name, tensor in found.items():
        std, mean = torch.std_mean(tensor.double(), (0, 2, 3), correction=0)
        np.testing.assert_allclose(mean, statistics[name].mean, atol=1e-3)
        np.testing.assert_allclose(std, statistics[name].std, rtol=1e-3)
    back = alignment.restored({**aligned, "other": torch.ones(2)})
    for name in alignment.names:
        torch.testing.assert_close(back[name], executor.parameters[name], rtol=1e-4, atol=1e-4)
    assert torch.equal(back["other"], torch.ones(2))
    alignment.apply(model)
    with torch.no_grad():
        again = Executor.from_model(model).run({"x": x}, ["c"])["c"]
    torch.testing.assert_close(again, found["c"], rtol=1e-4, atol=1e-3)
    alignment.revert(model)
    assert all(
        torch.equal(v, executor.parameters[n]) for n, v in Executor.from_model(model).parameters.items()
    )


@pytest.mark.parametrize(
    ("factor", "scaled"), [(15.0, True), (17.0, False), (1 / 15, True), (1 / 17, False)]
)
def test_a_channel_that_needs_more_than_16_times_as_much_is_dead(factor: float, scaled: bool) -> None:
    """It keeps its deviation, and still gets the recorded mean."""
    model, x = network(), values(8, 3, 8, 8)
    executor = Executor.from_model(model)
    with torch.no_grad():
        plain = executor.run({"x": x}, ["a"])["a"]
    std, mean = torch.std_mean(plain.double(), (0, 2, 3), correction=0)
    wanted = ChannelStatistics(
        (mean + 1).numpy().astype(np.float32), (factor * std).numpy().astype(np.float32)
    )
    alignment = standardize(model, x, "y", statistics={"a": wanted})
    aligned = {n: alignment.align(n, executor.parameters[n]) for n in alignment.names}
    with torch.no_grad():
        found = executor.run({"x": x}, ["a"], aligned)["a"]
    new, shifted = torch.std_mean(found.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(new, std * (factor if scaled else 1), rtol=1e-3, atol=0)
    torch.testing.assert_close(shifted, mean + 1, rtol=1e-3, atol=1e-3)


def test_parameters_without_a_map_stay() -> None:
    kept = {"w": torch.ones(3)}
    assert StatisticsAlignment().restored(kept) == kept


def test_moments_of_batches_are_those_of_all_values() -> None:
    """Batches of different sizes and means; about a mean a thousand deviations away."""
    x = values(11, 3, 5, 4) + 1000
    x[:2] += 3
    one, other = RunningMoments(), RunningMoments()
    one.add(x[:2], "x")
    other.add(x[2:5], "x")
    other.add(x[5:], "x")
    one.merge(other)
    found = one.statistics("here")
    np.testing.assert_allclose(found.mean, x.double().mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found.std, x.double().std((0, 2, 3), correction=0), rtol=1e-5)
    assert (one.count, found.source) == (11 * 20, "here")


def test_twenty_tensors_are_matched_from_the_first_to_the_last() -> None:
    names = [f"t{at}" for at in range(58)]
    statistics = {
        name: ChannelStatistics(np.full(2, at, np.float32), np.full(2, at + 0.5, np.float32))
        for at, name in enumerate(names)
    }
    found = targets_of(["unknown", *names], statistics, torch.device("cpu"))
    assert list(found) == [f"t{3 * at}" for at in range(20)]
    assert found["t6"][0].tolist() == [6, 6]
    assert found["t6"][1].tolist() == [6.5, 6.5]
    assert len(targets_of(names[:4], statistics, torch.device("cpu"))) == 4


def test_drawn_inputs_are_half_white_half_smooth() -> None:
    """Neighbours of white noise are unlike, those of natural signals alike."""
    x = drawn_inputs((64, 5, 24, 24), np.dtype(np.float32), 0).values
    near = [np.corrcoef(part[..., 1:].ravel(), part[..., :-1].ravel())[0, 1] for part in (x[::2], x[1::2])]
    assert abs(near[0]) < 0.05
    assert near[1] > 0.5
    assert (x[::2].std(), x[1::2].std()) == pytest.approx((1, 1), abs=0.02)
    same, other = (drawn_inputs((4, 5, 8), np.dtype(np.float32), seed).values for seed in (0, 1))
    assert np.array_equal(same, drawn_inputs((4, 5, 8), np.dtype(np.float32), 0).values)
    assert not np.allclose(same[0], other[0])
    assert not np.allclose(same[1], other[1])


def test_pixels_that_are_made_of_noise_are_near_the_middle_and_within_their_range() -> None:
    """Of an input of integers, and of one that is normalized: mean 0.45 and deviation 0.25 of the range."""
    bytes_ = drawn_inputs((64, 4, 16, 16), np.dtype(np.uint8), 0, preprocess=Preprocess(scale=1.0)).values
    assert bytes_.dtype == np.uint8
    assert (bytes_.min(), bytes_.max()) == (0, 255)
    assert (bytes_.mean() / 255, bytes_.std() / 255) == pytest.approx((0.45, 0.24), abs=0.02)
    how = Preprocess(mean=(0.45,), std=(0.25,))
    floats = drawn_inputs((64, 4, 16, 16), np.dtype(np.float32), 0, preprocess=how).values
    assert (floats.mean(), floats.std()) == pytest.approx((0, 0.96), abs=0.05)
    assert (floats.min(), floats.max()) == pytest.approx((-0.45 / 0.25, 0.55 / 0.25))


def test_channels_of_drawn_images_share_a_part() -> None:
    """The correlation of two channels is the shared part of the variance."""
    noise = Noise(shared=0.6)
    x = draw_input((256, 3, 16, 16), None, noise, generator(0, "x", 256))
    found = np.corrcoef(x.movedim(1, 0).reshape(3, -1).numpy())
    assert found[0, 1] == pytest.approx(0.6, abs=0.06)


def test_a_part_of_the_variance_lies_between_samples() -> None:
    """Beside what smooth noise has of its own: three tenths of all, as the mean of each image shows."""
    shape, found = (512, 3, 16, 16), []
    for offset in (0.0, 0.3):
        noise = Noise(exponent=0.0 if offset == 0 else 1e-6, offset=offset, shared=0.0)
        x = draw_input(shape, None, noise, generator(0, "x", shape[0]))
        found.append(float(x.mean((2, 3)).var()))
    assert found[0] == pytest.approx(1 / 256, rel=0.2)
    assert found[1] == pytest.approx(0.3, rel=0.1)


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """Images of one number each."""
    x = np.broadcast_to(np.arange(30, dtype=np.uint8)[:, None, None, None], (30, 8, 8, 3))
    np.savez(tmp_path / "x.npz", x=x)
    return str(tmp_path / "x.npz")


def test_real_and_made_inputs_come_in_this_order_and_count_alike(pictures: str) -> None:
    request = InputRequest(images=pictures, count=10, inputs="procedural", synthetic=4, seed=3)
    found = gather_inputs(network(), request)
    assert isinstance(found.images, ImageSet)
    assert found.images.x.shape == (14, 8, 8, 3)
    assert all(image.std() == 0 for image in found.images.x[:10])
    assert all(image.std() > 0 for image in found.images.x[10:])
    assert ([used.count for used in found.sources], found.real_count, found.real) == ([10, 4], 10, False)
    shares = found.shares()
    assert shares is not None
    assert float(shares[:10].sum()) == pytest.approx(float(shares[10:].sum()))
    chosen = found.images.x[:10, 0, 0, 0]
    other = gather_inputs(network(), InputRequest(images=pictures, count=10, seed=4)).images
    assert isinstance(other, ImageSet)
    assert not np.array_equal(chosen, other.x[:, 0, 0, 0])
    made = [gather_inputs(network(), InputRequest(synthetic=2, seed=seed)).images for seed in (3, 4)]
    assert all(isinstance(one, ImageSet) for one in made)
    assert not np.array_equal(made[0].array(), made[1].array())


def test_inputs_that_are_spread_go_from_the_first_to_the_last() -> None:
    found = DrawnSet(np.arange(10)).spread(4)
    assert found.values.tolist() == [0, 3, 6, 9]
    assert [part.tolist() for part in found.batches(3)] == [[0, 3, 6], [9]]
