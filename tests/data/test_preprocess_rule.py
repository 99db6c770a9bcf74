"""One rule in all commands for how pixels become an input: as asked, else by the metadata, else unit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcompress.cli.main import main
from onnxcompress.data.preprocess import PREPROCESSING, PRESETS
from onnxcompress.data.preprocessing_choice import choose
from onnxcompress.errors import OptionError
from onnxcompress.model import load, save

pytestmark = pytest.mark.usefixtures("quick_clock")

OF_FILE = "mean=0.286 std=0.353 size=28x28"
"""What the shipped networks have in their metadata, as it is printed."""


@pytest.fixture(scope="module")
def folder(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped ResNet, one that knows nothing of preprocessing, one with a text that is none; images."""
    made = tmp_path_factory.mktemp("rule")
    shutil.copy(models / "resnet20-fashion.onnx", made / "net.onnx")
    for name, text in (("silent", None), ("odd", "as in the paper")):
        model = load(made / "net.onnx")
        model.set_metadata(PREPROCESSING, text)
        save(model, made / f"{name}.onnx")
    archive = np.load(models / "fashion-test2k.npz")
    np.savez(made / "few.npz", x=archive["x"][:60], y=archive["y"][:60])
    return made


@pytest.mark.parametrize(
    ("dtype", "ends"), [(None, (0, 1)), ("float32", (0, 1)), ("uint8", (0, 255)), ("int8", (-128, 127))]
)
def test_black_and_white_by_the_type_of_the_input(dtype: str | None, ends: tuple[float, float]) -> None:
    chosen = choose(None, {}, dtype=None if dtype is None else np.dtype(dtype)).preprocess
    black_and_white = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1)
    assert chosen.normalize(black_and_white).ravel().tolist() == list(ends)


def test_the_rule() -> None:
    said = {PREPROCESSING: "cifar10"}
    assert choose("raw", said).preprocess == PRESETS["raw"]
    assert choose(None, said).preprocess == PRESETS["cifar10"]
    nobody = choose(None, {})
    assert (nobody.explicit, nobody.preprocess) == (None, PRESETS["unit"])
    assert [c.source for c in (choose("raw", said), choose(None, said), nobody)] == [
        "option",
        "model",
        "default",
    ]
    with pytest.raises(OptionError, match=r"^preprocess: no preset 'imagnet'; did you mean 'imagenet'"):
        choose("imagnet", said)


def test_pairs_keep_what_they_do_not_say() -> None:
    said = {PREPROCESSING: "imagenet"}
    small = choose("size=24", said)
    assert (small.source, str(small.explicit)) == (
        "option-and-model",
        "mean=0.485,0.456,0.406 std=0.229,0.224,0.225 size=24x24",
    )
    assert "the rest from the model's metadata" in str(small)
    alone = choose("size=24", {})
    assert (alone.source, str(alone.explicit)) == ("option-and-default", "mean=0 std=1 size=24x24")
    assert "with default mean and std" in str(alone)
    for whole in ("mean=0.5 std=0.5", "cifar10 size=24", "unit"):
        assert choose(whole, said).source == "option"
    assert choose("mean=0.5 std=0.5", said).preprocess.size is None


COMMANDS = {
    "evaluate": ["evaluate", "{net}", "--images", "{few}"],
    "compare": ["compare", "{net}", "{net}", "--images", "{few}"],
    "calibrate": ["calibrate", "{net}", "{out}", "--images", "{few}", "--count", "4", "--overwrite"],
    "gate": ["fold-bn", "{net}", "{out}", "--min-agreement", "90", "--gate-images", "{few}"],
    "synthesize": ["synthesize", "{net}", "{out}.npz", "--kind", "procedural", "--count", "2"],
}


def told(name: str, account: dict[str, Any]) -> tuple[str, str]:
    """What a command's JSON says of its preprocessing."""
    if name == "gate":
        return account["gates"][0]["preprocess"], ""
    found = account
    if name == "calibrate":
        (found,) = account["measured"]["inputs"]
    return found["preprocess"], found["preprocess_from"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_follows_it_and_says_so(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def argv(net: str) -> list[str]:
        places = {"net": folder / f"{net}.onnx", "few": folder / "few.npz", "out": tmp_path / "out.onnx"}
        return [part.format(**places) for part in COMMANDS[name]]

    def run(net: str, *more: str) -> tuple[str, str]:
        assert main([*argv(net), *more, "--json"]) == 0
        return told(name, json.loads(capsys.readouterr().out))

    option = "--gate-preprocess" if name == "gate" else "--preprocess"
    if name == "gate":
        assert run("net") == (f"preprocessed by {OF_FILE} (from the model's metadata)", "")
        assert run("net", option, "unit") == ("preprocessed by mean=0 std=1 (as asked for)", "")
        assert "(the default, because neither" in run("silent")[0]
    else:
        assert run("net") == (OF_FILE, "model")
        assert run("net", option, "unit") == ("mean=0 std=1", "option")
        assert run("silent")[1] == "default"
    assert main(argv("odd")) == 2
    assert "its metadata 'preprocessing' cannot be used" in capsys.readouterr().err


def test_accuracy_is_that_of_the_preprocessing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(folder / "net.onnx"), "--images", str(folder / "few.npz")]
    found = []
    for more in ([], ["--preprocess", "fashion-mnist"], ["--preprocess", "raw"]):
        assert main([*command, *more, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["top1"])
    assert found[0] == found[1] > 0.85
    assert found[2] < 0.7
    assert main(command) == 0
    assert f"images are preprocessed by {OF_FILE} (from the model's metadata)" in capsys.readouterr().out
