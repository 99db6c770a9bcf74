"""A kept result counts with the images that it learned from and that judged it, wherever they lie."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxcompress.data.image_set import image_count, load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import InputError
from onnxcompress.evaluation.guard import Guard
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import InputRequest
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.pipeline import Pipeline
from onnxcompress.pipeline.cache import Cache
from onnxcompress.pipeline.cache_keys import content_digest
from tests.helpers.folding import CONV, IMAGE, graph, norm


def picture(file: Path, value: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(file)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_pictures_behind_a_link_are_part_of_a_folder(tmp_path: Path) -> None:
    picture(tmp_path / "data" / "one.png", 10)
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path / "data", target_is_directory=True)
    before = content_digest(folder)
    picture(tmp_path / "data" / "one.png", 200)
    assert content_digest(folder) != before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_utf_8_have_a_digest(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(b"1")
    assert len(content_digest(tmp_path)) == 64


def test_no_path_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "one.png", 10)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the path of the images is empty"):
        image_count("")
    with pytest.raises(InputError, match="the path of the images is empty"):
        load_images("", preprocess=Preprocess())
    assert image_count(".") == 1


def test_other_images_that_judge_make_another_result(tmp_path: Path) -> None:
    proto = graph(IMAGE, "c = Conv(x, w) y = BatchNormalization(c, g, b, m, v)", CONV | norm(5))
    cache, chain = Cache(tmp_path / "cache"), Pipeline([FoldBatchNorm()])
    for name, value in (("one", 10), ("two", 200)):
        np.savez(tmp_path / f"{name}.npz", x=np.full((4, 7, 6, 3), value, np.uint8))

    def is_kept(judges: str | None, guard: Guard) -> bool:
        judged_by = None if judges is None else InputRequest(str(tmp_path / f"{judges}.npz"))
        (step,) = chain.run(Model.from_proto(proto), cache=cache, guard=guard, judged_by=judged_by).steps
        return step.cached

    judged = Guard()
    assert [is_kept(name, judged) for name in (None, "one", "one", "two", "two")] == [
        False, False, True, False, True,
    ]  # fmt: skip
    np.savez(tmp_path / "two.npz", x=np.full((4, 7, 6, 3), 30, np.uint8))
    assert not is_kept("two", judged)
    assert is_kept(None, judged)
    assert is_kept("two", Guard(verify=False))
