"""Runs command lines in forked processes and judges what a user would see.

A forked process has the libraries loaded already, its own address space limit, its own clock, and may be
killed by onnxruntime without harm to the others. What is promised of each:

    exit code 0 to 3; 1 and 2 with one line on standard error that names what is wrong; no traceback
    an end within the time limit, within the memory limit
    the files that were there are as they were, and no file is new but the output (and its .data)
"""

from __future__ import annotations

import hashlib
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 60.0
"""Of processor time."""
WAIT = 10
"""Times SECONDS by the clock: other processes make a command wait, which is not its fault."""
MEMORY = 3 << 30
"""Bytes of address space beyond what the process has at its start."""
OUTPUTS = ("out.onnx", "out.onnx.data", "out.npz", "out.png", "out.html")


@dataclass(frozen=True)
class Seen:
    """What came of one command line."""

    code: int
    """Exit code; negative: killed by that signal."""
    said: str
    """Standard error."""
    seconds: float
    problem: str
    """What broke the promise; empty: nothing."""

    @property
    def killed(self) -> bool:
        """By a fault in native code."""
        return -self.code in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


def attempt(argv: Sequence[str], folder: Path, seconds: float = SECONDS, memory: int = MEMORY) -> Seen:
    """Run a command line in `folder` and judge it."""
    before = _digests(folder)
    start = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run(argv, folder, writer, seconds, memory)
    os.close(writer)
    said = _read(reader, start + WAIT * seconds + 5)
    os.close(reader)
    late = said is None
    if late:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = (said or b"").decode("utf-8", "replace")
    seen = Seen(code, text, time.monotonic() - start, "")
    return Seen(code, text, seen.seconds, _judge(seen, late, before, _digests(folder)))


def _run(argv: Sequence[str], folder: Path, writer: int, seconds: float, memory: int) -> None:
    """In the child: never returns."""
    code = 70
    try:
        os.dup2(writer, 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.chdir(folder)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        from onnxcompress.cli.main import main

        code = main([str(a) for a in argv])
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _read(reader: int, until: float) -> bytes | None:
    """All that comes; None where it does not end in time."""
    found = b""
    while True:
        ready = select.select([reader], [], [], max(until - time.monotonic(), 0))[0]
        if not ready:
            return None
        piece = os.read(reader, 1 << 16)
        if not piece:
            return found
        found = (found + piece)[-1 << 20 :] if len(found) > 1 << 20 else found + piece


def _judge(seen: Seen, late: bool, before: dict[str, str], after: dict[str, str]) -> str:
    lines = [line for line in seen.said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("error: ", "Error: "))]
    new = after.keys() - before.keys() - set(OUTPUTS)
    changed = [n for n in before if n not in OUTPUTS and after.get(n) != before[n]]
    if late or -seen.code in (signal.SIGXCPU, signal.SIGKILL):
        return f"no end within {seen.seconds:.0f} s"
    if seen.killed:
        return f"killed by {signal.Signals(-seen.code).name}"
    if "Traceback" in seen.said or not 0 <= seen.code <= 3:
        return "a traceback: " + (lines or ["nothing said"])[-1]
    if new or changed:
        return f"new files {sorted(new)}, changed files {changed}"
    if seen.code in (1, 2) and len(errors) != 1:
        return f"exit code {seen.code} and {len(errors)} lines of error"
    if seen.code in (1, 2) and (errors[0] != lines[-1] or len(errors[0]) > 2000):
        return f"exit code {seen.code}, and the error is not the one last line: {lines[-1][:200]}"
    return ""


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            plain = path.is_file() and not path.is_symlink()
            key = str(path.relative_to(folder))
            found[key] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else "special"
    return found
