"""Figures of drop-channels: accuracy against measured latency, beside blocks and channels by magnitude.

    python tests/benchmarks/channels.py MODEL TRAIN.npz TEST.npz --preprocess TEXT --reductions 20,30

For each reduction of the latency it runs whole commands with the same images, fine-tuning and seed:
`drop-channels`, the same with `--criterion magnitude`, and `drop-blocks`. Then all results are timed
against the original, interleaved in one measurement. It prints a table, and writes the plot where --plot
names a file. With `--made` nothing is learned from TRAIN: the inputs are made.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

KINDS: Mapping[str, Sequence[str]] = {
    "channels": ("drop-channels",),
    "magnitude": ("drop-channels", "--criterion", "magnitude"),
    "blocks": ("drop-blocks",),
}
"""Row -> command with its options."""


@dataclass(frozen=True)
class Row:
    """A network of the table."""

    kind: str
    asked: float
    """Percent of the latency."""
    top1: float
    """Percent."""
    file: Path
    seconds: float
    """Of the whole command."""


@click.command()
@click.argument("model")
@click.argument("train")
@click.argument("test")
@click.option("--preprocess", required=True)
@click.option("--reductions", default="20,30", help="Percent of the latency.")
@click.option("--kinds", default=",".join(KINDS))
@click.option("--count", default=500)
@click.option("--made", is_flag=True, help="Learn from made inputs instead of TRAIN.")
@click.option("--plot", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1)
def cli(
    model: str,
    train: str,
    test: str,
    preprocess: str,
    reductions: str,
    kinds: str,
    count: int,
    made: bool,
    plot: Path | None,
    options: tuple[str, ...],
) -> None:
    """Accuracy on TEST against measured latency; OPTIONS go to every command (behind --)."""
    learned = [] if made else ["--images", train, "--count", str(count)]
    judged = ["--images", test, "--preprocess", preprocess, "--json"]
    whole = 100 * _json(["evaluate", model, *judged])["top1"]
    print(f"{Path(model).name}: {whole:.2f} %", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for asked in reductions.split(","):
            for kind in kinds.split(","):
                file = Path(folder) / f"{kind}-{asked}.onnx"
                command = [
                    KINDS[kind][0],
                    model,
                    str(file),
                    *KINDS[kind][1:],
                    *learned,
                    "--force",
                    "--json",
                ]
                command += [
                    "--preprocess",
                    preprocess,
                    "--latency-reduction",
                    asked,
                    "--no-cache",
                    *options,
                ]
                start = time.perf_counter()
                measured = _json(command)["measured"]
                seconds = time.perf_counter() - start
                top1 = 100 * _json(["evaluate", str(file), *judged])["top1"]
                rows.append(Row(kind, float(asked), top1, file, seconds))
                saved = 100 * (1 - measured["latency"]["ratio"])
                print(
                    f"{kind}, {asked} %: {top1:.2f} %, latency {saved:.1f} % less, {seconds:.0f} s",
                    flush=True,
                )
        _show(model, whole, rows, plot)


def _show(model: str, whole: float, rows: Sequence[Row], plot: Path | None) -> None:
    """Time all networks together, and print the table."""
    from onnxcompress.model import load
    from onnxcompress.runtime.block_latency import Stopwatch

    stopwatch = Stopwatch("cpu")
    saved = stopwatch.savings(load(model), {row.file.stem: load(row.file) for row in rows})
    print(f"all timed together, by the {stopwatch.clock} clock:")
    print("| | asked | latency in onnxruntime | 95 % interval | accuracy | lost | whole command |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        share, low, high = (100 * value for value in saved[row.file.stem])
        print(
            f"| {row.kind} | {row.asked:g} % | {-share:.1f} % | {-high:.1f} to {-low:.1f} % | "
            f"{row.top1:.2f} % | {whole - row.top1:.2f} | {row.seconds:.0f} s |"
        )
    if plot is not None:
        _plot(plot, whole, [(row.kind, 100 * saved[row.file.stem].value, row.top1) for row in rows])


def _plot(file: Path, whole: float, points: Sequence[tuple[str, float, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for kind in dict.fromkeys(kind for kind, _, _ in points):
        own = sorted([(0.0, whole), *((x, y) for k, x, y in points if k == kind)])
        plt.plot(*zip(*own, strict=True), marker="o", label=kind)
    plt.xlabel("latency saved in onnxruntime, %")
    plt.ylabel("accuracy, %")
    plt.legend()
    plt.savefig(file, bbox_inches="tight")


def _json(command: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "onnxcompress.cli.main", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 3):  # 3: the target is missed, which the table shows
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    cli()
