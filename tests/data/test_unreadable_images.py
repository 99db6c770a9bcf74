"""Files of a folder that cannot be read: the few are left out and named, many are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxcompress.data.image_set import ImageSet, image_size, load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import CompressWarning, InputError

UNIT = Preprocess()
COUNT, CLASSES = 40, 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 noisy pictures in 4 classes; the red value of the first pixel is the picture's number."""
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        file = tmp_path / "photos" / str(number % CLASSES) / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        pixels[0, 0, 0] = number
        Image.fromarray(pixels).save(file)
    return tmp_path / "photos"


def file_of(folder: Path, number: int) -> Path:
    return folder / str(number % CLASSES) / f"{number:02d}.png"


def no_image(file: Path) -> None:
    file.write_text("<html>404</html>")


def nothing(file: Path) -> None:
    file.write_bytes(b"")


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1500])


def sixteen_bits(file: Path) -> None:
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(file)


def dead_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere.png")


def bomb(file: Path) -> None:
    Image.new("1", (20000, 10000)).save(file)


def load(folder: Path, **options: object) -> tuple[ImageSet, list[str]]:
    """The images, and the warnings."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        images = load_images(folder, preprocess=UNIT, **options)  # type: ignore[arg-type]
    assert all(issubclass(one.category, CompressWarning) for one in noted)
    return images, [str(one.message) for one in noted]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (no_image, "not an image"),
        (nothing, "not an image"),
        (cut_short, "broken image: "),
        (sixteen_bits, "pixels of mode I"),
        (dead_link, "broken image: No such file"),
        (bomb, "too large to be an honest image"),
    ],
)
@pytest.mark.parametrize("number", [0, 22])
def test_an_unreadable_file_is_left_out_and_named(
    spoil: Callable[[Path], None], reason: str, number: int, folder: Path
) -> None:
    whole, silent = load(folder, labels=True)
    spoil(file_of(folder, number))
    found, (text,) = load(folder, labels=True)
    assert silent == []
    assert f"1 unreadable image left out of 40 that were to be read: {number % 4}/{number:02d}.png" in text
    assert reason in text
    kept = [at for at, name in enumerate(whole.names) if name != f"{number % 4}/{number:02d}.png"]
    expected = whole.take(kept)
    assert found.names == expected.names
    assert np.array_equal(found.x, expected.x)
    assert found.y is not None
    assert expected.y is not None
    assert np.array_equal(found.y, expected.y)
    assert image_size(folder) == (32, 32)


def test_the_first_three_are_named(folder: Path) -> None:
    for number in range(4):
        no_image(file_of(folder, number))
    found, (text,) = load(folder)
    assert len(found) == 36
    assert text.count("not an image") == 3
    assert text.endswith("and 1 more")


@pytest.mark.parametrize("seed", range(3))
def test_a_draw_is_the_same_as_without_broken_files(seed: int, folder: Path) -> None:
    """Images that are drawn to judge by never come to be learned from."""
    learned, judged = (load(folder, count=30, seed=seed, left_out=n)[0] for n in (None, 10))
    broken = {file.relative_to(folder).as_posix() for file in (file_of(folder, n) for n in (5, 17, 31))}
    for name in broken:
        no_image(folder / name)
    now, other = (load(folder, count=30, seed=seed, left_out=n)[0] for n in (None, 10))
    assert now.names == tuple(name for name in learned.names if name not in broken)
    assert other.names == tuple(name for name in judged.names if name not in broken)
    assert now.x[:, 0, 0, 0].tolist() == [int(Path(name).stem) for name in now.names]


def test_more_than_a_tenth_is_refused(folder: Path) -> None:
    for number in range(5):
        no_image(file_of(folder, number))
    with pytest.raises(
        InputError, match=r"0/00\.png: not an image; .*5 of 40 cannot be read; up to a tenth"
    ):
        load_images(folder, preprocess=UNIT)


def test_one_of_few_is_refused(folder: Path) -> None:
    for number in range(5, COUNT):
        file_of(folder, number).unlink()
    no_image(file_of(folder, 3))
    with pytest.raises(InputError, match=r"3/03\.png: not an image; .*1 of 5 cannot be read"):
        load_images(folder, preprocess=UNIT)


def test_a_small_draw_from_a_large_folder_bears_what_the_folder_bears(folder: Path) -> None:
    drawn, _ = load(folder, count=5)
    for name in drawn.names[:4]:
        no_image(folder / name)
    assert load(folder, count=5)[0].names == drawn.names[4:]
    no_image(folder / drawn.names[4])
    with pytest.raises(InputError, match="5 of 5 cannot be read"):
        load_images(folder, preprocess=UNIT, count=5)
