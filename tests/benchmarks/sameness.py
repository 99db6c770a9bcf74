"""Whether the same seed gives the same bytes: passes that learn, over seeds, runs and threads.

    python tests/benchmarks/sameness.py [--seeds 0,1,2] [--threads 1,2] [--runs 2] [--only prune,quantize]

Each is a process of its own on models/resnet20-fashion.onnx with made images. A row has the number of
different files that came out for a seed: 1 is what is promised.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

MODELS = Path(__file__).resolve().parent.parent.parent / "models"
NET = str(MODELS / "resnet20-fashion.onnx")
MADE = ["--preprocess", "fashion-mnist", "--seed", "{seed}"]
COMMANDS: dict[str, list[str]] = {
    "quantize": ["quantize", NET, "out.onnx", "-q", "--synthetic", "16", *MADE],
    "prune": ["prune", NET, "out.onnx", "-q", "--synthetic", "16", "--sparsity", "0.5", *MADE],
    "drop-blocks": [
        "drop-blocks",
        NET,
        "out.onnx",
        "-q",
        "--synthetic",
        "16",
        "--blocks",
        "1",
        "--steps",
        "4",
        *MADE,
    ],
    "correct-bias": [
        "correct-bias",
        "int4.onnx",
        "out.onnx",
        "-q",
        "--reference",
        NET,
        "--synthetic",
        "16",
        *MADE,
    ],
    "synthesize": [
        "synthesize",
        NET,
        "out.npz",
        "--count",
        "8",
        "--kind",
        "distilled",
        "--no-sheet",
        *MADE,
    ],
}
"""Name -> arguments, {seed} in place of the seed."""
INT4 = [
    "quantize",
    NET,
    "int4.onnx",
    "-q",
    "--weight-bits",
    "4",
    "--synthetic",
    "16",
    "--effort",
    "fast",
    *MADE,
]
"""Makes what `correct-bias` corrects."""


def made(name: str, seed: int, threads: int, folder: Path) -> str:
    """SHA-256 of what a process of that many threads writes."""
    if name == "correct-bias" and not (folder / "int4.onnx").exists():
        run(INT4, 0, 1, folder)
    run(COMMANDS[name], seed, threads, folder)
    (out,) = [path for path in folder.iterdir() if path.name.startswith("out.")]
    sha = hashlib.sha256(out.read_bytes()).hexdigest()
    out.unlink()
    return sha


def run(argv: list[str], seed: int, threads: int, folder: Path) -> None:
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [sys.executable, "-m", "onnxcompress.cli.main", *(word.format(seed=seed) for word in argv)]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | counts, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}\n{done.stderr}")


@click.command(help=(__doc__ or "").split("\n", maxsplit=1)[0])
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--threads", default="1,2", show_default=True)
@click.option("--runs", default=2, show_default=True)
@click.option("--only", default=",".join(COMMANDS), show_default=True)
def main(seeds: str, threads: str, runs: int, only: str) -> None:
    click.echo(f"{'':14}{'seed':>5}  different files: in all, with each number of threads")
    for name in only.split(","):
        for seed in map(int, seeds.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                found = {
                    count: {made(name, seed, count, Path(folder)) for _ in range(runs)}
                    for count in map(int, threads.split(","))
                }
            each = ", ".join(f"{count} threads: {len(files)}" for count, files in found.items())
            click.echo(f"{name:14}{seed:5}  {len(set().union(*found.values()))}; {each}")


if __name__ == "__main__":
    main()
