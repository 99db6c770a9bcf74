"""Signal to noise of outputs and of their parts."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.errors import ModelError
from onnxcompress.evaluation.decibels import EQUAL_DB, decibels
from onnxcompress.evaluation.fidelity import OutputFidelity, fidelity


def compared(a: np.ndarray, b: np.ndarray) -> OutputFidelity:
    """Figures of one output of two runs, each half of the rows."""
    (found,) = fidelity({"y": np.split(a, 2)}, {"y": np.split(b, 2)}).outputs
    return found


def head(seed: int = 0) -> np.ndarray:
    """A detection head, (4 inputs, 50 places, 4 box columns and 2 scores)."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(10, 300, (4, 50, 4)), rng.uniform(0, 0.9, (4, 50, 2))], axis=2)


def test_signal_to_noise_is_ten_times_the_logarithm_of_the_ratio_of_energies() -> None:
    y = np.random.default_rng(0).normal(size=(8, 5))
    assert compared(y, 1.1 * y).snr_db == pytest.approx(20)
    assert compared(y, -y).snr_db == pytest.approx(10 * np.log10(1 / 4))
    assert compared(y, y).snr_db == EQUAL_DB == decibels(0, 0)


def test_what_is_the_same_for_all_inputs_hides_no_noise() -> None:
    y = np.random.default_rng(0).normal(size=(8, 5))
    found = compared(y + 100, y + 100 + 0.1 * y)
    assert found.snr_db is not None
    assert found.snr_db > 50
    assert found.variation_db == pytest.approx(20, abs=1)
    same = compared(np.full((8, 5), 2.0), np.full((8, 5), 2.2))
    assert same.variation_db == same.snr_db == pytest.approx(20)


def test_differences_are_relative_to_the_largest_magnitude_before() -> None:
    y = np.array([[1.0, -4.0], [2.0, 3.0]])
    found = compared(y, 1.5 * y)
    assert (found.max_abs, found.max_rel) == (2.0, 0.5)
    assert compared(0 * y, y).max_rel == np.inf
    classes = compared(np.array([[4], [2]]), np.array([[1], [2]]))
    assert (classes.max_abs, classes.max_rel, classes.agreement) == (3.0, 0.75, 0.5)


@pytest.mark.parametrize(("noise", "judged"), [(0.0316, 30), (0.0562, None)])
def test_from_30_dB_on_variation_does_not_count(noise: float, judged: float | None) -> None:
    """Of an output of ones that hardly varies: below it its small variation is what counts."""
    rng = np.random.default_rng(0)
    y = np.ones((400, 1, 5)) + 0.02 * rng.normal(size=(400, 1, 5))
    found = compared(y, y + noise * rng.choice([-1.0, 1.0], size=y.shape))
    expected = 20 * np.log10(0.02 / noise) if judged is None else judged
    assert found.judged_db == pytest.approx(expected, abs=0.3)


def test_parts_are_told_by_the_root_mean_square_of_their_values() -> None:
    sign = np.where(np.arange(8)[:, None] % 2, 1.0, -1.0)
    y = np.concatenate([100 * sign, 100 * sign, 2 * sign, 2 * sign], axis=1)
    off = np.array([1.0, 1.0, 0.5, 0.5])
    part = compared(y, y + off).worst_part
    assert part is not None
    assert part.rms == pytest.approx(2)
    assert part.snr_db == pytest.approx(10 * np.log10(16))
    assert part.text == "2 channels from 2 on of dimension 1 (values near 2)"


def test_next_to_no_variation_is_no_fault_where_next_to_nothing_changes() -> None:
    rest = np.random.default_rng(0).uniform(0, 1e-3, size=(8, 1))
    sure = np.concatenate([1 - rest, rest], axis=1)
    found = compared(sure, np.round(sure, 1))
    assert not found.constant
    assert found.variation_db is not None
    assert found.variation_db < 3
    assert found.judged_db == found.snr_db > 50  # type: ignore[operator]


@pytest.mark.parametrize("turned", [False, True])
def test_scores_crushed_beside_boxes_are_seen(turned: bool) -> None:
    a = head()
    b = a.copy()
    b[..., 4:] = 0
    if turned:
        a, b = (values.transpose(0, 2, 1) for values in (a, b))
    found = compared(a, b)
    assert found.snr_db is not None
    assert found.snr_db > 40
    assert found.worst_part is not None
    assert (found.worst_part.axis, found.worst_part.first, found.worst_part.channels) == (2 - turned, 4, 2)
    assert found.worst_part.snr_db == pytest.approx(0)
    assert found.judged_db == found.worst_part.judged_db < 0


def yes_or_no(scale: float, seed: int = 0) -> np.ndarray:
    """What a Sigmoid gives for 8 inputs at 100 places each."""
    return scale * np.random.default_rng(seed).uniform(size=(8, 1, 10, 10))


def answered(a: np.ndarray, b: np.ndarray) -> OutputFidelity:
    (found,) = fidelity({"y": np.split(a, 2)}, {"y": np.split(b, 2)}, ["y"]).outputs
    return found


def test_noise_among_noes_counts_only_beyond_half_a_step() -> None:
    a, b = yes_or_no(1e-6), yes_or_no(1e-5, seed=1)
    assert compared(a, b).judged_db < -10
    found = answered(a, b)
    assert found.judged_db == EQUAL_DB
    assert found.unseen
    assert not found.constant
    few, many = b.copy(), b.copy()
    few[0, 0, 0, 0], many[:, :, :3] = 0.3, 0.9
    assert answered(a, few).judged_db > 15
    assert answered(a, many).judged_db < -10
    sure = answered(yes_or_no(0.9), yes_or_no(0.9, seed=1))
    assert not sure.unseen
    assert sure.judged_db < 0


def test_only_values_between_0_and_1_are_answers() -> None:
    a = np.concatenate([yes_or_no(300), yes_or_no(1e-6), yes_or_no(1e-6) - 1e-7], axis=1)
    a = np.broadcast_to(a, (8, 3, 10, 10)).reshape(8, 3, 100)
    assert answered(a, a + np.array([0, 1e-4, 0])[:, None]).judged_db == EQUAL_DB
    assert answered(a, a + np.array([0, 0, 1e-4])[:, None]).judged_db < 0
    gone = a.copy()
    gone[:, 1] = 0.0
    assert not answered(a, gone).constant


def test_columns_of_a_like_size_and_probabilities_are_no_parts() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 10)) + 2
    scores = np.exp(8 * logits) / np.exp(8 * logits).sum(1, keepdims=True)
    assert compared(logits, logits + 0.1).worst_part is None
    assert compared(scores, scores + 0.01).worst_part is None


def test_places_of_a_map_and_channels_that_are_next_to_dead_are_no_parts() -> None:
    rng = np.random.default_rng(0)
    places = np.logspace(-8, 0, 9)
    mask = np.broadcast_to(places, (4, 1, 9, 9)) * rng.uniform(0.5, 1, (4, 1, 9, 9))
    assert compared(mask, np.round(mask, 2)).worst_part is None
    assert compared(mask[:, 0], np.round(mask[:, 0], 2)).worst_part is None
    features = rng.normal(size=(8, 64))
    features[:, 5] *= 1e-6
    assert compared(features, np.round(features, 2)).judged_db > 50


def test_channels_of_a_map_are_parts() -> None:
    heat = np.random.default_rng(0).uniform(0, 1, (4, 4, 8, 8)) * np.array([1, 1, 100, 100])[:, None, None]
    crushed = heat.copy()
    crushed[:, :2] = 0
    part = compared(heat, crushed).worst_part
    assert part is not None
    assert (part.axis, part.first, part.channels) == (1, 0, 2)


def test_the_share_of_inputs_with_the_same_class_is_of_class_scores_alone() -> None:
    y = np.eye(4)
    wrong = y.copy()
    wrong[0] = y[1]
    assert compared(y, wrong).agreement == 0.75
    assert compared(y[..., None, None], wrong[..., None, None]).agreement == 0.75
    assert compared(head(), head()).agreement is None
    assert compared(y.argmax(1), wrong.argmax(1)).agreement == 0.75
    assert compared(y.argmax(1), wrong.argmax(1)).snr_db is None


def test_outputs_that_are_not_finite_or_constant_are_told() -> None:
    y = np.random.default_rng(0).normal(size=(8, 5)) + 5
    broken = y.copy()
    broken[2, 3] = np.nan
    broken[7, 0] = np.inf
    assert compared(y, broken).not_finite == 2
    assert compared(broken, broken).not_finite == 0
    mean = compared(y, np.broadcast_to(y.mean(axis=0), y.shape))
    assert mean.constant
    assert mean.snr_db is not None
    assert mean.snr_db > 10
    assert mean.variation_db == pytest.approx(0)
    assert not compared(y, 0.5 * y).constant
    assert not compared(np.ones((8, 5)), np.ones((8, 5))).constant


def test_shapes_must_agree_unless_they_depend_on_the_inputs() -> None:
    found = fidelity(
        {"y": [np.ones(2), np.ones(3)], "z": [np.ones(2)] * 2},
        {"y": [np.ones(1)] * 2, "z": [np.ones(2)] * 2},
    )
    assert found.not_compared == ("y",)
    assert [one.name for one in found.outputs] == ["z"]
    by_chance = fidelity({"y": [np.ones(2)] * 2}, {"y": [np.ones(2), np.ones(3)]})
    assert by_chance.not_compared == ("y",)
    with pytest.raises(ModelError, match=r"output 'y' had the shape \[2\] and would have \[3\]"):
        fidelity({"y": [np.ones(2)] * 2}, {"y": [np.ones(3)] * 2})
    with pytest.raises(ModelError, match="had 1 outputs and would have 2"):
        fidelity({"y": []}, {"y": [], "z": []})


@pytest.mark.parametrize(("share", "constant"), [(5e-5, True), (2e-4, False)])
def test_an_output_that_hardly_varies_any_more_is_constant(share: float, constant: bool) -> None:
    """Below a ten-thousandth of the energy with which it varied between inputs."""
    before = 3 + np.random.default_rng(0).normal(size=(1, 16, 4))
    middle = before.mean((0, 1), keepdims=True)
    after = middle + share**0.5 * (before - middle)
    (found,) = fidelity({"y": list(before)}, {"y": list(after)}).outputs
    assert found.constant is constant


def test_answers_may_be_off_by_half_a_step_of_eight_bits() -> None:
    """A probability has 255 steps: errors up to 1/510 are none, what is beyond counts."""
    before = np.tile([0.0, 0.8], (1, 4, 2))
    for off, noise in ((1 / 510 - 1e-6, None), (0.01, 0.01 - 1 / 510)):
        (found,) = fidelity({"y": list(before)}, {"y": list(before + off)}, ["y"]).outputs
        expected = 200.0 if noise is None else 10 * np.log10(0.32 / noise**2)
        assert found.snr_db == pytest.approx(expected)


RNG = np.random.default_rng(0)
CLASSES = RNG.integers(0, 20, (4, 8, 40, 40))
MASK = RNG.random((4, 8, 40, 40)) < 0.3
RARE = np.where(RNG.random((4, 8, 40, 40)) < 0.02, 1, 0)


def mixed(a: np.ndarray, share: float) -> np.ndarray:
    """Draw a share of the values anew."""
    drawn = RNG.permutation(a.ravel()).reshape(a.shape)
    return np.where(RNG.random(a.shape) < share, drawn, a)


@pytest.mark.parametrize("a", [CLASSES, MASK, RARE], ids=["classes", "mask", "rare"])
def test_integers_by_chance_are_below_every_floor_and_equal_ones_above(a: np.ndarray) -> None:
    ratios = [compared(a, mixed(a, share)).judged_db for share in (0, 0.02, 0.1, 0.3, 0.6, 1)]
    assert ratios[0] == EQUAL_DB
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[2] > 5
    assert ratios[4] < 0
    assert ratios[5] < -2
    assert compared(a, np.zeros_like(a)).judged_db < 0


def test_numbers_that_were_rounded_are_judged_as_numbers() -> None:
    pixels = RNG.integers(0, 256, (4, 8, 40, 40))
    near = np.clip(pixels + RNG.integers(-2, 3, pixels.shape), 0, 255)
    assert compared(pixels, near).judged_db > 30


def test_few_classes_are_given_what_chance_explains() -> None:
    one_differs = np.full((8, 4, 1), 5)
    one_differs[3, 2] = 7
    assert compared(one_differs, np.full((8, 4, 1), 5)).judged_db > 0
    assert compared(np.full((8, 4, 1), 5), one_differs).judged_db > 10


def test_a_class_that_was_always_the_same_counts_by_itself() -> None:
    ratio = compared(np.full((8, 4, 1), 900), np.full((8, 4, 1), 850)).judged_db
    assert ratio < 0


@pytest.mark.parametrize(("equal", "count"), [(1, 2), (3, 4), (6, 8), (14, 16)])
def test_unequal_values_never_count_as_equal(equal: int, count: int) -> None:
    a = np.arange(count).reshape(2, -1, 1) % 3
    b = np.where(np.arange(count).reshape(a.shape) < equal, a, a + 1)
    assert compared(a, b).judged_db < 20


def test_a_rare_mask_that_is_lost_is_a_fault() -> None:
    rare = (RNG.random((4, 8, 40, 40)) < 5e-4).astype(np.uint8)
    assert compared(rare, np.zeros_like(rare)).constant
    assert not compared(rare, rare).constant


def test_what_is_never_finite_is_not_compared() -> None:
    never, fine = np.full((2, 1, 3), np.nan), np.ones((2, 1, 3))
    found = fidelity({"a": list(never), "b": list(fine)}, {"a": list(never), "b": list(fine)})
    assert found.never_finite == ("a",)
    assert [one.name for one in found.outputs] == ["b"]
