"""The same seed gives the same bytes in another process with another number of threads.

`python tests/benchmarks/sameness.py` shows every pass that learns on more seeds, each in its own process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.model import load, save
from tests.benchmarks.sameness import COMMANDS, INT4, NET
from tests.helpers.paths import ROOT

SEED = "1"
PROCESS = """
import json, sys
from tests.helpers.brief import run
code = run(json.loads(sys.argv[1]))
assert "torch._dynamo" not in sys.modules, "a second of each command, and nothing compiles"
sys.exit(code)
"""


def shorter(file: Path) -> Path:
    """The shipped network with two of its seven blocks that can go: its scores hardly differ."""
    model = load(NET)
    drop_blocks(model, ["blocks.1", "blocks.2", "blocks.4", "blocks.5", "blocks.7"])
    save(model, file)
    return file


def files(net: Path, folder: Path, threads: int) -> dict[str, str]:
    """SHA-256 of what each command writes, in a process of that many threads."""
    folder.mkdir()
    commands = [INT4, *([re.sub("^out", name, word) for word in argv] for name, argv in COMMANDS.items())]
    forced = [c if c[0] == "synthesize" else [*c, "--force"] for c in commands]
    calls = json.dumps([[word.format(seed=SEED).replace(NET, str(net)) for word in c] for c in forced])
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads)) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, calls],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_another_process_makes_the_same_files(tmp_path: Path) -> None:
    net = shorter(tmp_path / "net.onnx")
    first, second = (files(net, tmp_path / str(threads), threads) for threads in (1, 2))
    assert {Path(name).stem for name in first} == {*COMMANDS, "int4"}
    assert first == second
