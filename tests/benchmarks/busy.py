"""Commands that learn, on a busy and on an idle machine: how much threads cost, and how much they gain.

    python tests/benchmarks/busy.py NET.onnx --preprocess cifar10 [--loops 4] [--cores 2] [--runs 1]
        [--only quantize,prune] [--effort small]

Each command runs on `cores` cores with one thread (OMP_NUM_THREADS=1), as it is, and with as many threads
as cores, in turns; first beside `loops` busy loops on the same cores, then without. A row has the ratio of
the times to that with one thread in the same round: with loops it is to be at most 1.5, without them
`as many threads` is to be at most 0.67. Processor times beside them tell whether threads did more work
or waited for cores: others on the machine change the first figures, hardly the second.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

COMMANDS: dict[str, list[str]] = {
    "quantize": ["quantize", "{net}", "out.onnx", "-q"],
    "prune": ["prune", "{net}", "out.onnx", "-q", "--sparsity", "0.5"],
    "drop-blocks": ["drop-blocks", "{net}", "out.onnx", "-q", "--blocks", "2"],
    "calibrate": ["calibrate", "{net}", "out.onnx", "-q", "--overwrite"],
    "correct-bias": [
        "correct-bias",
        "int4.onnx",
        "out.onnx",
        "-q",
        "--reference",
        "{net}",
        "--inputs",
        "auto",
    ],
    "synthesize": ["synthesize", "{net}", "out.npz", "--no-sheet"],
}
SMALL: dict[str, list[str]] = {
    "quantize": ["--synthetic", "64"],
    "prune": ["--synthetic", "64"],
    "drop-blocks": ["--synthetic", "64", "--steps", "20"],
    "calibrate": ["--synthetic", "256"],
    "correct-bias": ["--synthetic", "64"],
    "synthesize": ["--count", "64", "--kind", "distilled"],
}
"""Options for less of the same work."""
LOOP = "while True: pass"
WAYS = ("one thread", "as it is", "as many threads")


@dataclass(frozen=True)
class Took:
    """Seconds of one command."""

    wall: float
    processor: float


@click.command(help=(__doc__ or "").split("\n", maxsplit=1)[0])
@click.argument("net", type=click.Path(exists=True, dir_okay=False))
@click.option("--preprocess", default="cifar10", show_default=True)
@click.option("--loops", default=4, show_default=True, help="Busy loops beside a command.")
@click.option("--cores", default=2, show_default=True)
@click.option("--runs", default=1, show_default=True)
@click.option("--only", default=",".join(COMMANDS), show_default=True)
@click.option("--effort", type=click.Choice(["whole", "small"]), default="whole", show_default=True)
@click.option("--idle/--no-idle", default=True, help="Also without the busy loops.")
def main(
    net: str, preprocess: str, loops: int, cores: int, runs: int, only: str, effort: str, idle: bool
) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    click.echo(f"{'':14}{'loops':>6}  {'way':16}{'wall s':>9}{'ratio':>7}{'processor s':>13}{'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for name in only.split(","):
            command = _command(name, str(Path(net).resolve()), preprocess, effort, Path(folder))
            for beside in (loops, 0) if idle else (loops,):
                with busy(beside):
                    _compare(name, beside, command, cores, runs, Path(folder))


def _command(name: str, net: str, preprocess: str, effort: str, folder: Path) -> list[str]:
    how = ["--preprocess", preprocess]
    if name == "correct-bias" and not (folder / "int4.onnx").exists():
        _timed(
            ["quantize", net, "int4.onnx", "-q", "--weight-bits", "4", "--synthetic", "16", *how],
            {},
            folder,
        )
    words = [word.format(net=net) for word in COMMANDS[name]]
    return [*words, *how, *(SMALL[name] if effort == "small" else [])]


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes beside, each of which keeps a core busy if it gets one."""
    loops = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(count)]
    try:
        time.sleep(1.0 if loops else 0.0)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _compare(name: str, loops: int, command: list[str], cores: int, runs: int, folder: Path) -> None:
    ways = {WAYS[0]: {"OMP_NUM_THREADS": "1"}, WAYS[1]: {}, WAYS[2]: {"OMP_NUM_THREADS": str(cores)}}
    took: dict[str, list[Took]] = {way: [] for way in ways}
    for _ in range(runs):
        for way, environment in ways.items():
            took[way].append(_timed(command, environment, folder))
    for way, times in took.items():
        first = took[WAYS[0]]
        pairs = list(zip(times, first, strict=True))
        wall, processor = (statistics.median(getattr(t, of) for t in times) for of in ("wall", "processor"))
        slower = statistics.median(t.wall / one.wall for t, one in pairs)
        work = statistics.median(t.processor / one.processor for t, one in pairs)
        click.echo(f"{name:14}{loops:6}  {way:16}{wall:9.1f}{slower:7.2f}{processor:13.1f}{work:7.2f}")


def _timed(argv: list[str], environment: dict[str, str], folder: Path) -> Took:
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))
    }
    own.pop("OPENBLAS_NUM_THREADS", None)
    command = [sys.executable, "-m", "onnxcompress.cli.main", *argv]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=own | environment, capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}\n{done.stderr}")
    return Took(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


if __name__ == "__main__":
    main()
