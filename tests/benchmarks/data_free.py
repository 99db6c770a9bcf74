"""Figures of drop-blocks without data: source x network x accuracy x time, and how synthetic scores rank.

    python tests/benchmarks/data_free.py accuracy MODEL TEST --preprocess TEXT --blocks 8 [--train IMAGES]
    python tests/benchmarks/data_free.py ranks    MODEL TRAIN --preprocess TEXT

`accuracy` runs whole commands: drop-blocks, with images of TRAIN (if given) and with each source that
needs none, then evaluate. `folded` is the same network with BatchNorm folded and no record, as exporters
leave it. With `--split N`, N images of TEST (balanced) tune and the others test. `ranks` compares the
recoverabilities of all blocks by synthetic inputs with those by real ones (Spearman).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SOURCES = "images,distilled,procedural,layerwise,folded"


@click.group()
def cli() -> None:
    """Figures of drop-blocks without data."""


@cli.command()
@click.argument("model")
@click.argument("test")
@click.option("--preprocess", required=True)
@click.option("--blocks", default="8")
@click.option("--train", help="Real images, for the source `images`.")
@click.option("--split", type=int, help="Tune with this many of TEST, test on the others.")
@click.option("--count", default=500, help="Images of each source.")
@click.option("--sources", default=SOURCES)
@click.option("--seeds", default="0")
@click.argument("options", nargs=-1)
def accuracy(
    model: str,
    test: str,
    preprocess: str,
    blocks: str,
    train: str | None,
    split: int | None,
    count: int,
    sources: str,
    seeds: str,
    options: tuple[str, ...],
) -> None:
    """Top-1 on TEST after dropping blocks with each source; whole commands, timed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if split is not None:
            train, test = _split(test, preprocess, split, folder)
        _row("original", _top1(model, test, preprocess), None, {})
        for source in sources.split(","):
            if source == "images" and train is None:
                continue
            found, spent = [], []
            for seed in seeds.split(","):
                given = _folded(model, folder) if source == "folded" else model
                kind = "procedural" if source == "folded" else source
                chosen = ["--inputs", kind, "--preprocess", preprocess, "--synthetic", str(count)]
                if source == "images":
                    chosen = ["--images", str(train), "--preprocess", preprocess]
                    chosen += [] if split else ["--count", str(count)]
                out = str(folder / "out.onnx")
                start = time.perf_counter()
                result = _command(
                    "drop-blocks", given, out, "--blocks", blocks, "--seed", seed, *chosen, *options
                )
                spent.append(time.perf_counter() - start)
                found.append(_top1(out, test, preprocess))
                _row(f"{source}, seed {seed}", found[-1], spent[-1], result["measured"])
            if len(found) > 1:
                _row(f"{source}, mean of {len(found)}", float(np.mean(found)), float(np.mean(spent)), {})


@cli.command()
@click.argument("model")
@click.argument("train")
@click.option("--preprocess", required=True)
@click.option("--count", default=128)
@click.option("--sources", default="distilled,procedural,layerwise")
def ranks(model: str, train: str, preprocess: str, count: int, sources: str) -> None:
    """Rank correlation of R by synthetic inputs with R by real images."""
    from scipy.stats import spearmanr

    shared = ["--blocks", "1", "--steps", "0", "--preprocess", preprocess]
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for source in ["images", *sources.split(",")]:
            given = ["--inputs", source, "--synthetic", str(count)]
            if source == "images":
                given = ["--images", train, "--count", str(count)]
            result = _command("drop-blocks", model, f"{name}/{source}.onnx", *shared, *given)
            rows[source] = [row["recoverability"] for row in result["measured"]["blocks"]]
            print(
                f"{source}: rank correlation {spearmanr(rows['images'], rows[source])[0]:.3f}", flush=True
            )


def _row(name: str, top1: float, seconds: float | None, measured: dict[str, Any]) -> None:
    took = "" if seconds is None else f"{seconds:7.0f} s"
    stages = measured.get("seconds", {})
    made = f"  inputs made in {stages['inputs']:.0f} s" if "inputs" in stages else ""
    dropped = [row["name"] for row in measured.get("blocks", []) if row["dropped"]]
    print(f"{name:24} {100 * top1:6.2f} % {took}{made}  {' '.join(dropped)}", flush=True)


def _folded(model: str, folder: Path) -> str:
    """The model with BatchNorm folded and its record removed."""
    from onnxcompress.model import load, save
    from onnxcompress.passes.fold_bn import FoldBatchNorm
    from onnxcompress.statistics import record

    network = load(model)
    FoldBatchNorm().apply(network)
    record.write_record(network, {})
    target = folder / "folded.onnx"
    save(network, target)
    return str(target)


def _split(test: str, preprocess: str, count: int, folder: Path) -> tuple[str, str]:
    """TEST as two .npz files: `count` images to tune with, and the others."""
    from onnxcompress.data.image_set import load_images
    from onnxcompress.data.preprocess import Preprocess

    parsed = Preprocess.parse(preprocess)
    everything = load_images(test, preprocess=parsed, labels=True)
    chosen = set(load_images(test, preprocess=parsed, count=count, seed=0).names)
    own = np.array([name in chosen for name in everything.names])
    assert everything.y is not None
    for name, mask in (("tune", own), ("test", ~own)):
        np.savez(folder / f"{name}.npz", x=everything.x[mask], y=everything.y[mask])
    return str(folder / "tune.npz"), str(folder / "test.npz")


def _top1(model: str, test: str, preprocess: str) -> float:
    return float(_command("evaluate", model, "--images", test, "--preprocess", preprocess)["top1"])


def _command(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "onnxcompress.cli.main", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    cli()
