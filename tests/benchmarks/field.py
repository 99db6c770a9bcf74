"""Files from the field through every command: done, refused with a reason, or failed.

    python tests/benchmarks/field.py FILE… [--commands quantize,fp16] [--seconds 900] [--results FILE.jsonl]

FILE: .onnx files, or wheels of packages that ship some. A row for each file, a column for each command.
`done`: a valid file was written. `refused`: one line with the reason, exit code 1 or 2, no file. `failed`:
anything else, as a traceback, an invalid file, or no end in --seconds of processor time, which other
programs on the machine do not lengthen. Reasons are listed below the table. With --results a run that was
interrupted goes on where it was: the attempts in that file are not made again.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import onnx

QUICK = ["--effort", "fast"]
PRUNED = ["prune", "IN", "MID", "--sparsity", "0.2", "--no-reconstruct", "--force"]
COMMANDS: dict[str, list[str]] = {
    "inspect": ["inspect", "IN"],
    "fold-bn": ["fold-bn", "IN", "OUT"],
    "equalize": ["equalize", "IN", "OUT"],
    "absorb-bias": ["absorb-bias", "IN", "OUT"],
    "calibrate": ["calibrate", "IN", "OUT", "--inputs", "procedural", *QUICK],
    "quantize": ["quantize", "IN", "OUT", *QUICK],
    "prune": ["prune", "IN", "OUT", "--sparsity", "0.3", *QUICK],
    "fp16": ["fp16", "IN", "OUT"],
    "drop-blocks": ["drop-blocks", "IN", "OUT", "--blocks", "1", "--steps", "0", *QUICK],
    "correct-bias": ["correct-bias", "MID", "OUT", "--reference", "IN", "--inputs", "procedural", *QUICK],
    "synthesize": ["synthesize", "IN", "NPZ", "--kind", "procedural", "--count", "4", "--no-sheet"],
    "sensitivity": ["sensitivity", "IN", "--synthetic", "6", "--weight-bits", "8", "--no-reconstruct"],
}
BEFORE: dict[str, list[str]] = {"correct-bias": PRUNED}
"""What is run first, to make MID."""
DEFECT = "a defect of onnxcompress"


@dataclass(frozen=True)
class Attempt:
    """One command on one file."""

    file: str
    command: str
    outcome: str
    """done, refused or failed."""
    said: str
    """Last line on standard error."""
    seconds: float
    """Processor time."""


def attempt(file: Path, command: str, seconds: float) -> Attempt:
    """Run one command on one file in a process of its own."""
    start = _processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        places = {name: str(Path(folder) / f"{name.lower()}.onnx") for name in ("OUT", "MID")}
        places |= {"IN": str(file), "NPZ": str(Path(folder) / "made.npz")}
        out = Path(places["OUT"])
        runs = [BEFORE[command]] if command in BEFORE else []
        try:
            for words in [*runs, COMMANDS[command]]:
                ended = _run([places.get(word, word) for word in words], seconds)
                if ended.returncode not in (0, 3):
                    break
        except subprocess.TimeoutExpired:
            return Attempt(file.name, command, "failed", "no end in time", seconds)
        lines = [line for line in ended.stderr.strip().splitlines() if line]
        said = lines[-1] if lines else ""
        outcome = _outcome(ended.returncode, said, out, "OUT" in COMMANDS[command])
    taken = _processor_seconds() - start
    if ended.returncode == -signal.SIGXCPU:
        said = "no end in time"
    print(f"{outcome:8} {file.name} {command} {taken:.0f} s", file=sys.stderr, flush=True)
    return Attempt(file.name, command, outcome, said, taken)


def _run(words: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command for so many seconds of processor time, at most; 20 times as many by the clock."""
    limit = int(seconds)
    return subprocess.run(
        [sys.executable, "-m", "onnxcompress.cli.main", *words],
        capture_output=True,
        text=True,
        timeout=20 * seconds,
        env={**os.environ, "ONNXCOMPRESS_CACHE": "none", "ONNXCOMPRESS_LATENCY": "off"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10)),
    )


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _outcome(code: int, said: str, out: Path, writes: bool) -> str:
    if code in (1, 2) and said.startswith("error: ") and DEFECT not in said and not out.exists():
        return "refused"
    if code not in (0, 3) or (writes and not out.exists()):
        return "failed"
    if writes:
        try:
            onnx.checker.check_model(str(out), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            return "failed"
    return "done"


def files_of(paths: Sequence[str], folder: Path) -> Iterator[Path]:
    """The .onnx files named, and those inside wheels."""
    for path in map(Path, paths):
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                for name in wheel.namelist():
                    if name.endswith(".onnx"):
                        yield Path(wheel.extract(name, folder))
        else:
            yield path


@click.command()
@click.argument("paths", nargs=-1, required=True)
@click.option("--commands", default=",".join(COMMANDS))
@click.option("--seconds", default=900.0)
@click.option("--results", type=click.Path(path_type=Path))
def main(paths: tuple[str, ...], commands: str, seconds: float, results: Path | None) -> None:
    """Print the table, then what was refused and what failed."""
    names = commands.split(",")
    lines = results.read_text().splitlines() if results and results.exists() else []
    found = {(a.file, a.command): a for a in (Attempt(**json.loads(line)) for line in lines)}
    with tempfile.TemporaryDirectory() as folder:
        files = list(files_of(paths, Path(folder)))
        for name in names:
            for file in files:
                if (file.name, name) not in found:
                    found[file.name, name] = tried = attempt(file, name, seconds)
                    if results:
                        with results.open("a") as stream:
                            stream.write(json.dumps(asdict(tried)) + "\n")
    _print_table([file.name for file in files], names, found)


def _print_table(files: Sequence[str], names: Sequence[str], found: dict[tuple[str, str], Attempt]) -> None:
    attempts = [found[file, name] for file in files for name in names]
    width = max(map(len, files))
    print(" " * width, *(f"{name:>12}" for name in names))
    for file in files:
        print(f"{file:{width}}", *(f"{found[file, name].outcome:>12}" for name in names))
    counts = {o: sum(a.outcome == o for a in attempts) for o in ("done", "refused", "failed")}
    print(*(f"{count} {outcome}" for outcome, count in counts.items()), sep=", ")
    for a in attempts:
        if a.outcome != "done":
            print(f"{a.outcome} {a.file} {a.command} ({a.seconds:.0f} s): {a.said}")


if __name__ == "__main__":
    main()
