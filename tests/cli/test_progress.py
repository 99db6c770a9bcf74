"""Time left: commands that take long report each batch and round, and a terminal shows it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from onnxcompress.cli import interrupts
from onnxcompress.cli.console import progress
from onnxcompress.data.image_set import load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.evaluation.accuracy import evaluate
from onnxcompress.evaluation.compare import compare
from onnxcompress.evaluation.gates import Gates
from onnxcompress.runtime.latency import benchmark, interleave

NET = "resnet20-fashion.onnx"
Seen = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def few(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = np.load(models / "fashion-test2k.npz")
    file = tmp_path_factory.mktemp("few") / "few.npz"
    np.savez(file, x=archive["x"][:50], y=archive["y"][:50])
    return file


def by_stage(seen: Seen) -> dict[str, list[tuple[int, int]]]:
    return {stage: [(d, t) for s, d, t in seen if s == stage] for stage, _, _ in seen}


def test_every_batch_is_reported(models: Path, few: Path) -> None:
    images, seen = load_images(few, preprocess=Preprocess.parse("fashion-mnist")), Seen()
    evaluate(models / NET, images, batch=20, progress=lambda *p: seen.append(p))
    assert by_stage(seen) == {f"running {NET}": [(20, 50), (40, 50), (50, 50)]}


def test_each_round_is_reported(models: Path) -> None:
    seen = Seen()
    benchmark({"a": models / NET}, runs=3, warm_up=0, progress=lambda *p: seen.append(p))
    assert by_stage(seen) == {"timing, rounds": [(1, 3), (2, 3), (3, 3)]}


def test_with_a_time_limit_seconds_are_reported() -> None:
    seen, ticks = Seen(), iter(np.arange(0, 9, 0.5))
    interleave(
        [lambda: 1.0],
        runs=None,
        seconds=2.5,
        tolerance=None,
        seed=0,
        clock=lambda: float(next(ticks)),
        progress=lambda *p: seen.append(p),
    )
    assert by_stage(seen) == {"timing, seconds at most": [(0, 3), (1, 3), (1, 3), (2, 3), (2, 3)]}


@pytest.mark.slow
@pytest.mark.usefixtures("quick_clock")
def test_compare_and_the_gates_report_all_they_do(models: Path, few: Path) -> None:
    seen, gated = Seen(), Seen()
    images = load_images(few, preprocess=Preprocess.parse("fashion-mnist"))
    compare(models / NET, models / NET, images=images, progress=lambda *p: seen.append(p))
    assert list(by_stage(seen)) == [f"running {NET}", "timing, rounds"]
    gates = Gates(max_drop=1, max_latency=1e6, images=str(few))
    before = gates.prepare(models / NET, lambda *p: gated.append(p))
    assert list(by_stage(gated)) == [f"running {NET}"]
    gates.measure(before, models / NET, lambda *p: gated.append(p))
    assert list(by_stage(gated)) == [f"running {NET}", "timing, rounds"]


def test_reading_a_folder_is_reported(tmp_path: Path) -> None:
    from PIL import Image

    for name in "abc":
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    seen = Seen()
    load_images(tmp_path, preprocess=Preprocess.parse("unit"), progress=lambda *p: seen.append(p))
    assert by_stage(seen) == {f"reading {tmp_path}": [(1, 3), (2, 3), (3, 3)]}


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_shows_a_bar_with_the_time_left(plain: bool, models: Path, few: Path) -> None:
    """With --json, too: it goes to standard error. With NO_COLOR, or no terminal, there is none."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "onnxcompress.cli.main", "evaluate", str(models / NET), "--json"]
    command += ["--images", str(few), "--batch", "1"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"} | ({"NO_COLOR": "1"} if plain else {})
    done = subprocess.run(command, stdout=-1, stderr=theirs, env=environment, check=True)
    os.set_blocking(ours, False)
    try:
        shown = os.read(ours, 65536).decode()
    except BlockingIOError:
        shown = ""
    os.close(ours)
    os.close(theirs)
    assert done.stdout.startswith(b"{")
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown)
    bar = re.search(rf"running {NET} \S+ 50/50 \d:\d\d:\d\d \d:\d\d:\d\d", text)
    assert (bar is None) == plain
    assert bool(text) != plain


@pytest.fixture
def listening() -> Iterator[None]:
    """To SIGINT, which is ignored where a shell runs the tests in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_an_interrupt_that_something_swallowed_ends_the_next_step() -> None:
    with interrupts.watching() as signals, progress(lines=False) as show:
        show("working", 0, 2)
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            show("working", 1, 2)
    assert signals == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    interrupts.check()  # a later command is not interrupted by what came to this one


def test_an_announcement_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as report:
        report("fast effort on 8 inputs, about 5 s", 0, 0)
        report("quantizing layers", 1, 1)
    announced, done = capsys.readouterr().err.splitlines()
    assert announced == "fast effort on 8 inputs, about 5 s"
    assert done.startswith("quantizing layers: 1 in ")
