"""What channels are worth, against the least squares that they stand for; which widths are chosen."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from onnxcompress.graph.channel_groups.cut_tracer import CutGroup, find_cut_groups
from onnxcompress.graph.edit import set_values
from onnxcompress.model import Model
from onnxcompress.optimize.channel_drop import worth
from onnxcompress.optimize.channel_drop.widths import (
    Narrowing,
    choose_widths,
    narrowings,
    possible_widths,
    signature,
    thinned,
    widths_after,
)
from onnxcompress.optimize.channel_drop.worth import (
    Reader,
    measure_readers,
    removal_by_norm,
    removal_by_refit,
)
from onnxcompress.optimize.executor import Executor
from tests.graph.test_channel_cuts import ARRAYS, IMAGE, maker
from tests.helpers.channel_cutting import with_groups
from tests.helpers.folding import graph, weight

RNG = np.random.default_rng(0)


def group_of(name: str) -> CutGroup:
    return with_groups(maker(name))[1].free[0]


def reader_of(group: CutGroup, samples: np.ndarray, weight: np.ndarray) -> Reader:
    second = samples.T @ samples / len(samples)
    labels = group.group.labels.repeat(samples.shape[1] // group.width)
    linear = group.group.members[0].layer.linear
    return Reader(labels, weight, np.linalg.inv(second), samples.mean(0), linear, 0)


def left_after(samples: np.ndarray, weight: np.ndarray, gone: np.ndarray) -> float:
    """Mean squared error of the best fit of W x from the columns that are not gone, by least squares."""
    rest = np.delete(samples, gone, axis=1)
    target = samples @ weight.T
    fitted = rest @ np.linalg.lstsq(rest, target, rcond=None)[0]
    return float(np.square(target - fitted).sum() / len(samples))


@pytest.mark.parametrize("taps", [1, 3])
def test_costs_are_what_least_squares_leave(taps: int) -> None:
    """Of each first part of the order, and the first channel is the cheapest of all."""
    group = group_of("pair")
    mix = RNG.normal(size=(12 * taps, 12 * taps))
    samples, weight = RNG.normal(size=(400, 12 * taps)) @ mix, RNG.normal(size=(5, 12 * taps))
    removal = removal_by_refit(group.group, [reader_of(group, samples, weight)])
    assert sorted(removal.labels) == sorted(group.group.labels)
    channels = [group.group.labels.tolist().index(label) for label in removal.labels]

    def cost(some: list[int]) -> float:
        columns = (np.array(some)[:, None] * taps + np.arange(taps)).reshape(-1)
        return left_after(samples, weight, columns)

    for count in (1, 2, 5, 11):
        assert removal.costs[count] == pytest.approx(cost(channels[:count]), rel=1e-6)
    assert removal.costs[1] == pytest.approx(min(cost([c]) for c in range(12)), rel=1e-6)


def test_a_channel_that_others_can_replace_goes_first_and_costs_nothing() -> None:
    """By the norm of its weights it would be the last to go."""
    group = group_of("pair")
    samples = RNG.normal(size=(300, 12))
    samples[:, 7] = samples[:, :4].sum(axis=1)
    weight = RNG.normal(size=(5, 12))
    weight[:, 7] *= 100
    reader = reader_of(group, samples + 1e-6 * RNG.normal(size=samples.shape), weight)
    removal = removal_by_refit(group.group, [reader])
    assert removal.labels[0] in group.group.labels[[0, 1, 2, 3, 7]]
    assert removal.costs[1] < 1e-5 * removal.costs[2]


@pytest.mark.parametrize("readers", [True, False])
def test_the_norm_of_a_channel_is_that_of_its_weights_and_may_be_that_of_its_readers(readers: bool) -> None:
    group = group_of("pair")
    writer, reader = (member.layer.linear.weight for member in group.group.members)
    norms = np.square(writer).sum(axis=(1, 2, 3))
    norms += np.square(reader).sum(axis=(0, 2, 3)) if readers else 0
    removal = removal_by_norm(group.group, readers=readers)
    assert removal.labels.tolist() == group.group.labels[np.argsort(norms)].tolist()
    assert removal.costs[3] == pytest.approx(np.sort(norms)[:3].sum() / norms.mean(), rel=1e-5)


def test_the_costs_of_all_readers_add_up() -> None:
    group = group_of("pair")
    channels, readers = RNG.normal(size=(300, 12)), []
    weights = [RNG.normal(size=(outputs, 12)) for outputs in (5, 3)]
    samples = [channels @ RNG.normal(size=(12, 12)) for _ in weights]
    readers = [reader_of(group, x, w) for x, w in zip(samples, weights, strict=True)]
    removal = removal_by_refit(group.group, readers)

    def cost(labels: np.ndarray) -> float:
        gone = np.flatnonzero(np.isin(group.group.labels, labels))
        return sum(left_after(x, w, gone) for x, w in zip(samples, weights, strict=True))

    assert removal.costs[4] == pytest.approx(cost(removal.labels[:4]), rel=1e-6)
    assert removal.costs[1] == pytest.approx(min(cost(c) for c in group.group.labels[:, None]), rel=1e-6)


def test_a_channel_is_priced_anew_when_its_twin_has_gone() -> None:
    """Either of the two costs next to nothing; the one that is left costs more than any other."""
    group = group_of("pair")
    samples, weight = RNG.normal(size=(300, 12)), RNG.normal(size=(5, 12))
    weight[:, [3, 8]] *= 10
    samples[:, 8] = samples[:, 3] + 0.001 * RNG.normal(size=300)
    order = removal_by_refit(group.group, [reader_of(group, samples, weight)]).labels.tolist()
    assert {order[0], order[-1]} == set(group.group.labels[[3, 8]].tolist())


@pytest.mark.parametrize(("limits", "close"), [({}, 1e-4), ({"PLACES": 9}, 0.3), ({"MAX_FAN_IN": 1}, 1e-4)])
def test_what_a_reader_reads_is_measured_over_all_images(
    limits: dict[str, int], close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Centred, with the ridge as a share of the mean variance; of 36 places of an image, some suffice."""
    for name, limit in limits.items():
        monkeypatch.setattr(worth, name, limit)
    model, groups = with_groups(maker("pair"))
    images = torch.from_numpy(RNG.normal(size=(50, 4, 8, 8)).astype(np.float32))
    images[:20] *= 3
    (reader,) = measure_readers(model, groups, images, "x", ["y"], ridge=0.5, batch=20)
    read = Executor.from_model(model).run({"x": images}, ["r"])["r"].movedim(1, 0).flatten(1).numpy()
    second = np.cov(read.astype(np.float64), bias=True)
    expected = second + 0.5 * second.trace() / 12 * np.eye(12)
    found = np.linalg.inv(reader.inverse)
    assert np.abs(found - expected).max() < close * expected.max()


def test_an_error_in_front_of_other_layers_costs_what_they_make_of_it() -> None:
    """‖∂y/∂b‖² of each channel, over batches: signs are drawn, so that outputs do not cancel each other."""
    arrays = {key: ARRAYS[key] for key in "wov"}
    arrays["v"] = np.array([[1.0], [-1], [1], [-1], [1]], np.float32).repeat(12, 1).reshape(5, 12, 1, 1)
    arrays["v"] *= 1 + np.arange(12, dtype=np.float32).reshape(1, 12, 1, 1)
    model = Model.from_proto(graph(IMAGE, "a = Conv(x, w) b = Conv(a, o) y = Conv(b, v)", arrays))
    images = torch.from_numpy(RNG.normal(size=(64, 4, 8, 8)).astype(np.float32))
    groups = find_cut_groups(model)
    measured = [
        measure_readers(model, groups, images, "x", ["y"], ridge=1e-6, batch=24, seed=seed)
        for seed in (0, 1)
    ]
    sizes = Executor.from_model(model).run({"x": images}, ["y"])["y"].square().mean((0, 2, 3)).numpy()
    jacobian = (arrays["v"].reshape(5, 12) ** 2 / sizes[:, None]).sum(0) / 5
    expected = np.square(arrays["o"].reshape(12, 12)).sum(1) * jacobian
    first, second = (np.square(readers[0].weight).sum(1) for readers in measured)
    np.testing.assert_allclose(first, expected, rtol=0.15)
    assert (first != second).all()  # of another seed


def readers_of(name: str, features: list[str]) -> list[Reader]:
    model, groups = with_groups(maker(name))
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(32, 4, 8, 8)).astype(np.float32))
    return measure_readers(model, groups, images, "x", features, ridge=1e-3, batch=32)


def test_each_of_several_outputs_counts_as_much_as_the_others() -> None:
    """The layer that gives the first output: beside a second one its errors are half of the whole."""
    alone, beside = (readers_of("several outputs", names)[0] for names in (["y"], ["y", "z"]))
    np.testing.assert_allclose(np.square(beside.weight), np.square(alone.weight) / 2, rtol=0.1)
    assert all((reader.weight != 0).all() for reader in readers_of("several outputs", ["y", "z"]))


@pytest.mark.parametrize("name", ["depthwise", "grouped"])
def test_a_layer_whose_groups_go_with_their_channels_does_not_read_them(name: str) -> None:
    assert len(readers_of(name, ["y"])) == 1


@pytest.mark.parametrize(("limit", "columns"), [(108, [108, 432]), (107, [12, 432])])
def test_taps_are_told_apart_up_to_a_size(
    limit: int, columns: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a 3x3 convolution; a matrix product reads 36 places of 12 channels as so many channels."""
    assert worth.MAX_FAN_IN >= 128 * 9
    monkeypatch.setattr(worth, "MAX_FAN_IN", limit)
    assert [len(reader.labels) for reader in readers_of("vgg", ["y"])] == columns


@pytest.mark.parametrize("larger", [1.0, 1000.0])
def test_an_errors_cost_is_its_share_of_what_each_answer_is(larger: float) -> None:
    """The features are the layer's outputs: an error costs the same beside answers that are far larger."""
    model, groups = with_groups(maker("pair"))
    layer = groups.free[0].group.members[1].layer.linear
    tensor = layer.node.inputs[1]
    assert isinstance(tensor, gs.Constant)
    weight = layer.weight * np.array([larger, 1, 1, 1, 1], np.float32).reshape(5, 1, 1, 1)
    set_values(tensor, weight)
    model.touch()
    groups = find_cut_groups(model)
    images = torch.from_numpy(RNG.normal(size=(64, 4, 8, 8)).astype(np.float32))
    (reader,) = measure_readers(model, groups, images, "x", ["y"], ridge=1e-6, batch=64)
    features = Executor.from_model(model).run({"x": images}, ["y"])["y"]
    sizes = features.square().mean((0, 2, 3)).numpy()
    expected = np.square(weight.reshape(5, 12)).sum(axis=1) / sizes / 5
    np.testing.assert_allclose(np.square(reader.weight).sum(axis=1), expected, rtol=0.1)


def test_widths_are_multiples_of_a_step_that_leaves_a_few() -> None:
    group = group_of("pair")
    assert possible_widths(group) == [8, 4]
    assert possible_widths(group, 5) == [10, 5]
    assert possible_widths(group, 12) == []


@pytest.mark.parametrize(
    ("name", "widths", "by_six"),
    [
        ("grouped", [3, 2, 1], [2]),  # three channels of a group go together
        ("depthwise, doubled", [10, 8, 6, 4, 2], [9, 6, 3]),
        ("shuffled", [3, 2, 1], [3, 2, 1]),
    ],
)
def test_a_step_counts_the_channels_that_go_together(
    name: str, widths: list[int], by_six: list[int]
) -> None:
    """Steps of 4 channels, or of 6."""
    group = group_of(name)
    assert possible_widths(group) == widths
    assert possible_widths(group, 6) == by_six


def test_the_step_of_channels_that_go_together_is_that_of_all_of_them() -> None:
    """48 behind a depthwise convolution, two for each of the 24: steps of 8, four of the 24."""
    arrays = {"w": weight(24, 4, 1, 1), "d": weight(48, 1, 1, 1), "v": weight(5, 48, 1, 1)}
    body = "a = Conv(x, w) b = Conv<group = 24>(a, d) y = Conv(b, v)"
    (group,) = find_cut_groups(Model.from_proto(graph(IMAGE, body, arrays))).free
    assert possible_widths(group) == [20, 16, 12, 8, 4]


@pytest.mark.parametrize(
    ("channels", "step"), [(32, 4), (33, 8), (64, 8), (128, 16), (256, 32), (512, 64), (800, 96)]
)
def test_steps_grow_with_the_width(channels: int, step: int) -> None:
    arrays = {"w": weight(channels, 4, 1, 1), "v": weight(5, channels, 1, 1)}
    model = Model.from_proto(graph(IMAGE, "a = Conv(x, w) y = Conv(a, v)", arrays))
    (group,) = find_cut_groups(model).free
    assert possible_widths(group) == list(range((channels - 1) // step * step, 0, -step))


def test_of_many_widths_some_are_tried_evenly() -> None:
    assert thinned([7, 6, 5, 4, 3, 2, 1], 3) == [6, 4, 2]
    assert thinned([7, 6], 3) == [7, 6]


COSTS = {"a": [0.0, 1, 2, 3, 10, 20], "b": [0.0, 2, 4, 9, 16, 30]}


def test_groups_are_narrowed_in_order_of_cost_per_gain() -> None:
    gains = {"a": {5: 0.1, 4: 0.11, 3: 0.2, 2: 0.2}, "b": {4: -0.1, 2: 0.3}}
    steps = narrowings(COSTS, gains)
    assert [(s.group, s.kept) for s in steps] == [("a", 5), ("a", 3), ("b", 2)]
    assert (steps[1].cost, steps[1].gain) == pytest.approx((2.0, 0.1))
    assert widths_after(steps) == {"a": 3, "b": 2}


def test_what_costs_least_for_what_it_gains_comes_first() -> None:
    """However little either is."""
    steps = narrowings({"a": [0.0, 1.0], "b": [0.0, 2.0]}, {"a": {1: 0.005}, "b": {1: 0.3}})
    assert [(s.group, s.cost / s.gain) for s in steps] == [("b", 2 / 0.3), ("a", 200)]


def test_the_costliest_steps_are_taken_back_first() -> None:
    """Either of the first two would do in place of both."""
    steps = [Narrowing("a", 8, 9.0, 0.2), Narrowing("b", 8, 5.0, 0.2), Narrowing("c", 8, 1.0, 0.3)]
    gains = {step.group: step.gain for step in steps}
    choice = choose_widths(steps, 0.49, lambda widths: sum(gains[name] for name in widths))
    assert choice.kept == {"b": 8, "c": 8}
    assert choice.saved == pytest.approx(0.5)


def test_equal_layers_have_equal_signatures() -> None:
    arrays = {"w": weight(8, 4, 1, 1), "e": weight(5, 8, 1, 1)}
    arrays |= {name: weight(8, 8, 1, 1, seed=at) for at, name in enumerate("uvo")}
    body = "s = Conv(x, w) a = Conv(s, u) b = Conv(a, v) c = Conv(b, o) y = Conv(c, e)"
    groups = find_cut_groups(Model.from_proto(graph(IMAGE, body, arrays))).free
    kinds = {group.name: signature(group) for group in groups}
    assert kinds["a"] == kinds["b"]
    assert len(set(kinds.values())) == 3


def test_a_width_that_gains_nothing_is_never_taken() -> None:
    assert narrowings(COSTS, {"a": {5: 0.0, 4: -0.2, 3: 5e-5}}) == []


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.7])
def test_the_smallest_part_that_saves_enough_is_found(factor: float) -> None:
    """Whatever the whole saves of what its parts promise."""
    steps = [Narrowing(f"g{i}", 8, cost=float(i), gain=0.03) for i in range(20)]
    asked: list[int] = []

    def saving(widths: Mapping[str, int]) -> float:
        asked.append(len(widths))
        return factor * 0.03 * len(widths)

    choice = choose_widths(steps, 0.25, saving)
    fewest = next(n for n in range(1, 21) if factor * 0.03 * n >= 0.25)
    assert list(choice.kept) == [f"g{i}" for i in range(fewest)]
    assert choice.saved == pytest.approx(factor * 0.03 * fewest)
    assert len(asked) <= 6


def test_all_steps_are_taken_where_they_do_not_save_enough() -> None:
    steps = [Narrowing(f"g{i}", 8, cost=1.0, gain=0.1) for i in range(4)]
    choice = choose_widths(steps, 0.5, lambda widths: 0.1 * len(widths))
    assert len(choice.kept) == 4
    assert choice.saved == pytest.approx(0.4)
    assert choose_widths([], 0.5, lambda widths: 1.0).kept == {}


def test_a_step_that_the_others_make_needless_is_taken_back() -> None:
    steps = [Narrowing("small", 8, 1.0, 0.05), Narrowing("large", 8, 9.0, 0.3)]
    gains = {"small": 0.05, "large": 0.3}
    choice = choose_widths(steps, 0.28, lambda widths: sum(gains[name] for name in widths))
    assert choice.kept == {"large": 8}


@pytest.mark.parametrize(
    ("gain", "kept"), [(0.1, {"first", "third", "fourth"}), (0.01, {"first", "second"})]
)
def test_a_step_that_saves_far_too_much_is_replaced_by_smaller_ones(gain: float, kept: set[str]) -> None:
    """Unless these turn out to save too little."""
    steps = [Narrowing("first", 8, 1.0, 0.2), Narrowing("second", 8, 9.0, 0.3)]
    steps += [Narrowing("third", 8, 4.0, 0.1), Narrowing("fourth", 8, 4.1, 0.1)]
    steps += [Narrowing("second", 4, 9.0, 0.2), Narrowing("fifth", 8, 9.5, 0.2)]
    gains = {"first": 0.2, "second": 0.3, "third": gain, "fourth": gain, "fifth": gain}
    choice = choose_widths(steps, 0.4, lambda widths: sum(gains[name] for name in widths))
    assert choice.kept.keys() == kept
    assert choice.saved == pytest.approx(sum(gains[name] for name in kept))
