"""Procedural images: what they depend on, and what they share with natural ones."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxcompress.data import dead_leaves
from onnxcompress.data.contact_sheet import GAP, contact_sheet, write_contact_sheet
from onnxcompress.data.dead_leaves import procedural_images
from onnxcompress.errors import ModelError, OptionError


@pytest.fixture(scope="module", autouse=True)
def drawn_anew() -> Iterator[None]:
    """Draw an image each time it is asked for, unlike in other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dead_leaves, "_image", dead_leaves._image.__wrapped__)  # type: ignore[attr-defined]
        yield


@pytest.fixture(scope="module")
def colour() -> np.ndarray:
    return procedural_images(200, 32, 32, 3, 0)


def _light(images: np.ndarray) -> np.ndarray:
    """(images, height, width) means of the channels, less the mean of the image."""
    light = images.astype(float).mean(-1)
    return np.asarray(light - light.mean((1, 2), keepdims=True))


def _slope(images: np.ndarray) -> float:
    """Exponent of the mean power spectrum over frequency, from 2 cycles a side to half the finest."""
    light = _light(images)
    side = light.shape[1]
    window = np.hanning(side)[:, None] * np.hanning(side)
    power = (np.abs(np.fft.fft2(light * window)) ** 2).mean(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)) * side
    used = (frequency >= 2) & (frequency <= side / 4)
    return float(np.polyfit(np.log(frequency[used]), np.log(power[used]), 1)[0])


# what is refused


@pytest.mark.parametrize("wrong", [(0, 8, 8, 3), (1, 0, 8, 3), (1, 8, 8, 2)])
def test_what_cannot_be_made(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(OptionError, match="expected 1 or more"):
        procedural_images(*wrong, seed=0)


# what an image depends on


@pytest.mark.parametrize("size", [(32, 32, 3), (28, 28, 1), (40, 104, 3)])
def test_neither_workers_nor_the_count_matter(size: tuple[int, int, int]) -> None:
    whole = procedural_images(12, *size, seed=3, workers=1)
    assert whole.shape == (12, *size)
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(procedural_images(12, *size, seed=3, workers=4), whole)
    np.testing.assert_array_equal(procedural_images(5, *size, seed=3), whole[:5])


def test_seeds_and_indices_give_different_images(colour: np.ndarray) -> None:
    other = procedural_images(3, 32, 32, 3, 1)
    assert (other != colour[:3]).any((1, 2, 3)).all()
    assert len(np.unique(colour.reshape(len(colour), -1), axis=0)) == len(colour)


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 3), (3, 200, 3), (97, 2, 1)])
def test_odd_sizes(size: tuple[int, int, int]) -> None:
    assert procedural_images(8, *size, seed=0).shape == (8, *size)


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    procedural_images(5, 8, 8, 3, 0, lambda stage, done, total: seen.append((done, total)))
    assert seen == [(n, 5) for n in range(1, 6)]


# what they share with natural images


@pytest.mark.parametrize(
    ("index", "means", "deviation", "step"),
    [
        (1, (129.4, 140.4, 136.5), 47.3, 13.5),  # an object, the texture stripes
        (2, (72.5, 78.5, 89.6), 34.9, 14.2),  # an object, the texture noise
        (13, (170.5, 170.4, 173.8), 28.2, 13.4),  # leaves everywhere
        (14, (139.8, 132.3, 112.1), 18.2, 5.2),  # a surface
        (28, (190.0, 187.5, 167.4), 59.2, 30.8),  # leaves everywhere
        (39, (140.7, 140.8, 153.0), 35.7, 18.3),  # leaves everywhere, the texture stripes
    ],
)
def test_images_of_a_seed_stay_what_they_are(
    colour: np.ndarray, index: int, means: tuple[float, ...], deviation: float, step: float
) -> None:
    """Networks that were repaired on them were judged with these; `step`: of the light of neighbours."""
    np.testing.assert_allclose(colour[index].mean((0, 1)), means, atol=1)
    assert colour[index].std() == pytest.approx(deviation, rel=0.04)
    assert np.abs(np.diff(_light(colour[[index]]), axis=2)).mean() == pytest.approx(step, rel=0.04)


@pytest.mark.parametrize(("side", "count"), [(32, 200), (96, 40)])
def test_spectrum_and_neighbours_are_those_of_natural_images(side: int, count: int) -> None:
    """Photographs: power as f^-2 to f^-3.6; white noise has 0, a blur or a gradient alone far below -4."""
    images = procedural_images(count, side, side, 3, 0)
    assert -3.7 < _slope(images) < -2
    light = _light(images)
    assert (light[:, :, 1:] * light[:, :, :-1]).mean() / np.square(light).mean() > 0.75


def test_spectrum_of_noise_for_comparison() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3)).astype(np.uint8)
    assert abs(_slope(noise)) < 0.2


def test_light_dominates_colour(colour: np.ndarray) -> None:
    """Of CIFAR-10, within images: deviations along the axes 90, 19, 9; correlations 0.94 and 0.88."""
    inside = (colour - colour.mean((1, 2), keepdims=True)).reshape(-1, 3)
    first, second, third = np.sqrt(np.linalg.eigvalsh(np.cov(inside.T))[::-1])
    assert 3 < first / second < 10
    assert second > third > 0.03 * first
    correlation = np.corrcoef(inside.T)
    assert 0.8 < correlation[0, 2] < correlation[0, 1] < 0.99


def test_brightness_and_contrast_vary(colour: np.ndarray) -> None:
    light = colour.astype(float).mean(-1)
    assert 100 < light.mean() < 140
    assert 25 < light.mean((1, 2)).std() < 60
    contrast = light.std((1, 2))
    assert 20 < contrast.mean() < 60
    assert np.quantile(contrast, 0.9) > 2 * np.quantile(contrast, 0.1)
    assert ((colour == 0) | (colour == 255)).mean() < 0.15  # little is clipped


def test_edges_are_soft_and_few(colour: np.ndarray) -> None:
    """Differences of neighbours: most near zero, a few large ones, as where one thing hides another."""
    steps = np.abs(np.diff(_light(colour), axis=2)).ravel()
    assert np.median(steps) < 0.5 * steps.mean()
    assert np.mean(steps**4) / np.mean(steps**2) ** 2 > 6  # 3 for Gaussian noise


# the contact sheet


def test_small_images_are_enlarged_by_a_whole_factor() -> None:
    images = np.arange(4 * 30 * 30 * 3, dtype=np.uint8).reshape(4, 30, 30, 3)
    sheet = np.asarray(contact_sheet(images))
    assert sheet.shape == (2 * 90 + 3 * GAP, 2 * 90 + 3 * GAP, 3)
    assert (sheet[:GAP] == 255).all()
    np.testing.assert_array_equal(sheet[GAP : GAP + 90 : 3, GAP : GAP + 90 : 3], images[0])
    np.testing.assert_array_equal(sheet[-GAP - 90 : -GAP : 3, -GAP - 90 : -GAP : 3], images[3])


def test_a_sheet_is_read_line_by_line_and_about_as_wide_as_high() -> None:
    """Five of 30x10 pixels, three times as large: four side by side, the fifth below the first."""
    images = np.broadcast_to(40 * np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1), (5, 30, 10, 1))
    sheet = np.asarray(contact_sheet(images))
    assert sheet.shape == (2 * 90 + 3 * GAP, 4 * 30 + 5 * GAP)
    middles = sheet[GAP + 45 :: 90 + GAP, GAP + 15 :: 30 + GAP]
    assert middles.tolist() == [[0, 40, 80, 120], [160, 255, 255, 255]]


def test_a_sheet_shows_the_first_and_fits_a_screen(tmp_path: Path) -> None:
    gray = procedural_images(7, 28, 28, 1, 0)
    write_contact_sheet(tmp_path / "sheet.png", gray, limit=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (sheet.mode, sheet.size) == ("L", (84 + 2 * GAP, 84 + 2 * GAP))
    large = contact_sheet(np.zeros((9, 1500, 20, 3), np.uint8))
    assert max(large.size) <= 4096


def test_a_sheet_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ModelError, match=r"folder\.png: cannot be written"):
        write_contact_sheet(tmp_path / "folder.png", np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(ModelError, match="no folder"):
        write_contact_sheet(tmp_path / "none" / "a.png", np.zeros((1, 4, 4, 3), np.uint8))
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]
    first, second = (io.BytesIO() for _ in range(2))
    for out in (first, second):
        contact_sheet(procedural_images(4, 16, 16, 3, 0)).save(out, "PNG")
    assert first.getvalue() == second.getvalue()
