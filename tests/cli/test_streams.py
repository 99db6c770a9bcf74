"""`-`: chains in a shell give what files give, and nothing but the model on standard output."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

COMMAND = f"{sys.executable} -m onnxcompress.cli.main"


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `oc` is the command; fails as any of its parts does."""
    script = f'set -o pipefail; oc() {{ {COMMAND} "$@"; }}; {line}'
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def net(models: Path, tmp_path: Path) -> Path:
    file = tmp_path / "net.onnx"
    file.symlink_to(models / "resnet20-fashion.onnx")
    return file


@pytest.mark.slow
def test_a_chain_of_streams_is_a_chain_of_files(net: Path, tmp_path: Path) -> None:
    done = shell("oc fold-bn net.onnx - --no-verify | oc equalize - - --no-verify > piped.onnx", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "21 × folded" in done.stderr
    assert "net.onnx → standard output" in done.stderr
    assert done.stdout == ""
    (tmp_path / "r.yaml").write_text("passes: [fold-bn, equalize]")
    done = shell("oc run r.yaml - - -q --no-cache < net.onnx | cmp - piped.onnx", tmp_path)
    assert done.returncode == 0, done.stderr
    done = shell(
        "oc fold-bn net.onnx a.onnx -q && oc equalize a.onnx b.onnx -q && cmp b.onnx piped.onnx", tmp_path
    )
    assert done.returncode == 0, done.stderr
    onnx.checker.check_model(onnx.load(tmp_path / "piped.onnx"))


def test_a_failed_command_ends_the_chain_with_one_line_each(tmp_path: Path) -> None:
    done = shell("oc fold-bn nowhere.onnx - | oc equalize - out.onnx", tmp_path)
    assert done.returncode == 1
    assert sorted(done.stderr.splitlines()) == [
        "error: nowhere.onnx: no such file",
        "error: standard input is empty; did the command before it fail?",
    ]
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_traceback(net: Path, tmp_path: Path) -> None:
    done = shell("oc fold-bn net.onnx - --quiet --no-verify | true", tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    done = shell("oc fold-bn net.onnx - -q --no-verify | oc drop-blocks - out.onnx", tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: give one target: --latency-reduction PCT, --blocks K or --drop NAME,..."
    ]


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("oc fold-bn net.onnx - --json", 2, "OUT - and --json"),
        ("oc fold-bn - out.onnx < r.txt", 1, "standard input: not a readable ONNX model"),
        ("oc fold-bn outside.onnx - | cat", 1, "outside.onnx: its weights are in external data"),
        ("oc fold-bn - out.onnx < outside.onnx", 1, "standard input: the weights are in external data"),
        ("oc fold-bn net.onnx pipe", 1, "pipe: no regular file; for standard output write -"),
    ],
)
def test_what_no_stream_can_do_is_refused(
    line: str, code: int, message: str, net: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.txt").write_text("no model")
    os.mkfifo(tmp_path / "pipe")
    onnx.save(
        onnx.load(net), tmp_path / "outside.onnx", save_as_external_data=True, location="outside.data"
    )
    done = shell(line, tmp_path)
    assert done.returncode == code
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "pipe").is_fifo()
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("places", "message"), [("net.onnx -", "standard output"), ("- o.onnx", "standard input")]
)
def test_no_model_goes_to_or_comes_from_a_terminal(
    places: str, message: str, net: Path, tmp_path: Path
) -> None:
    main, terminal = pty.openpty()
    command = [*COMMAND.split(), "fold-bn", *places.split()]
    done = subprocess.run(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
        check=False,
    )
    os.close(terminal)
    os.close(main)
    assert done.returncode == 2
    assert f"{message} is a terminal" in done.stderr


def test_a_missed_gate_still_sends_the_model(net: Path, tmp_path: Path) -> None:
    done = shell("oc fold-bn net.onnx - -q --max-size 0.5 > small.onnx", tmp_path)
    assert done.returncode == 3
    assert "at most 0.5 MB is allowed" in done.stderr
    assert len(onnx.load(tmp_path / "small.onnx").graph.node) > 0
