"""Images that are selected, converted and resized: each with its own label and name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxcompress.data.image_set import ImageSet, as_type, load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import InputError


def numbered(count: int) -> ImageSet:
    """Image i has the pixels i, the label 100 + i and the name i."""
    x = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 2, 2, 3))
    return ImageSet(x.copy(), 100 + np.arange(count), tuple(map(str, range(count))), Preprocess(scale=1.0))


def test_what_is_selected_keeps_its_label_and_name() -> None:
    found = numbered(10).take([7, 2])
    assert found.x[:, 0, 0, 0].tolist() == [7, 2]
    assert found.y is not None
    assert found.y.tolist() == [107, 102]
    assert found.names == ("7", "2")


def test_a_spread_goes_from_the_first_to_the_last() -> None:
    assert numbered(10).spread(4).names == ("0", "3", "6", "9")
    assert numbered(3).spread(4).names == ("0", "1", "2")


def test_integers_are_rounded_and_stay_within_their_type() -> None:
    values = np.array([-3.0, 0.4, 0.6, 254.6, 300.0])
    assert as_type(values, np.dtype(np.uint8)).tolist() == [0, 0, 1, 255, 255]
    assert as_type(values, np.dtype(np.int8)).tolist() == [-3, 0, 1, 127, 127]
    assert as_type(values, np.dtype(np.float32)).dtype == np.float32


def test_a_draw_has_the_labels_of_its_images(tmp_path: Path) -> None:
    """And what it leaves out is all the rest, whatever the seed."""
    made = numbered(30)
    np.savez(tmp_path / "x.npz", x=made.x, y=100 + np.arange(30))
    chosen: list[list[int]] = []
    for seed in (0, 1):
        drawn, rest = (
            load_images(
                tmp_path / "x.npz", preprocess=Preprocess(), count=20, seed=seed, labels=True, left_out=left
            )
            for left in (None, 10)
        )
        for part in (drawn, rest):
            assert part.y is not None
            assert part.y.tolist() == [100 + int(v) for v in part.x[:, 0, 0, 0]]
        chosen.append(drawn.x[:, 0, 0, 0].tolist())
        assert sorted(chosen[-1] + rest.x[:, 0, 0, 0].tolist()) == list(range(30))
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("count", [4, None])
@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_a_draw_of_all_images_leaves_none_out(kind: str, count: int | None, tmp_path: Path) -> None:
    made = numbered(4)
    if kind == "npz":
        np.savez(tmp_path / "x.npz", x=made.x)
    for number, pixels in enumerate(made.x):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    source = tmp_path / "x.npz" if kind == "npz" else tmp_path
    with pytest.raises(InputError, match="none is left"):
        load_images(source, preprocess=Preprocess(), count=count, left_out=2)


@pytest.mark.parametrize("filter_", ["bilinear", "bicubic"])
def test_images_are_resized_by_the_filter_that_is_said(filter_: str, tmp_path: Path) -> None:
    """The short side first, then the middle: as Pillow does it step by step."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    how = Preprocess.parse(f"unit size=24x16 resize=40 filter={filter_}")
    found = load_images(tmp_path, preprocess=how).x[0]
    kind = Image.Resampling.BICUBIC if filter_ == "bicubic" else Image.Resampling.BILINEAR
    small = Image.fromarray(pixels).resize((60, 40), kind)
    left, top = (60 - 16) // 2, (40 - 24) // 2
    expected = np.asarray(small.crop((left, top, left + 16, top + 24)))
    np.testing.assert_array_equal(found, expected)


def test_a_size_without_a_short_side_keeps_seven_eighths_of_it(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 160, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = load_images(tmp_path, preprocess=Preprocess.parse("unit size=35x35")).x[0]
    small = Image.fromarray(pixels).resize((64, 40), Image.Resampling.BILINEAR)
    left, top = round((64 - 35) / 2), round((40 - 35) / 2)
    np.testing.assert_array_equal(found, np.asarray(small.crop((left, top, left + 35, top + 35))))
