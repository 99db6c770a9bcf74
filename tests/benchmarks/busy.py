"""Times of commands that learn: on a busy machine, with more threads, against onnxruntime; their memory.

    python tests/benchmarks/busy.py NET.onnx --preprocess cifar10 [--rows idle,busy,peer] [--only quantize]
        [--effort fast] [--seconds 600] [--cores 2] [--loops 4] [--runs 1]

A row appears as soon as its command has ended: wall seconds, processor seconds, the ratios of both to the
first row of its group, the limit of the ratio of wall times, peak memory. Groups, each on `cores` cores:

    idle    one thread, then as many threads as cores: at most 0.67 (1.5 times as fast)
    busy    beside `loops` busy loops: one thread, then the command as it is: at most 1.5
    peer    onnxruntime's static quantization of NET with 100 inputs, then `quantize` without data as it is,
            at the effort `fast`, per channel and per tensor: at most 2.0

Peak memory is to be at most 1.5 GB. The whole takes at most --seconds: a command that would not end in time
is stopped, its row says so, and later groups are left out. Take idle rows on an idle machine: others change
wall times; processor times tell whether threads did more work or only waited.
Two minutes:    --rows idle,busy --only quantize --effort fast
MobileNetV2 against onnxruntime:    mobilenet_v2.onnx --preprocess imagenet --rows peer
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

ROOT = str(Path(__file__).resolve().parents[2])
sys.path.insert(0, ROOT)

COMMANDS: dict[str, list[str]] = {
    "quantize": ["quantize", "{net}", "out.onnx"],
    "prune": ["prune", "{net}", "out.onnx", "--sparsity", "0.5"],
    "drop-blocks": ["drop-blocks", "{net}", "out.onnx", "--blocks", "{blocks}"],
    "calibrate": ["calibrate", "{net}", "out.onnx", "--overwrite"],
    "correct-bias": [
        "correct-bias",
        "int4.onnx",
        "out.onnx",
        "--reference",
        "{net}",
        "--inputs",
        "distilled",
    ],
}
IMAGES = 100
"""Inputs that onnxruntime's static quantization gets."""
LOOP = "while True: pass"
MEMORY_GB = 1.5
OWN = [sys.executable, "-m", "onnxcompress.cli.main"]
THREADS = ("OMP_", "GOMP_", "KMP_", "OPENBLAS_", "ONNXCOMPRESS_")
"""Beginnings of environment variables that would change what is measured."""


@dataclass(frozen=True)
class Usage:
    """What a command took."""

    wall: float
    processor: float
    gigabytes: float
    stopped: bool = False
    """Whether it was stopped before it ended."""


@dataclass
class Bench:
    """Runs commands until the time is up, and prints a row for each."""

    folder: Path
    runs: int
    until: float
    too_late: bool = field(default=False, init=False)

    def group(
        self, name: str, ways: Sequence[tuple[str, list[str], Mapping[str, str]]], most: float
    ) -> None:
        """Run the ways in turns, and print a row for each: figures of the fastest run.

        Args:
            name: Name of the group.
            ways: Label, command line and environment of each; ratios are to the first.
            most: Limit of the ratio of wall times.
        """
        best: dict[str, Usage] = {}
        for run in range(self.runs):
            for label, command, environment in ways:
                if self.too_late:
                    return
                usage = run_command(command, environment, self.folder, self.until - time.monotonic())
                self.too_late = usage.stopped
                if label not in best or usage.wall < best[label].wall:
                    best[label] = usage
                if run == self.runs - 1 or usage.stopped:
                    _print_row(name, label, best[label], best[ways[0][0]], most)


def _print_row(name: str, label: str, usage: Usage, first: Usage, most: float) -> None:
    ratios = f"{usage.wall / first.wall:7.2f}{usage.processor / max(first.processor, 1e-9):9.2f}"
    if usage is first or usage.stopped:
        ratios, limit = f"{'':16}", ""
    else:
        limit = f"<= {most:g}{' MISSED' if usage.wall / first.wall > most else ''}"
    stopped = ", stopped: no time left" if usage.stopped else ""
    much = "" if usage.gigabytes <= MEMORY_GB else f" > {MEMORY_GB}"
    text = f"{name:24}{label + stopped:22}{usage.wall:8.1f}{usage.processor:10.1f}{ratios}  {limit:15}"
    click.echo(f"{text}{usage.gigabytes:6.2f}{much}")


@click.command(help=__doc__)
@click.argument("net", type=click.Path(exists=True, dir_okay=False))
@click.option("--preprocess", default="cifar10", show_default=True)
@click.option("--rows", default="idle,busy,peer", show_default=True, help="Groups of rows.")
@click.option("--only", default="quantize,prune,drop-blocks", show_default=True, help=", ".join(COMMANDS))
@click.option("--effort", type=click.Choice(["auto", "fast", "balanced", "best"]), default="auto")
@click.option("--seconds", default=600.0, show_default=True, help="For all rows together.")
@click.option("--loops", default=4, show_default=True, help="Busy loops beside a command.")
@click.option("--cores", default=2, show_default=True)
@click.option("--runs", default=1, show_default=True, help="Runs of each command; the fastest counts.")
@click.option("--blocks", default=8, show_default=True, help="Blocks that drop-blocks drops.")
def main(
    net: str,
    preprocess: str,
    rows: str,
    only: str,
    effort: str,
    seconds: float,
    loops: int,
    cores: int,
    runs: int,
    blocks: int,
) -> None:
    until = time.monotonic() + seconds
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    columns = f"{'wall s':>8}{'cpu s':>10}{'ratio':>7}{'cpu':>9}  {'limit':15}{'GB':>6}"
    click.echo(f"{'group':24}{'way':22}{columns}")
    net = str(Path(net).resolve())
    how = ["--preprocess", preprocess, "-q"]
    one, all_cores = {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": str(cores)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(folder, runs, until)
        for command in only.split(",") if {"idle", "busy"} & set(rows.split(",")) else ():
            if command == "correct-bias":
                few = ["quantize", net, "int4.onnx", "--weight-bits", "4", "--no-reconstruct", *how]
                run_command([*OWN, *few], {}, folder, seconds)
            words = [word.format(net=net, blocks=blocks) for word in COMMANDS[command]]
            line = [*OWN, *words, *how, "--effort", effort, "--no-cache"]
            if "idle" in rows.split(","):
                ways = [("one thread", line, one), (f"{cores} threads", line, all_cores)]
                bench.group(f"{command}, idle", ways, 0.67)
            if "busy" in rows.split(","):
                with busy(loops):
                    ways = [("one thread", line, one), ("as it is", line, {})]
                    bench.group(f"{command}, {loops} loops", ways, 1.5)
        if "peer" in rows.split(","):
            bench.group("W8A8", _against_onnxruntime(net, how, folder), 2.0)


def _against_onnxruntime(
    net: str, how: list[str], folder: Path
) -> list[tuple[str, list[str], Mapping[str, str]]]:
    """Command lines of onnxruntime's static quantization, and of `quantize --effort fast`."""
    from onnxcompress.model import load
    from onnxcompress.model.model_like import input_specs

    (spec,) = (spec for spec in input_specs(load(net)) if spec.read)
    assert spec.shape is not None
    sizes = [size if isinstance(size, int) else 224 for size in spec.shape[1:]]
    inputs = np.random.default_rng(0).normal(size=(IMAGES, *sizes)).astype(np.float32)
    np.save(folder / "inputs.npy", inputs)
    code = (
        "import numpy as np; from tests.benchmarks.quantize import onnxruntime_static; "
        f"onnxruntime_static({net!r}, 'peer.onnx', np.load('inputs.npy'), True)"
    )
    own = [*OWN, "quantize", net, "out.onnx", *how, "--effort", "fast", "--no-cache"]
    return [
        (f"onnxruntime, {IMAGES}", [sys.executable, "-c", code], {}),
        ("fast", own, {}),
        ("fast, per tensor", [*own, "--no-per-channel"], {}),
    ]


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


def run_command(command: list[str], environment: Mapping[str, str], folder: Path, seconds: float) -> Usage:
    """Run a command to its end, or until its time is up.

    Args:
        command: The command line.
        environment: Variables of its own.
        folder: Where it runs.
        seconds: Seconds after which it is stopped.

    Returns:
        What it took.

    Raises:
        ClickException: It failed.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(THREADS)}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, kept.get("PYTHONPATH", "")]))
    start = time.perf_counter()
    with (folder / "said.txt").open("w+") as said:
        process = subprocess.Popen(
            command, cwd=folder, env={**kept, **environment}, stdout=said, stderr=said
        )
        stopped = False
        while True:
            done, status, used = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            if not stopped and time.perf_counter() - start > seconds:
                process.kill()
                stopped = True
            time.sleep(0.01)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        said.seek(0)
        if process.returncode and not stopped:
            raise click.ClickException(f"{' '.join(command)}\n{said.read()}")
    unit = 1e9 if sys.platform == "darwin" else 1e6  # ru_maxrss: bytes there, kB elsewhere
    return Usage(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / unit, stopped)


if __name__ == "__main__":
    main()
