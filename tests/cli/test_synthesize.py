"""The command `synthesize`: what it refuses, what it writes, and that other commands read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import onnx
import pytest
from PIL import Image

from onnxcompress.cli.main import main
from onnxcompress.data.dead_leaves import procedural_images
from onnxcompress.data.image_set import load_images
from onnxcompress.data.preprocess import Preprocess

RESNET = "resnet20-fashion.onnx"
BARE = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,{shape}] x) => (float[N,{shape}] y) {{ y = Relu(x) }}
"""


def bare(folder: Path, shape: str = "3,20,24") -> str:
    """A network without statistics."""
    onnx.save(onnx.parser.parse_model(BARE.format(shape=shape)), folder / "bare.onnx")
    return str(folder / "bare.onnx")


# what is refused


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["out.npy"], 2, "expected a name that ends in .npz"),
        (["out.npz", "--sheet", "out.jpg"], 2, "expected a name that ends in .png"),
        (["out.npz", "--sheet", "a.png", "--no-sheet"], 2, "give one of them"),
        (["out.npz", "--count", "0"], 2, "Invalid value for '--count'"),
        (["out.npz", "--preprocess", "imagnet"], 2, "did you mean 'imagenet'"),
        (["none/out.npz"], 1, "name a file in an existing, writable folder"),
        (["out.npz", "--sheet", "none/a.png"], 1, "name a file in an existing, writable folder"),
        (["out.npz", "--kind", "distilled"], 1, "needs BatchNorm or recorded statistics"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = bare(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["synthesize", model, *arguments]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if "rror: " in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert [file.name for file in tmp_path.iterdir()] == ["bare.onnx"]


def test_the_model_is_not_overwritten(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "model.npz"
    shutil.copy(models / RESNET, named)
    before = named.read_bytes()
    assert main(["synthesize", str(named), str(named), "--kind", "procedural"]) == 1
    assert "would replace the input" in capsys.readouterr().err
    assert named.read_bytes() == before


def test_a_network_that_takes_no_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synthesize", bare(tmp_path, "4,20,20"), str(tmp_path / "out.npz")]) == 1
    assert "its input takes no images of 1 or 3 channels" in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()


def test_images_for_open_sizes_have_the_shape_that_is_given(tmp_path: Path) -> None:
    out, model = tmp_path / "out.npz", bare(tmp_path, "3,H,W")
    assert main(["synthesize", model, str(out), "--count", "2", "--input-shape", "1x3x12x16"]) == 0
    assert np.load(out)["x"].shape == (2, 12, 16, 3)


# what is written


def test_procedural_images_of_a_bare_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.npz"
    assert main(["synthesize", bare(tmp_path), str(out), "--count", "7", "--seed", "5"]) == 0
    text = capsys.readouterr()
    assert (
        "7 procedural images (the file has neither BatchNorm nor recorded statistics), 20x24x3" in text.out
    )
    assert f"--images {out} --preprocess 'mean=0.45 std=0.25'" in text.out
    assert "note: no --preprocess" in text.err
    images = load_images(out, preprocess=Preprocess.parse("unit"))
    np.testing.assert_array_equal(images.x, procedural_images(7, 20, 24, 3, 5))
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.size > (3 * 24, 2 * 20)


def test_the_same_seed_gives_the_same_bytes(models: Path, tmp_path: Path) -> None:
    written = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        arguments = [str(tmp_path / f"{name}.npz"), "--kind", "procedural", "--count", "5", "--no-sheet"]
        assert main(["synthesize", str(models / RESNET), *arguments, "--seed", str(seed)]) == 0
        written.append((tmp_path / f"{name}.npz").read_bytes())
    assert written[0] == written[1] != written[2]
    with ZipFile(tmp_path / "a.npz") as archive:  # no time of writing in it
        assert {entry.date_time[0] for entry in archive.infolist()} == {1980}
    assert len(list(tmp_path.iterdir())) == 3


def test_distilled_images_are_the_default_where_the_file_knows_statistics(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, sheet = tmp_path / "out.npz", tmp_path / "look.png"
    command = ["synthesize", str(models / RESNET), str(out), "--count", "8", "--device", "cpu"]
    assert main([*command, "--sheet", str(sheet), "--json"]) == 0
    printed = capsys.readouterr()
    account = json.loads(printed.out)
    assert printed.err == ""
    assert (account["kind"], account["shape"]) == ("distilled", [28, 28, 1])
    assert "the file knows the statistics of" in account["why"]
    assert (account["output"], account["sheet"], account["device"]) == (str(out), str(sheet), "cpu")
    with np.load(out, allow_pickle=False) as archive:
        assert set(archive.files) == {"x", "kind", "seed", "preprocess"}
        assert (str(archive["kind"]), int(archive["seed"])) == ("distilled", 0)
        preprocess = Preprocess.parse(str(archive["preprocess"]))
    assert preprocess == Preprocess.parse("fashion-mnist")  # what the file's metadata says
    images = load_images(out, preprocess=preprocess)
    assert images.x.shape == (8, 28, 28, 1)
    start = procedural_images(8, 28, 28, 1, 0)
    assert (images.x != start).mean() > 0.3  # they were changed
    with Image.open(sheet) as picture:
        assert picture.mode == "L"
