"""Figures of prune: accuracy without data against one-shot magnitude pruning of the same network.

    python tests/benchmarks/prune.py MODEL TEST --preprocess TEXT [--split N --part tune|test]
                                     [--images DIR|NPZ|tune --count N]

Top-1 on TEST as onnxruntime runs the files, and how far their classes' probabilities (a softmax of the
output) are from the float network's, for each of --sparsities (prune) and --peers (magnitude pruning
of the network as it is in the file, BatchNorm kept: the smallest of all weights, and of each layer), and
for 2:4. The sparsity at one point lost is the largest where the curve, linear between what was measured,
has lost no more; the ratio is that of the weights that magnitude pruning must keep (the better of both) to
those that prune keeps. All sparsities count the weights of all linear layers.

With --split N, `tune` takes N images of TEST (drawn with the seed, balanced), `test` the others; with
--images tune, prune has the images of that part, else those of --images, if any.
"""

from __future__ import annotations

import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

LOST = 1.0
"""Points."""

Curve = list[tuple[float, float]]
"""(sparsity, points lost), the unpruned network first."""


@click.command()
@click.argument("model")
@click.argument("test")
@click.option("--preprocess", required=True)
@click.option("--sparsities", default="0.5,0.55,0.6,0.65,0.7,0.75,0.8")
@click.option("--peers", default="0.2,0.25,0.3,0.35,0.4,0.45,0.5,0.55,0.6")
@click.option("--scope", type=click.Choice(["global", "layer"]), default="global")
@click.option("--pattern", default="2:4", help="Also measured; '' for none.")
@click.option("--inputs", default="auto", help="Of prune.")
@click.option("--synthetic", type=int, default=None, help="Of prune.")
@click.option("--images", help="Of prune; with --split, `tune`: those of that part.")
@click.option("--count", type=int, default=None, help="Of prune.")
@click.option("--depthwise", is_flag=True, help="Of prune.")
@click.option("--split", type=int, help="Images of TEST to tune with.")
@click.option("--part", type=click.Choice(["tune", "test"]), default="test")
@click.option("--limit", type=int, help="Test on this many images only.")
@click.option("--threads", default=0, help="Of onnxruntime.")
@click.option("--seed", default=0)
def main(
    model: str,
    test: str,
    preprocess: str,
    sparsities: str,
    peers: str,
    pattern: str,
    split: int | None,
    part: str,
    limit: int | None,
    threads: int,
    seed: int,
    **options: Any,
) -> None:
    """Accuracy over sparsities, the sparsity at one point lost, and the ratio to magnitude pruning."""
    from onnxcompress.evaluation.accuracy import agreement, logits, topk
    from onnxcompress.model import Model, load

    images = labelled_images(test, preprocess, split, part, limit, seed)
    network = load(model)
    exact = logits(network, images, provider="cpu", threads=threads)
    right = topk(exact, images.y)[0]
    print(f"{'float':24} {100 * right:6.2f} % of {len(images)} images", flush=True)

    def measured(name: str, share: float, one: Model, account: str = "") -> float:
        scores = logits(one, images, provider="cpu", threads=threads)
        lost = 100 * (right - topk(scores, images.y)[0])
        print(
            f"{name:24} sparsity {share:5.3f}  lost {lost:6.2f}  KL {divergence(exact, scores):.4f}  "
            f"agreement {100 * agreement(exact, scores):6.2f} %  {account}",
            flush=True,
        )
        return lost

    reached = {}
    for scope in ("global", "layer"):
        curve: Curve = [(0.0, 0.0)]
        for share in _shares(peers):
            pruned = _magnitude(network, share, scope)
            curve.append((share, measured(f"magnitude, {scope}", share, pruned)))
        reached[scope] = _at(curve)
    best = max(reached.values())
    print(f"magnitude pruning at {LOST} point lost: " + _text(reached), flush=True)
    options |= {"preprocess": preprocess, "seed": seed}
    curve = [(0.0, 0.0)]
    with tempfile.TemporaryDirectory() as folder:
        if options["images"] == "tune":
            if split is None:
                raise click.UsageError("--images tune needs --split: the others are tested on")
            tuned = labelled_images(test, preprocess, split, "tune", None, seed)
            options["images"] = f"{folder}/tune.npz"
            np.savez(options["images"], x=tuned.x)
        for share in _shares(sparsities):
            pruned, account = _pruned(network, options | {"sparsity": share})
            curve.append((share, measured("prune", share, pruned, account)))
        if len(curve) > 1:
            own = _at(curve)
            print(
                f"prune at {LOST} point lost: {own:.3f}; kept weights {(1 - best) / (1 - own):.2f} x fewer"
            )
        if pattern:
            pruned, account = _pruned(network, options | {"pattern": pattern})
            measured(f"prune {pattern}", float("nan"), pruned, account)


def labelled_images(
    test: str, preprocess: str, split: int | None, part: str, limit: int | None, seed: int
) -> Any:
    """TEST, or with `split` one part of it, N images to tune with or the others."""
    from onnxcompress.data.image_set import load_images
    from onnxcompress.data.preprocess import Preprocess

    parsed = Preprocess.parse(preprocess)
    images = load_images(test, preprocess=parsed, labels=True)
    if split is not None:
        tuned = load_images(test, preprocess=parsed, labels=True, count=split, seed=seed)
        taken = set(tuned.names)
        rest = [i for i, name in enumerate(images.names) if name not in taken]
        images = tuned if part == "tune" else images.take(rest)
    if limit is not None:
        images = images.take(np.random.default_rng(seed).permutation(len(images))[:limit])
    return images


def _shares(text: str) -> list[float]:
    return [float(share) for share in text.split(",") if share]


def _pruned(network: Any, options: dict[str, Any]) -> tuple[Any, str]:
    from onnxcompress.account import as_json
    from onnxcompress.passes.prune import Prune

    one, start = network.copy(), time.perf_counter()
    measured = Prune(**options).apply(one).measured
    assert measured is not None
    used = ", ".join(f"{u.count} {u.source}" for u in measured.inputs or ())
    sizes = ", ".join(f"{size / 1e6:.2f} MB {how}" for how, size in as_json(measured.bytes).items())
    seconds = time.perf_counter() - start
    return one, f"{measured.sparsity:.4f} zeros; {used}; {seconds:.0f} s; {sizes}"


def _magnitude(network: Any, share: float, scope: str) -> Any:
    """One shot, the weights as they are in the file."""
    from onnxcompress.graph.edit import set_values
    from onnxcompress.graph.query import read
    from onnxcompress.quantization.qdq_plan import Bits, make_plan

    one = network.copy()
    tensors = one.graph.tensors()
    names = [layer.linear.weight_name for layer in make_plan(one, Bits(8, None, None)).layers.values()]
    weights = {name: read(tensors[name]).copy() for name in names}
    together = np.concatenate([abs(w).reshape(-1) for w in weights.values()])
    for name, weight in weights.items():
        among = together if scope == "global" else abs(weight).reshape(-1)
        weight[abs(weight) < np.quantile(among, share)] = 0
        set_values(tensors[name], weight)
    one.touch()
    return one


def _at(curve: Curve) -> float:
    """The largest sparsity that loses no more than LOST."""
    found = 0.0
    for (a, lost_a), (b, lost_b) in pairwise(curve):
        if lost_b <= LOST:
            found = b
        elif lost_a <= LOST:
            found = a + (b - a) * (LOST - lost_a) / (lost_b - lost_a)
    return found


def _text(reached: dict[str, float]) -> str:
    return ", ".join(f"{scope} {share:.3f}" for scope, share in reached.items())


def divergence(exact: np.ndarray, scores: np.ndarray) -> float:
    """Kullback-Leibler divergence of the classes' probabilities, mean over images; nats."""
    import torch
    import torch.nn.functional as F

    p, q = (torch.from_numpy(one).double().log_softmax(1) for one in (exact, scores))
    return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))


if __name__ == "__main__":
    main()
