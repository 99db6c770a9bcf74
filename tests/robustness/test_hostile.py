"""Broken and hostile files, through the whole command line: a right result or one line that says why not.

Each command line runs in a forked process with 3 GB of memory beyond its libraries and a minute of time
(`robustness.hostile.harness`). `python tests/benchmarks/hostile.py` runs many more, and every command.
"""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcompress.cli.main import main
from tests.robustness.hostile import cases, mutate
from tests.robustness.hostile.harness import Seen, attempt
from tests.robustness.hostile.networks import TEXTS, network

FUZZED = 250
"""Cases of each fuzz test."""
READING = {
    "inspect": ["inspect", "in.onnx", "--statistics"],
    "fold-bn": ["fold-bn", "in.onnx", "out.onnx", "--no-verify"],
    "equalize": ["equalize", "in.onnx", "out.onnx", "--no-verify"],
    "absorb-bias": ["absorb-bias", "in.onnx", "out.onnx"],
}
"""Commands that neither run the network nor learn."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONNXCOMPRESS_TRACEBACK", "1")
    inner = tmp_path / "work"
    inner.mkdir()
    np.savez(inner / "images.npz", x=np.zeros((4, 8, 8, 3), np.uint8), y=np.zeros(4, np.int64))
    return inner


def sound(seen: Seen, *codes: int) -> str:
    """No promise was broken and the exit code is one of these; what was said."""
    assert not seen.problem, f"{seen.problem}\n{seen.said[-3000:]}"
    assert seen.code in codes, seen.said
    return seen.said


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.REFUSED)
def test_a_lie_is_refused_by_name(name: str, folder: Path) -> None:
    build, message = cases.REFUSED[name]
    cases.lay(folder, build)
    for command in ("inspect", "fold-bn"):
        assert message in sound(attempt(READING[command], folder), 1)
    assert not (folder / "out.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.STRANGE)
def test_a_strange_file_is_handled_or_refused(name: str, folder: Path) -> None:
    cases.lay(folder, cases.STRANGE[name])
    for argv in READING.values():
        sound(attempt(argv, folder, seconds=30), 0, 1)


def test_values_that_are_not_finite_are_left_alone(folder: Path) -> None:
    for name in ("negative variance", "NaN variance", "weights near the end of float32"):
        (folder / "in.onnx").write_bytes(cases.STRANGE[name]().SerializeToString())
        said = attempt([*READING["fold-bn"], "--quiet"], folder)
        sound(said, 0)
        import onnx

        kept = [n.op_type for n in onnx.load(folder / "out.onnx").graph.node]
        assert "BatchNormalization" in kept


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.RECIPES)
def test_a_hostile_recipe_is_wrong_usage(name: str, folder: Path) -> None:
    (folder / "r.yaml").write_bytes(cases.RECIPES[name].encode("utf-8", "surrogateescape"))
    (folder / "in.onnx").write_bytes(network("residual").SerializeToString())
    sound(attempt(["run", "r.yaml", "in.onnx", "out.onnx", "--no-cache"], folder), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.NPZ)
def test_a_hostile_archive_is_no_set_of_images(name: str, folder: Path) -> None:
    (folder / "x.npz").write_bytes(cases.npz(name))
    (folder / "in.onnx").write_bytes(network("residual").SerializeToString())
    command = ["evaluate", "in.onnx", "--images", "x.npz", "--preprocess", "unit"]
    assert "x.npz: " in sound(attempt(command, folder, memory=1 << 30), 1)


@pytest.mark.parametrize("name", cases.IMAGES)
def test_a_hostile_image_is_named(name: str, folder: Path) -> None:
    (folder / "photos" / "0").mkdir(parents=True)
    suffix = "ppm" if name == "text" else "png"
    (folder / "photos" / "0" / f"bad.{suffix}").write_bytes(cases.IMAGES[name])
    (folder / "in.onnx").write_bytes(network("residual").SerializeToString())
    command = ["evaluate", "in.onnx", "--images", "photos", "--preprocess", "unit"]
    assert f"bad.{suffix}: " in sound(attempt(command, folder, memory=1 << 30), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.JSON)
def test_a_hostile_file_of_scores_is_refused(name: str, folder: Path) -> None:
    (folder / "s.json").write_bytes(cases.JSON[name])
    (folder / "in.onnx").write_bytes(network("residual").SerializeToString())
    for command in (
        ["drop-blocks", "in.onnx", "out.onnx", "--scores", "s.json", "--blocks", "1", "--synthetic", "4"],
        [
            "quantize",
            "in.onnx",
            "out.onnx",
            "--bits-budget",
            "6",
            "--sensitivity",
            "s.json",
            "--synthetic",
            "4",
        ],
    ):
        assert "s.json" in sound(attempt(command, folder), 1)


@pytest.mark.parametrize(
    ("base", "command", "code", "message"),
    [
        (
            "computed",
            ["prune", "in.onnx", "out.onnx", "--sparsity", "0.5", "--synthetic", "4"],
            0,
            "no gradient goes through that: the layers' shares of zeros go by the size of their weights",
        ),
        (
            "quantized",
            ["synthesize", "in.onnx", "out.npz", "--count", "4"],
            1,
            "no gradient reaches the input",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_said(
    base: str, command: list[str], code: int, message: str, folder: Path
) -> None:
    """Valid networks, which ended in tracebacks once."""
    (folder / "in.onnx").write_bytes(network(base).SerializeToString())
    assert message in sound(attempt(command, folder), code)


def test_names_in_a_file_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.onnx").write_bytes(cases.STRANGE["names that command a terminal"]().SerializeToString())
    assert main(["fold-bn", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "-v"]) == 0
    assert main(["inspect", str(tmp_path / "in.onnx")]) == 0
    said = capsys.readouterr()
    assert "�[2J" in said.out
    assert "\x1b" not in said.out + said.err


def test_an_error_that_nobody_foresaw_is_one_line(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxcompress import model

    def broken(path: str) -> None:
        raise KeyError("what")

    monkeypatch.delenv("ONNXCOMPRESS_TRACEBACK", raising=False)
    monkeypatch.setattr(model, "load", broken)
    assert main(["inspect", str(models / "resnet20-fashion.onnx")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: a defect of onnxcompress, or a broken file (KeyError: 'what')")
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", READING)
@settings(
    max_examples=FUZZED // 4,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(sorted(TEXTS)),
    st.sampled_from([*mutate.BYTES, *["fields garbled"] * 4]),
    st.integers(0, 10**6),
)
def test_fuzzed_files(command: str, folder: Path, base: str, kind: str, seed: int) -> None:
    """FUZZED / 4 for each command."""
    data = network(base).SerializeToString()
    (folder / "in.onnx").write_bytes(mutate.BYTES[kind](data, random.Random(seed)))
    sound(attempt(READING[command], folder), 0, 1)


def test_mutations_are_the_same_on_every_machine() -> None:
    data = network("residual").SerializeToString(deterministic=True)
    found = [zlib.crc32(one(data, random.Random(7))) for one in mutate.BYTES.values()]
    assert len(set(found)) == len(found)
    assert found == [zlib.crc32(one(data, random.Random(7))) for one in mutate.BYTES.values()]
