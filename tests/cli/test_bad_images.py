"""Commands that take --images: what is no folder of images is refused before any work is announced, and
the few unreadable files of one are left out, named, and not counted."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from onnxcompress.cli.main import main
from onnxcompress.passes import CATALOGUE, load_pass
from tests.helpers.folding import graph, weight

SIGNATURE = "(float[N,3,8,8] x) => (float[N,10] y)"
BODY = """
    a = Conv<pads = [1,1,1,1]>(x, stem) c = Relu(a)
    d = Conv<pads = [1,1,1,1]>(c, v) e = Relu(d) f = Conv<pads = [1,1,1,1]>(e, w) g = Add(c, f) h = Relu(g)
    p = GlobalAveragePool(h) q = Flatten(p) y = Gemm<transB = 1>(q, head)
"""
ARRAYS = {
    "stem": weight(8, 3, 3, 3),
    "v": weight(8, 8, 3, 3, seed=1),
    "w": weight(8, 8, 3, 3, seed=2),
    "head": weight(10, 8, seed=3),
}
pytestmark = pytest.mark.usefixtures("nothing_kept")

LEARNING = [
    entry.name
    for entry in CATALOGUE
    if "images" in {field.name for field in dataclasses.fields(load_pass(entry.name))}
]
OPTIONS = {
    "quantize": ["--effort", "fast"],
    "prune": ["--effort", "fast"],
    "drop-blocks": ["--blocks", "1", "--steps", "0", "--effort", "fast", "--force"],
    "drop-channels": ["--macs-reduction", "10", "--steps", "0", "--effort", "fast", "--force"],
    "correct-bias": ["--reference", "{reference}", "--inputs", "images"],
    "search": ["--out", "{out}", "--max-latency", "5"],
}
OTHERS = ["evaluate", "sensitivity", "compare", "search"]


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXCOMPRESS_CACHE", "none")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 photos, of which two cannot be read."""
    rng = np.random.default_rng(0)
    for number in range(40):
        file = tmp_path / "photos" / str(number % 10) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(file)
    (tmp_path / "photos" / "3" / "13.png").write_bytes(b"no image")
    (tmp_path / "photos" / "7" / "7.png").write_bytes(b"")
    return tmp_path / "photos"


def command(name: str, tmp_path: Path, images: Path) -> list[str]:
    net = tmp_path / "net.onnx"
    onnx.save(graph(SIGNATURE, BODY, ARRAYS), net)
    reference = tmp_path / "reference.onnx"
    onnx.save(graph(SIGNATURE, BODY, ARRAYS | {"w": ARRAYS["w"] * np.float32(1.1)}), reference)
    files = [str(net)]
    if name in LEARNING:
        files.append(str(tmp_path / "out.onnx"))
    elif name == "compare":
        files.append(str(net))
    options = [text.format(reference=reference, out=tmp_path / "best") for text in OPTIONS.get(name, [])]
    return [name, *files, "--images", str(images), "--preprocess", "unit", *options]


def missing(path: Path) -> Path:
    return path / "nowhere"


def a_file(path: Path) -> Path:
    (path / "photo.jpg").write_bytes(b"one photo")
    return path / "photo.jpg"


def empty(path: Path) -> Path:
    (path / "empty").mkdir()
    return path / "empty"


def wrong_keys(path: Path) -> Path:
    np.savez(path / "keys.npz", a=np.zeros((4, 8, 8, 3), np.uint8))
    return path / "keys.npz"


def wrong_shape(path: Path) -> Path:
    np.savez(path / "shape.npz", x=np.zeros((4, 3, 8, 8), np.uint8))
    return path / "shape.npz"


def no_archive(path: Path) -> Path:
    (path / "no.npz").write_bytes(b"numbers")
    return path / "no.npz"


def too_small(path: Path) -> Path:
    np.savez(path / "small.npz", x=np.zeros((200, 6, 6, 3), np.uint8))
    return path / "small.npz"


KINDS: list[Callable[[Path], Path]] = [missing, a_file, empty, wrong_keys, wrong_shape, no_archive]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*LEARNING, *OTHERS])
def test_the_refusal_is_all_that_is_said(
    name: str, kind: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = kind(tmp_path)
    assert main(command(name, tmp_path, images)) == 1
    text = capsys.readouterr().err.strip()
    assert re.fullmatch(rf"error: (--images )?{re.escape(str(images))}: [^\n]*", text)
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("name", ["quantize", "prune", "drop-blocks", "drop-channels"])
def test_images_that_do_not_fit_are_refused_before_the_time_is_said(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(name, tmp_path, too_small(tmp_path))) == 1
    text = capsys.readouterr().err
    assert "the images are 3x6x6" in text
    assert "effort on" not in text


@pytest.mark.parametrize("name", ["quantize", "prune", "drop-blocks", "drop-channels"])
def test_a_rehearsal_says_the_effort_and_the_time_that_the_run_says(
    name: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = r"\w+ effort on (\d+) inputs, about [^\n]*"
    asked = command(name, tmp_path, folder)
    assert main([*asked, "--dry-run", "--json"]) == 0
    (step,) = json.loads(capsys.readouterr().out)["steps"]
    rehearsed = re.fullmatch(line, step["work"])
    assert main([*asked, "--dry-run"]) == 0
    assert re.search(line, capsys.readouterr().out)
    assert main(asked) == 0
    run = re.search(line, capsys.readouterr().err)
    assert rehearsed
    assert run
    assert (int(rehearsed[1]), int(run[1])) == (40, 38)  # a rehearsal does not read them all
    assert rehearsed[0].split()[0] == run[0].split()[0]


@pytest.mark.parametrize("name", [*LEARNING, "evaluate", "sensitivity", "compare"])
def test_unreadable_files_are_left_out_and_the_count_is_that_of_the_others(
    name: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--seconds", "0.2"] if name == "compare" else []
    assert main([*command(name, tmp_path, folder), *more, "--json"]) == 0
    output = capsys.readouterr()
    (note,) = [line for line in output.err.splitlines() if "2 unreadable images left out of 40" in line]
    assert "3/13.png (not an image), 7/7.png (not an image)" in note
    account = json.loads(output.out)
    if name == "evaluate":
        assert account["count"] == 38
    elif name == "compare":
        assert account["inputs"] == "38 images"
    else:
        inputs = account["inputs"] if name == "sensitivity" else account["measured"]["inputs"]
        assert sum(one["count"] for one in inputs if one["source"] == "images") == (
            29 if name == "correct-bias" else 38  # it keeps a quarter aside
        )
