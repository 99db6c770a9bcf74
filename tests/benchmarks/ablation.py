"""What each part of quantize is worth: top-1 lost and signal to noise without it, in one run.

    python tests/benchmarks/ablation.py MODEL TEST --preprocess TEXT [--bits 4/4] [--per-tensor] [--limit N]

The rows of the published recipes round to nearest: with and without equalization (`equalize`), high-bias
absorption (`absorb-bias --approximate`) and bias correction (`correct-bias`, by the record). The rest are
`quantize`, whole, without one of its parts, and on other inputs: white noise (each pixel on its own, no
record), dead leaves (coloured, no record), dead leaves through the alignment with the recorded statistics
(layerwise), distilled images. Numbers are of TEST as onnxruntime runs the files.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

NEAREST: dict[str, Any] = {"stretch": False, "reconstruct": False, "inputs": "layerwise"}
PUBLISHED: dict[str, tuple[Sequence[str], bool]] = {
    "nearest": ((), False),
    "nearest, corrected": ((), True),
    "equalized, nearest": (("equalize",), False),
    "equalized, nearest, corrected": (("equalize",), True),
    "equalized, absorbed, nearest": (("equalize", "absorb"), False),
    "equalized, absorbed, nearest, corrected": (("equalize", "absorb"), True),
}
"""Row -> passes before rounding, and whether biases are corrected after it."""
OWN: dict[str, dict[str, Any]] = {
    "quantize": {},
    "without channel ranges": {"stretch": False},
    "without reconstruction": {"reconstruct": False},
    "with ranges from the ends seen": {"ranges": "minmax"},
    "inputs: white noise": {"inputs": "images"},
    "inputs: procedural": {"inputs": "procedural"},
    "inputs: layerwise": {"inputs": "layerwise"},
    "inputs: distilled": {"inputs": "distilled"},
}


@click.command()
@click.argument("model")
@click.argument("test")
@click.option("--preprocess", required=True)
@click.option("--bits", default="4/4", help="Weights/activations; 32: floats.")
@click.option("--per-tensor", is_flag=True, help="One scale per weight.")
@click.option("--split", type=int, help="Leave out this many of TEST, those that `quantize.py` tunes with.")
@click.option("--limit", type=int, help="Test on this many images only.")
@click.option("--rows", default="", help="Only rows with one of these in their name, separated by commas.")
@click.option("--seed", default=0)
def main(
    model: str,
    test: str,
    preprocess: str,
    bits: str,
    per_tensor: bool,
    split: int | None,
    limit: int | None,
    rows: str,
    seed: int,
) -> None:
    """One row for each part that is left out."""
    from onnxcompress.evaluation.accuracy import logits, topk
    from onnxcompress.model import load
    from tests.benchmarks.prune import labelled_images

    images = labelled_images(test, preprocess, split, "test", limit, seed)
    exact = logits(load(model), images, provider="cpu")
    right = 100 * topk(exact, images.y)[0]
    print(f"{'float':40} {right:6.2f} % of {len(images)} images", flush=True)
    weights, activations = (int(part) for part in bits.split("/"))
    options = {"preprocess": preprocess, "seed": seed, "per_channel": not per_tensor}
    options |= {"weight_bits": weights, "activation_bits": activations % 32}
    wanted = [part.strip() for part in rows.split(",") if part]
    with tempfile.TemporaryDirectory() as folder:
        for name in [*PUBLISHED, *OWN]:
            if wanted and not any(part in name for part in wanted):
                continue
            if name in PUBLISHED:
                network = _published(model, folder, options | NEAREST, *PUBLISHED[name])
            else:
                network = _own(model, folder, options | OWN[name])
            found = logits(network, images, provider="cpu")
            snr = 10 * np.log10(exact.var() / np.square(found - exact).mean())
            lost = right - 100 * topk(found, images.y)[0]
            print(f"{name:40} lost {lost:6.2f}   {snr:6.2f} dB", flush=True)


def _published(
    model: str, folder: str, options: dict[str, Any], before: Sequence[str], corrected: bool
) -> Any:
    from onnxcompress.model import load, save
    from onnxcompress.passes.absorb_bias import AbsorbBias
    from onnxcompress.passes.base import run
    from onnxcompress.passes.correct_bias import CorrectBias
    from onnxcompress.passes.equalize import Equalize
    from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
    from onnxcompress.passes.quantize import Quantize

    network = load(model)
    fold_and_canonicalize(network)
    made = {"equalize": Equalize(clip="per-channel"), "absorb": AbsorbBias(approximate=True)}
    run([made[name] for name in before], network)
    save(network, f"{folder}/reference.onnx")
    run([Quantize(**options)], network)
    if corrected:
        run([CorrectBias(reference=f"{folder}/reference.onnx")], network)
    return network


def _own(model: str, folder: str, options: dict[str, Any]) -> Any:
    from onnxcompress.model import load
    from onnxcompress.passes.base import run
    from onnxcompress.passes.quantize import Quantize

    network = load(model)
    if options.get("inputs") == "images":
        options = options | {"images": _white(network, folder)}
    run([Quantize(**options)], network)
    return network


def _white(network: Any, folder: str) -> str:
    """Pixels of white noise about mid-grey, in an .npz."""
    channels, height, width = network.graph.inputs[0].shape[1:]
    noise = np.random.default_rng(0).normal(115, 64, (128, height, width, channels))
    np.savez(f"{folder}/white.npz", x=noise.clip(0, 255).astype(np.uint8))
    return f"{folder}/white.npz"


if __name__ == "__main__":
    main()
