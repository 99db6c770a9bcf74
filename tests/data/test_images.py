"""Loading and normalizing images: first what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxcompress.data.image_set import ImageSet, check_fits, load_images
from onnxcompress.data.preprocess import PRESETS, Preprocess
from onnxcompress.errors import CompressWarning, InputError, OptionError

UNIT = Preprocess()


def picture(file: Path, height: int = 4, width: int = 4, value: int = 7, mode: str = "RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    colour: int | tuple[int, int, int] = (value, value + 1, value + 2) if mode == "RGB" else value
    Image.new(mode, (width, height), colour).save(file)


def pack(file: Path, **arrays: np.ndarray) -> Path:
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file


@pytest.mark.parametrize(
    "suffix", ["jpg", "JPEG", "jfif", "png", "bmp", "webp", "gif", "tif", "TIFF", "ppm", "avif"]
)
def test_files_of_all_usual_kinds_are_images(suffix: str, tmp_path: Path) -> None:
    picture(tmp_path / f"a.{suffix}", value=60)
    (tmp_path / "notes.txt").write_text("no image")
    found = load_images(tmp_path, preprocess=UNIT).x
    assert found.shape == (1, 4, 4, 3)
    assert np.abs(found.astype(int) - [60, 61, 62]).max() <= 3  # what JPEG loses


# the text of --preprocess


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagnet", "no preset 'imagnet'; did you mean 'imagenet'"),
        ("zzz", "known: unit, raw, imagenet"),
        ("maen=1", "unknown key 'maen'; did you mean 'mean'"),
        ("size=224 imagenet", "a preset comes first"),
        ("mean=a", "mean='a'; expected numbers"),
        ("size=2x2x2", "expected pixels, such as 224"),
        ("layout=hwc", "expected nchw or nhwc"),
        ("std=0", "must be more than 0"),
        ("mean=123.7 std=58.4", "add scale=1 if mean and std are of pixels from 0 to 255"),
        ("mean=nan", "must be finite"),
        ("mean=0.1,0.2", "expected 1 or 3 each"),
        ("channels=4", "expected 1 or 3"),
        ("resize=256", "needs a size"),
        ("size=224 resize=200", "the crop must fit"),
        ("mean=0.1,0.2,0.3 channels=1", "give one value each"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Preprocess.parse(text)


def test_pairs() -> None:
    found = Preprocess.parse("mean=0.485,0.456,0.406 std=0.229,0.224,0.225 size=224 layout=nhwc")
    assert found.mean == (0.485, 0.456, 0.406)
    assert found.size == (224, 224)
    assert found.layout == "nhwc"
    assert Preprocess.parse("size=224x192").size == (224, 192)


def test_a_preset_and_changes() -> None:
    found = Preprocess.parse("imagenet size=192 order=bgr")
    assert (found.size, found.resize, found.order) == ((192, 192), 256, "bgr")
    assert found.mean == PRESETS["imagenet"].mean
    larger = Preprocess.parse("imagenet size=299")  # its short side of 256 is that of a crop of 224
    assert (larger.size, larger.resize) == ((299, 299), None)
    with pytest.raises(OptionError, match="resize=256"):
        Preprocess.parse("imagenet size=299 resize=256")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("unit", "mean=0 std=1"),
        ("raw", "mean=0 std=1 scale=1"),
        ("imagenet", "mean=0.485,0.456,0.406 std=0.229,0.224,0.225 size=224x224 resize=256"),
        ("imagenet-inception", "mean=0.5 std=0.5 size=224x224 resize=256"),
        ("cifar10", "mean=0.4914,0.4822,0.4465 std=0.247,0.2435,0.2616 size=32x32"),
        ("fashion-mnist", "mean=0.286 std=0.353 size=28x28"),
    ],
)
def test_presets_are_the_figures_of_their_data_sets(name: str, text: str) -> None:
    assert str(Preprocess.parse(name)) == text
    assert Preprocess.parse(name) == Preprocess.parse(text)


def test_every_preset_has_its_figures_checked() -> None:
    assert list(PRESETS) == ["unit", "raw", "imagenet", "imagenet-inception", "cifar10", "fashion-mnist"]


@pytest.mark.parametrize(
    "text",
    [
        *PRESETS,
        "size=8x6 resize=stretch layout=nhwc scale=1 channels=1",
        "mean=0.48145466,0.4578275,0.40821073 std=0.26862954,0.26130258,0.27577711",
    ],
)
def test_text_round_trip(text: str) -> None:
    parsed = Preprocess.parse(text)
    assert Preprocess.parse(str(parsed)) == parsed


# normalizing


def test_normalize_is_the_formula() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3)).astype(np.uint8)
    pre = Preprocess.parse("mean=0.1,0.2,0.3 std=0.5,0.6,0.7")
    expected = (pixels / 255 - np.array(pre.mean)) / np.array(pre.std)
    x = pre.normalize(pixels)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, expected.transpose(0, 3, 1, 2), atol=1e-6)
    nhwc = Preprocess.parse("mean=0.1,0.2,0.3 std=0.5,0.6,0.7 layout=nhwc").normalize(pixels)
    np.testing.assert_allclose(nhwc, expected, atol=1e-6)


def test_bgr_and_raw() -> None:
    pixels = np.array([[[[10, 20, 30]]]], np.uint8)
    assert Preprocess.parse("raw order=bgr").normalize(pixels).ravel().tolist() == [30, 20, 10]


# folders


def test_folder_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        load_images(tmp_path / "none", preprocess=UNIT)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"no \.npz file or folder"):
        load_images(tmp_path / "notes.txt", preprocess=UNIT)
    with pytest.raises(InputError, match="no images"):
        load_images(tmp_path, preprocess=UNIT)


def test_broken_image_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a\.png: not an image"):
        load_images(tmp_path, preprocess=UNIT)
    picture(tmp_path / "b.png", 64, 64)
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"a\.png: (broken image|not an image)"):
        load_images(tmp_path, preprocess=UNIT)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png", 8, 8)
    for limit in (20, 60):  # Pillow raises beyond twice the limit and warns beyond it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match=r"a\.png: too large"):
            load_images(tmp_path, preprocess=UNIT)


def test_images_of_different_sizes(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 4, 4)
    picture(tmp_path / "b.png", 4, 5)
    with pytest.raises(InputError, match=r"b\.png: 4x5 .* a\.png is 4x4; give size="):
        load_images(tmp_path, preprocess=UNIT)


def test_too_small_for_the_size(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 4, 4)
    with pytest.raises(InputError, match="smaller than size 7x7; correct size=, or add resize=8"):
        load_images(tmp_path, preprocess=Preprocess.parse("size=7"))


def test_gray_images_for_three_means(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", mode="L")
    pre = Preprocess.parse("mean=0.5,0.5,0.5")
    with pytest.raises(InputError, match="1 channel, mean and std 3 values; add channels=3"):
        load_images(tmp_path, preprocess=pre)
    assert load_images(tmp_path, preprocess=Preprocess.parse("mean=0.5,0.5,0.5 channels=3")).shape == (
        3,
        4,
        4,
    )


def test_sixteen_bits(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: pixels of mode I.*expected 8-bit"):
        load_images(tmp_path, preprocess=UNIT)


def test_pictures_of_kinds_that_are_not_read_are_told_of(tmp_path: Path) -> None:
    for name in ("a.HEIC", "b/c.jxl", ".hidden.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a photo")
    told = r"2 pictures of \.heic, \.jxl left out; convert them to \.jpg or \.png"
    with pytest.raises(InputError, match=f"no images; {told}"):
        load_images(tmp_path, preprocess=UNIT)
    picture(tmp_path / "d.png")
    with pytest.warns(CompressWarning, match=told):
        assert len(load_images(tmp_path, preprocess=UNIT)) == 1


@pytest.mark.parametrize(("first", "told"), [("ant", True), ("0", False), (".git", False)])
def test_a_class_folder_without_images_is_told_of(
    first: str, told: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The classes behind it get the index of the one before."""
    (tmp_path / first).mkdir()
    for name in ("1", "2") if first == "0" else ("bee", "cat"):
        picture(tmp_path / name / "a.png")
    images = load_images(tmp_path, preprocess=UNIT, labels=True)
    assert images.y is not None
    assert images.y.tolist() == ([1, 2] if first == "0" else [0, 1])
    assert ["no images in ant, no class of its own" in str(w.message) for w in recwarn] == [True] * told
    recwarn.clear()
    load_images(tmp_path, preprocess=UNIT)
    assert not recwarn.list


def test_labels_of_loose_files(tmp_path: Path) -> None:
    picture(tmp_path / "0" / "a.png")
    picture(tmp_path / "b.png")
    assert load_images(tmp_path, preprocess=UNIT).y is None
    with pytest.raises(InputError, match=r"b\.png lies in no class folder"):
        load_images(tmp_path, preprocess=UNIT, labels=True)


def test_more_images_than_there_are(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match="3 images were asked for, it has 1"):
        load_images(tmp_path, preprocess=UNIT, count=3)


def test_a_gray_image_among_colour_ones(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", mode="L")
    picture(tmp_path / "b.png")
    found = load_images(tmp_path, preprocess=UNIT)
    assert found.x.shape == (2, 4, 4, 3)
    assert (found.x[0] == 7).all()
    assert found.x[1, 0, 0].tolist() == [7, 8, 9]


def test_numbers_are_class_indices(tmp_path: Path) -> None:
    for name in ("0010", "0002"):
        picture(tmp_path / name / "deep" / "a.PNG")
    found = load_images(tmp_path, preprocess=UNIT, labels=True)
    assert found.names == ("0002/deep/a.PNG", "0010/deep/a.PNG")
    assert found.y is not None
    assert found.y.tolist() == [2, 10]


def test_names_are_classes_in_sorted_order(tmp_path: Path) -> None:
    for name in ("dog", "cat", "10"):
        picture(tmp_path / name / "a.png")
    found = load_images(tmp_path, preprocess=UNIT)
    assert found.y is not None
    assert dict(zip(found.names, found.y.tolist(), strict=True)) == {
        "10/a.png": 0,
        "cat/a.png": 1,
        "dog/a.png": 2,
    }


def test_images_drawn_from_class_folders_keep_their_labels(tmp_path: Path) -> None:
    for label in range(10):
        picture(tmp_path / f"{label}" / "a.png", value=20 * label)
    found = load_images(tmp_path, preprocess=UNIT, count=4, seed=1, labels=True)
    assert found.y is not None
    assert found.y.tolist() != [0, 1, 2, 3]
    assert (20 * found.y).tolist() == found.x[:, 0, 0, 0].tolist()
    assert [int(name[0]) for name in found.names] == found.y.tolist()


def test_a_linked_folder_is_read_and_a_loop_ends(tmp_path: Path) -> None:
    picture(tmp_path / "data" / "a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "set")
    assert load_images(tmp_path / "set", preprocess=UNIT).names == ("0/a.png",)


def test_count_is_balanced_and_seeded(tmp_path: Path) -> None:
    y = np.array([0] * 50 + [1] * 5 + [2] * 5)
    file = pack(tmp_path / "a.npz", x=np.zeros((60, 2, 2, 3), np.uint8), y=y)
    first, again, other = (load_images(file, preprocess=UNIT, count=9, seed=s) for s in (0, 0, 1))
    assert first.y is not None
    assert np.bincount(first.y).tolist() == [3, 3, 3]
    assert first.names == again.names != other.names


def test_centre_crop_of_the_resized_image(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(16, dtype=np.uint8)[:, None] * 10, (1, 16))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    exact = load_images(tmp_path, preprocess=Preprocess.parse("size=14"))
    assert np.array_equal(exact.x[0, :, :, 0], ramp[1:15, 1:15])
    alone = load_images(tmp_path, preprocess=Preprocess.parse("size=4 resize=none"))
    assert np.array_equal(alone.x[0, :, :, 0], ramp[6:10, 6:10])
    assert load_images(tmp_path, preprocess=Preprocess.parse("size=4x6 resize=stretch")).shape == (1, 4, 6)
    assert load_images(tmp_path, preprocess=Preprocess.parse("size=20 resize=24")).shape == (1, 20, 20)


# .npz


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.zeros(3)}, "no array x or images; it has z"),
        ({"x": np.zeros((2, 3, 8, 8), np.uint8)}, "transpose it to N,H,W,C"),
        ({"x": np.zeros((2, 8), np.uint8)}, "expected N,H,W or N,H,W,C"),
        ({"x": np.zeros((0, 8, 8, 3), np.uint8)}, "expected N,H,W"),
        ({"x": np.full((2, 8, 8, 3), np.nan, np.float32)}, "NaN"),
        ({"x": np.full((2, 8, 8, 3), -1.5, np.float32)}, "from -1.5 to -1.5; expected \\[0, 1\\]"),
        ({"x": np.full((2, 8, 8, 3), 300)}, "expected \\[0, 255\\]"),
        ({"x": np.zeros((2, 8, 8, 3), bool)}, "images of type bool"),
        ({"x": np.zeros((2, 8, 8, 3), np.uint8), "y": np.zeros(3, int)}, "expected \\[2\\] class indices"),
        ({"x": np.zeros((2, 8, 8, 3), np.uint8), "y": np.array([0, -1])}, "class indices"),
        ({"x": np.array([None, {}], dtype=object)}, "not a readable .npz"),
    ],
)
def test_npz_refusals(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_images(pack(tmp_path / "a.npz", **arrays), preprocess=UNIT)


def test_npz_without_labels_or_cut_short(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.npz", x=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="no labels"):
        load_images(file, preprocess=UNIT, labels=True)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="not a readable"):
        load_images(file, preprocess=UNIT)
    with file.open("wb") as handle:
        np.save(handle, np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="no zip archive"):
        load_images(file, preprocess=UNIT)


def test_npz_gray_without_a_channel_axis(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.npz", images=np.zeros((2, 8, 6), np.uint8), labels=np.array([[3], [4]]))
    found = load_images(file, preprocess=UNIT)
    assert found.shape == (1, 8, 6)
    assert found.y is not None
    assert found.y.tolist() == [3, 4]


def test_npz_floats_become_pixels(tmp_path: Path) -> None:
    pixels = np.arange(192, dtype=np.uint8).reshape(1, 8, 8, 3)
    file = pack(tmp_path / "a.npz", x=pixels / np.float32(255))
    assert np.array_equal(load_images(file, preprocess=UNIT).x, pixels)
    for off in (-0.4, 0.4):  # the nearest pixel
        near = np.clip((pixels + off) / np.float32(255), 0, 1)
        assert np.array_equal(load_images(pack(file, x=near), preprocess=UNIT).x, pixels)


def test_npz_is_cropped_and_converted_as_files_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3)).astype(np.uint8)
    file = pack(tmp_path / "a.npz", x=pixels)
    (tmp_path / "files").mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / "files" / "a.png")
    pre = Preprocess.parse("size=7 channels=1")
    assert np.array_equal(
        load_images(file, preprocess=pre).x, load_images(tmp_path / "files", preprocess=pre).x
    )


# the set


def test_batches_are_the_array() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 2, 2, 3)).astype(np.uint8)
    images = ImageSet(pixels, np.arange(5), tuple("abcde"), UNIT)
    parts = list(images.batches(2))
    assert [len(p) for p in parts] == [2, 2, 1]
    assert np.array_equal(np.concatenate(parts), images.array())
    some = images.take([3, 1])
    assert some.names == ("d", "b")
    assert some.y is not None
    assert some.y.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("shape", "text", "message"),
    [
        (("N", 3, 8, 8), "unit", "takes 3x8x8, the images are 3x4x4 .nchw.; set size=8x8"),
        (("N", 1, 4, 4), "unit", "add channels=1"),
        (("N", 4, 4, 3), "unit", "add layout=nhwc"),
        (("N", 3, 4, 4), "layout=nhwc", "add layout=nchw"),
        (("N", 9, 4, 4), "unit", "does not take gray or RGB"),
        (("N", 48), "unit", "has 2 dimensions"),
    ],
)
def test_images_that_do_not_fit(shape: tuple[int | str, ...], text: str, message: str) -> None:
    images = ImageSet(np.zeros((1, 4, 4, 3), np.uint8), None, ("a",), Preprocess.parse(text))
    with pytest.raises(InputError, match=message):
        check_fits(images, shape, "x")


@pytest.mark.parametrize("shape", [None, ("N", 3, 4, 4), (1, 3, None, None), ("N", 3, "H", "W")])
def test_images_that_fit(shape: tuple[int | str | None, ...] | None) -> None:
    check_fits(ImageSet(np.zeros((1, 4, 4, 3), np.uint8), None, ("a",), UNIT), shape, "x")
