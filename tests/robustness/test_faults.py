"""Killed, interrupted, out of room, beside another run: nothing is lost, nothing is half-written.

Commands run as processes of their own, and are stopped at moments spread over their whole run.
"""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from onnxcompress.cli.main import main
from onnxcompress.model import load

COMMAND = [sys.executable, "-m", "onnxcompress.cli.main"]
NET = "mobilenetv2-fashion.onnx"
MOMENTS = 6
"""At which a run is killed, evenly over its length."""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """in.onnx; OUT as an older run left it; both with external data: two files have to appear."""
    proto = onnx.load(models / NET)
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    assert (
        main(["fold-bn", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "-q", "--no-verify"]) == 0
    )
    return tmp_path


def start(folder: Path, *argv: str, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *argv], cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=limit
    )


FOLD = ("equalize", "in.onnx", "out.onnx", "-q", "--no-verify")
KILLED_AFTER_ONE = """
import os, sys
from onnxcompress.cli.main import main
real = os.replace
def once(a, b):
    real(a, b)
    os.kill(os.getpid(), 9)
os.replace = once
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_at_any_moment(folder: Path) -> None:
    """OUT is what it was or what it becomes; what is left beside it is named as such and does no harm."""
    old = {name: digest(folder / name) for name in ("out.onnx", "out.onnx.data", "in.onnx", "in.data")}
    began = time.monotonic()
    assert start(folder, *FOLD).wait() == 0
    whole = time.monotonic() - began
    new = {name: digest(folder / name) for name in old}
    assert new["out.onnx"] != old["out.onnx"]
    for moment in range(1, MOMENTS + 1):
        assert (
            main(["fold-bn", str(folder / "in.onnx"), str(folder / "out.onnx"), "-q", "--no-verify"]) == 0
        )
        running = start(folder, *FOLD)
        time.sleep(whole * moment / MOMENTS * 0.98)
        running.kill()
        running.wait()
        left = {p.name for p in folder.iterdir()} - old.keys()
        assert all(name.startswith(".out.onnx") and name.endswith(".tmp") for name in left), left
        for name, sha in old.items():
            assert digest(folder / name) in (sha, new[name])
        load(folder / "in.onnx")
    assert start(folder, *FOLD).wait() == 0
    assert {name: digest(folder / name) for name in old} == new


@pytest.mark.slow
def test_killed_between_the_two_files_is_seen_by_the_next_reader(folder: Path) -> None:
    """Two names cannot change at once: the new weights first, and the old graph fits them or says so."""
    old = {name: digest(folder / name) for name in ("out.onnx", "out.onnx.data")}
    command = [sys.executable, "-c", KILLED_AFTER_ONE, *FOLD]
    assert subprocess.run(command, cwd=folder, check=False).returncode == -signal.SIGKILL
    between = {name: digest(folder / name) for name in old}
    assert main(["inspect", str(folder / "out.onnx"), "--json"]) == 0  # the old graph, weights that fit it
    assert start(folder, *FOLD).wait() == 0
    new = {name: digest(folder / name) for name in old}
    assert between == {"out.onnx": old["out.onnx"], "out.onnx.data": new["out.onnx.data"]}
    assert new["out.onnx"] != old["out.onnx"]
    assert new["out.onnx.data"] != old["out.onnx.data"]


def test_killed_between_the_two_files_there_is_no_graph_without_its_weights(folder: Path) -> None:
    for name in ("out.onnx", "out.onnx.data"):
        (folder / name).unlink()
    subprocess.run([sys.executable, "-c", KILLED_AFTER_ONE, *FOLD], cwd=folder, check=False)
    assert (folder / "out.onnx.data").exists()
    assert not (folder / "out.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["os.replace", "os.fdopen"])
def test_asked_to_end_it_leaves_nothing_behind(folder: Path, kind: signal.Signals, place: str) -> None:
    """While the files are written, and when both are but neither has its name."""
    before = {p.name: digest(p) for p in folder.iterdir()}
    code = (
        "import os, signal, sys, time; from onnxcompress.cli.main import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored behind a shell
        f"real = {place}\n"
        "def slow(*a, **o):\n"
        "    print('now', file=sys.stderr, flush=True); time.sleep(60); return real(*a, **o)\n"
        f"{place} = slow; sys.exit(main(sys.argv[1:]))"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code, *FOLD], cwd=folder, stderr=subprocess.PIPE, text=True
    )
    assert running.stderr is not None
    assert running.stderr.readline() == "now\n"
    running.send_signal(kind)
    assert running.stderr.read().strip() == "interrupted"
    assert running.wait() == 128 + kind
    assert {p.name: digest(p) for p in folder.iterdir()} == before


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_old_file_stays(folder: Path) -> None:
    """No file may be longer than a part of the result: writing fails as it does where no room is left."""
    before = {p.name: digest(p) for p in folder.iterdir()}
    size = (folder / "out.onnx.data").stat().st_size
    for room in (0, 4096, size // 2, size - 1):

        def limit(room: int = room) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

        running = start(folder, *FOLD, limit=limit)
        said = running.communicate()[1]
        assert running.returncode == 1
        assert said.startswith("error: out.onnx.data: cannot be written (File too large)"), said
        assert said.count("\n") == 1
        assert {p.name: digest(p) for p in folder.iterdir()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shut = folder / "shut"
    shut.mkdir(mode=0o500)
    assert main(["fold-bn", str(folder / "in.onnx"), str(shut / "out.onnx")]) == 1
    assert "name a file in an existing, writable folder" in capsys.readouterr().err


def test_a_folder_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fold-bn", str(folder / "in.onnx"), str(folder / "none" / "out.onnx")]) == 1
    assert "name a file in an existing, writable folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "target", ["in.onnx", "link.onnx", "hard.onnx", "in.data", "hard.data", "sub/../in.onnx"]
)
def test_the_output_is_never_the_input(
    target: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its own name, another, or a name of the file with its weights."""
    (folder / "sub").mkdir()
    (folder / "link.onnx").symlink_to("in.onnx")
    (folder / "hard.onnx").hardlink_to(folder / "in.onnx")
    (folder / "hard.data").hardlink_to(folder / "in.data")
    before = {p.name: digest(p) for p in folder.iterdir() if p.is_file()}
    assert main(["fold-bn", str(folder / "in.onnx"), str(folder / target), "-q"]) == 1
    said = capsys.readouterr().err
    assert "would replace the input" in said or "it holds the input's weights" in said
    assert {p.name: digest(p) for p in folder.iterdir() if p.is_file()} == before


def test_an_output_that_is_a_link_leaves_what_it_points_at(folder: Path) -> None:
    (folder / "precious").write_text("mine")
    (folder / "new.onnx").symlink_to("precious")
    assert main(["fold-bn", str(folder / "in.onnx"), str(folder / "new.onnx"), "-q", "--no-verify"]) == 0
    assert (folder / "precious").read_text() == "mine"
    load(folder / "new.onnx")


def test_two_runs_on_one_output(models: Path, tmp_path: Path) -> None:
    """The last one wins as a whole: the file is one of the two results."""
    (tmp_path / "in.onnx").write_bytes((models / NET).read_bytes())
    results = []
    for name in ("fold-bn", "equalize"):
        assert main([name, str(tmp_path / "in.onnx"), str(tmp_path / "o.onnx"), "-q", "--no-verify"]) == 0
        results.append(digest(tmp_path / "o.onnx"))
    running = [
        start(tmp_path, name, "in.onnx", "o.onnx", "-q", "--no-verify") for name in ("fold-bn", "equalize")
    ]
    assert [one.wait() for one in running] == [0, 0]
    assert digest(tmp_path / "o.onnx") in results
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "o.onnx"]
