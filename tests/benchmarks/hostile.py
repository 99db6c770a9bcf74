"""Hostile files without end: mutated networks through every command; counts of what came of them.

    python tests/benchmarks/hostile.py [--cases 1000] [--seed 0] [--only inspect,fold-bn] [--keep DIR]

Columns: cases, exit code 0 (done), 1 to 3 (refused with one line), killed in native code (onnxruntime or
torch: outside of what is promised, see SECURITY.md), failed (a promise broken; each is shown). Case N of a
seed is the same file for every set of commands; files of failed cases go to DIR.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.robustness.hostile import mutate
from tests.robustness.hostile.harness import Seen, attempt
from tests.robustness.hostile.networks import TEXTS, network

MADE = ["--synthetic", "4"]
COMMANDS = {
    "inspect": ["inspect", "in.onnx", "--statistics"],
    "fold-bn": ["fold-bn", "in.onnx", "out.onnx", "--no-verify"],
    "equalize": ["equalize", "in.onnx", "out.onnx", "--no-verify"],
    "absorb-bias": ["absorb-bias", "in.onnx", "out.onnx"],
    "fold-bn-verified": ["fold-bn", "in.onnx", "out.onnx"],
    "correct-bias": ["correct-bias", "in.onnx", "out.onnx", "--reference", "good.onnx", *MADE],
    "calibrate": ["calibrate", "in.onnx", "out.onnx", *MADE],
    "drop-blocks": ["drop-blocks", "in.onnx", "out.onnx", "--blocks", "1", "--steps", "1", *MADE],
    "prune": ["prune", "in.onnx", "out.onnx", "--sparsity", "0.5", *MADE],
    "quantize": ["quantize", "in.onnx", "out.onnx", *MADE],
    "sensitivity": ["sensitivity", "in.onnx", *MADE],
    "synthesize": ["synthesize", "in.onnx", "out.npz", "--count", "4"],
    "compare": ["compare", "in.onnx", "good.onnx", "--runs", "1"],
    "benchmark": ["benchmark", "in.onnx", "--runs", "1"],
    "evaluate": ["evaluate", "in.onnx", "--images", "images.npz", "--preprocess", "unit"],
    "run": ["run", "recipe.yaml", "in.onnx", "out.onnx", "--no-cache"],
    "report": ["inspect", "in.onnx", "--report", "out.html"],
}
LOADED = ("torch", "onnxruntime", "onnxcompress.evaluation.compare", "onnxcompress.pipeline",
          "onnxcompress.optimize.block_drop.pipeline", "onnxcompress.passes.fold_bn",
          "onnxcompress.passes.equalize",
          "onnxcompress.passes.quantize",
          "onnxcompress.passes.prune", "onnxcompress.cli.execute", "onnxcompress.cli.console")  # fmt: skip
"""Imported once, before the forks."""


def case(seed: int, number: int) -> bytes:
    """The file of a case."""
    draw = random.Random(f"{seed}-{number}")
    kind = "fields garbled" if draw.random() < 0.5 else draw.choice(list(mutate.BYTES))
    return mutate.BYTES[kind](network(draw.choice(list(TEXTS))).SerializeToString(deterministic=True), draw)


def one(command: str, data: bytes) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "in.onnx").write_bytes(data)
        (work / "good.onnx").write_bytes(network("residual").SerializeToString())
        (work / "recipe.yaml").write_text("passes: [fold-bn, equalize]\n")
        np.savez(work / "images.npz", x=np.zeros((4, 8, 8, 3), np.uint8), y=np.zeros(4, np.int64))
        return attempt(COMMANDS[command], work)


@click.command(help=(__doc__ or "").split("\n", maxsplit=1)[0])
@click.option("--cases", default=1000, show_default=True, help="In all, one command each in turn.")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", default="", help="Commands. [default: all]")
@click.option("--keep", type=click.Path(file_okay=False), help="Where files of failed cases go.")
def main(cases: int, seed: int, only: str, keep: str | None) -> None:
    os.environ["ONNXCOMPRESS_TRACEBACK"] = "1"
    for name in LOADED:
        import_module(name)
    names = only.split(",") if only else list(COMMANDS)
    counts = {name: Counter[str]() for name in names}
    for number in range(cases):
        name = names[number % len(names)]
        seen = one(name, case(seed, number))
        kind = (
            "killed"
            if seen.killed
            else "failed"
            if seen.problem
            else "done"
            if seen.code == 0
            else "refused"
        )
        counts[name][kind] += 1
        if kind in ("failed", "killed"):
            click.echo(f"case {number}, {name}: {seen.problem}", err=True)
            if keep is not None:
                Path(keep).mkdir(parents=True, exist_ok=True)
                (Path(keep) / f"{seed}-{number}.onnx").write_bytes(case(seed, number))
                (Path(keep) / f"{seed}-{number}.txt").write_text(f"{COMMANDS[name]}\n{seen.said}")
    columns = ("done", "refused", "killed", "failed")
    click.echo(f"{'':20}{'cases':>7}" + "".join(f"{c:>9}" for c in columns))
    for name, found in [*counts.items(), ("all", sum(counts.values(), Counter[str]()))]:
        click.echo(f"{name:20}{found.total():7}" + "".join(f"{found[c]:9}" for c in columns))
    if sum(found["failed"] for found in counts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
