"""Figures of drop-blocks: scoring against the published procedure, and accuracy by blocks dropped.

    python tests/benchmarks/drop_blocks.py scoring  MODEL TRAIN.npz --preprocess TEXT
    python tests/benchmarks/drop_blocks.py accuracy MODEL TRAIN.npz TEST.npz --preprocess TEXT
    python tests/benchmarks/drop_blocks.py tuning   MODEL TRAIN.npz TEST.npz --preprocess TEXT --drop NAME,…

`scoring` scores all blocks with this tool and with the published procedure (tests/benchmarks/practise.py)
in one run: seconds of each, and the rank correlation of R/τ, τ measured once for both. `accuracy` runs
whole commands, one for each number of blocks and seed. `tuning` drops the same blocks and learns from the
same images with this tool and with the published fine-tuning (tests/benchmarks/practise_finetuning.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from onnxcompress.model import Model


@click.group()
def cli() -> None:
    """Figures of drop-blocks."""


@cli.command()
@click.argument("model")
@click.argument("train")
@click.option("--preprocess", required=True)
@click.option("--count", default=500)
@click.option("--steps", default=60, help="Adapter steps a block of the published procedure.")
def scoring(model: str, train: str, preprocess: str, count: int, steps: int) -> None:
    """Seconds to score all blocks, and the rank correlation with the published score."""
    import torch
    from scipy.stats import spearmanr

    from onnxcompress.data.image_set import load_images
    from onnxcompress.data.preprocess import Preprocess
    from onnxcompress.graph.blocks import find_blocks
    from onnxcompress.graph.topology import Topology
    from onnxcompress.model import load
    from onnxcompress.optimize.block_drop.recoverability import SCORING_IMAGES, Scorer, probe
    from onnxcompress.optimize.executor import Executor
    from onnxcompress.passes.fold_bn import FoldBatchNorm
    from onnxcompress.runtime.block_latency import latency_shares, usable
    from tests.benchmarks.practise import published_recoverability

    network = load(model)
    FoldBatchNorm().apply(network)
    images = load_images(train, preprocess=Preprocess.parse(preprocess), count=count, seed=0)
    x = torch.from_numpy(images.array())
    source = network.graph.inputs[0].name
    start = time.perf_counter()
    found = find_blocks(network)
    shares = latency_shares(network, found.blocks)
    tau, noisy = usable(shares, found.blocks)
    latency_s = time.perf_counter() - start
    start = time.perf_counter()
    feature = Topology(network).feature()
    assert feature is not None
    executor = Executor.from_model(network)
    scorer = Scorer(
        network, found.blocks, probe(executor, x[:SCORING_IMAGES], source, feature.name), executor=executor
    )
    ours = {b.exit: scorer.recover(b).loss for b in found.blocks}
    plain = Scorer(network, found.blocks, scorer.probe, executor=executor, steps=0)
    ours_s = time.perf_counter() - start
    damage = {b.exit: plain.recover(b).loss for b in found.blocks}
    start = time.perf_counter()
    published = {
        b.exit: published_recoverability(network, b, x, source, feature.name, steps=steps)
        for b in found.blocks
    }
    published_s = time.perf_counter() - start
    for b in found.blocks:
        row = (ours[b.exit], damage[b.exit], published[b.exit], 100 * shares[b.exit].value)
        print("{:12} ours {:.4f}  plain {:.4f}  published {:.4f}  tau {:.2f} %".format(b.name, *row))
    exits = [b.exit for b in found.blocks]

    def rank(values: dict[str, float], divide: bool) -> float:
        a = [values[e] / (tau[e] if divide else 1) for e in exits]
        b = [published[e] / (tau[e] if divide else 1) for e in exits]
        return float(spearmanr(a, b)[0])

    print(f"latency shares: {latency_s:.1f} s, used by both{' (too noisy: by MACs)' if noisy else ''}")
    print(
        f"scoring {len(exits)} blocks: ours {ours_s:.1f} s, "
        f"published ({steps} steps a block) {published_s:.1f} s"
    )
    print(f"ours with latency: {ours_s + latency_s:.1f} s; ratio {published_s / (ours_s + latency_s):.1f}")
    print(
        f"rank correlation of R/tau with the published: {rank(ours, True):.3f} "
        f"(plain damage {rank(damage, True):.3f})"
    )
    print(f"rank correlation of R: {rank(ours, False):.3f} (plain damage {rank(damage, False):.3f})")


@cli.command()
@click.argument("model")
@click.argument("train")
@click.argument("test")
@click.option("--preprocess", required=True)
@click.option("--count", default=500)
@click.option("--blocks", default="4,8,12")
@click.option("--seeds", default="0,1,2")
@click.option(
    "--plain", is_flag=True, help="Choose by plain damage instead: errors without adapters, once."
)
@click.argument("options", nargs=-1)
def accuracy(
    model: str,
    train: str,
    test: str,
    preprocess: str,
    count: int,
    blocks: str,
    seeds: str,
    plain: bool,
    options: tuple[str, ...],
) -> None:
    """Top-1 on TEST after dropping blocks with images of TRAIN; whole commands, timed."""
    common = [sys.executable, "-m", "onnxcompress.cli.main"]
    for number in blocks.split(","):
        found: list[float] = []
        for seed in seeds.split(","):
            with tempfile.TemporaryDirectory() as folder:
                out = str(Path(folder) / "out.onnx")
                start, busy = time.perf_counter(), _processor_seconds()
                command = ["drop-blocks", model, out, "--images", train, "--preprocess", preprocess]
                command += ["--count", str(count), "--seed", seed, "--json", *options]
                if plain:
                    command += _plain(model, train, preprocess, count, seed, number)
                else:
                    command += ["--blocks", number]
                result = _json([*common, *command])
                seconds, busy = time.perf_counter() - start, _processor_seconds() - busy
                command = ["evaluate", out, "--images", test, "--preprocess", preprocess, "--json"]
                top1 = _json([*common, *command])["top1"]
            found.append(100 * top1)
            latency = result["measured"]["latency"]
            print(
                f"{number} blocks, seed {seed}: {100 * top1:.2f} %, {seconds:.0f} s ({busy:.0f} s of "
                f"processor time), latency "
                f"{100 * (1 - latency['ratio']):.1f} % less: "
                f"{' '.join(r['name'] for r in result['measured']['blocks'] if r['dropped'])}",
                flush=True,
            )
        print(
            f"{number} blocks, {count} images: mean {np.mean(found):.2f} % of {len(found)} seeds",
            flush=True,
        )


@cli.command()
@click.argument("model")
@click.argument("train")
@click.argument("test")
@click.option("--preprocess", required=True)
@click.option("--drop", required=True, multiple=True, help="Blocks to drop, with commas; several times.")
@click.option("--count", default=500)
@click.option("--tested", type=int, help="Test on images of TEST that this --count leaves out.")
@click.option("--steps", default=300)
@click.option("--seeds", default="0")
@click.option("--own-steps", help="Steps of this tool, with commas; default: 0 and --steps.")
@click.option("--size", type=int, help="Side of the input, where the graph allows another than its own.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where both are tuned.")
@click.option("--provider", default="cpu", help="Where results run.")
def tuning(
    model: str,
    train: str,
    test: str,
    preprocess: str,
    drop: tuple[str, ...],
    count: int,
    tested: int | None,
    steps: int,
    seeds: str,
    own_steps: str | None,
    size: int | None,
    device: Literal["cpu", "cuda"],
    provider: str,
) -> None:
    """Top-1, agreement with the float network, seconds: this tool and the published fine-tuning.

    Seconds are processor time on a CPU, and wall time on a GPU, where the processor mostly waits.
    """
    import torch

    from onnxcompress.data.image_set import load_images
    from onnxcompress.data.preprocess import Preprocess
    from onnxcompress.evaluation.accuracy import agreement, logits, topk
    from onnxcompress.model import load
    from onnxcompress.passes.drop_blocks import DropBlocks
    from tests.benchmarks.practise_finetuning import published_finetuning

    how = Preprocess.parse(preprocess)
    network = load(model) if size is None else _resized(model, size)
    clock = time.process_time if device == "cpu" else time.perf_counter
    ours_steps = [0, steps] if own_steps is None else [int(given) for given in own_steps.split(",")]

    def show(what: str, result: Model, seconds: float, note: str = "") -> None:
        scores = logits(result, judges, provider=provider)
        right, same = 100 * topk(scores, np.asarray(judges.y))[0], 100 * agreement(exact, scores)
        print(f"  {what:30} {right:6.2f} {same:6.2f} {seconds:6.1f} {note}", flush=True)

    for seed in map(int, seeds.split(",")):
        judged = None if tested is None else count
        judges = load_images(test, preprocess=how, seed=seed, count=judged, left_out=tested, labels=True)
        exact = logits(network, judges, provider=provider)
        images = load_images(train, preprocess=how, count=count, seed=seed)
        x = torch.from_numpy(images.array()).to(device)
        print(f"seed {seed}, {len(judges)} images: top-1 %, agreement %, seconds")
        show("float", network, 0.0)
        for names in drop:
            print(f" without {names}")
            if steps:
                start = clock()
                tuned = published_finetuning(
                    network, names.split(","), x, steps=steps, seed=seed, device=device
                )
                show(f"published, {steps} steps", tuned, clock() - start)
            for own in ours_steps:
                start, ours = clock(), network.copy()
                options = DropBlocks(
                    drop=tuple(names.split(",")), images=train, preprocess=preprocess, count=count,
                    steps=own, seed=seed, provider=provider, device=device,
                )  # fmt: skip
                figures = options.apply(ours).measured
                kept = figures.tuning.kept_step if figures.tuning else 0
                note = f"step {kept} kept, feature error {figures.feature_error:.4f}, "
                note += f"latency {-100 * figures.latency.saved.value:+.1f} %"
                show(f"this tool, {own} steps", ours, clock() - start, note)


def _resized(path: str, side: int) -> Model:
    """The network for square images of another size."""
    import onnx

    from onnxcompress.model import Model

    proto = onnx.load(path)
    for place in (2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[place].dim_value = side
    del proto.graph.value_info[:]
    return Model.from_proto(proto)


def _plain(model: str, train: str, preprocess: str, count: int, seed: str, number: str) -> list[str]:
    """--drop with the blocks whose lack alone, nothing adapted, damages the features least."""
    import torch

    from onnxcompress.data.image_set import load_images
    from onnxcompress.data.preprocess import Preprocess
    from onnxcompress.graph.blocks import find_blocks
    from onnxcompress.graph.topology import Topology
    from onnxcompress.model import load
    from onnxcompress.optimize.block_drop.recoverability import Scorer, probe
    from onnxcompress.optimize.executor import Executor
    from onnxcompress.passes.fold_bn import FoldBatchNorm

    network = load(model)
    FoldBatchNorm().apply(network)
    blocks = find_blocks(network).blocks
    images = load_images(train, preprocess=Preprocess.parse(preprocess), count=count, seed=int(seed))
    feature = Topology(network).feature()
    assert feature is not None
    executor = Executor.from_model(network)
    x = torch.from_numpy(images.array())
    source = network.graph.inputs[0].name
    scorer = Scorer(network, blocks, probe(executor, x, source, feature.name), executor=executor, steps=0)
    damage = {b.name: scorer.recover(b).loss for b in blocks}
    return ["--drop", ",".join(sorted(damage, key=lambda name: damage[name])[: int(number)])]


def _processor_seconds() -> float:
    """Processor time of all commands that ended."""
    return sum(os.times()[2:4])


def _json(command: list[str]) -> dict[str, Any]:
    import json

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    cli()
