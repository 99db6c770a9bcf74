"""Figures of quantize: accuracy without data against onnxruntime's static quantization with real images.

    python tests/benchmarks/quantize.py accuracy MODEL TEST --preprocess TEXT [--calibration IMAGES]
    python tests/benchmarks/quantize.py latency MODEL --preprocess TEXT

`accuracy` quantizes MODEL without data for each pair of bits (weights/activations; 32: floats), and
measures top-1 on TEST as onnxruntime runs the file. The peer is onnxruntime's quantize_static (QDQ, MinMax,
per tensor and per channel, BatchNorm folded), calibrated on --calibration, or with --split N on N images of
TEST (drawn with the seed, balanced), which are then not tested on. `latency` times the 8-bit file.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@click.group()
def cli() -> None:
    """Figures of quantize."""


@cli.command()
@click.argument("model")
@click.argument("test")
@click.option("--preprocess", required=True)
@click.option("--bits", default="8/8,6/6,5/5,4/4,4/32")
@click.option("--calibration", help="Real images, for onnxruntime's static quantization.")
@click.option("--split", type=int, help="Calibrate with this many of TEST, test on the others.")
@click.option("--count", default=128, help="Images to calibrate with.")
@click.option("--inputs", default=None, help="Of quantize; default: its own.")
@click.option("--synthetic", type=int, default=None, help="Of quantize; default: its own.")
@click.option("--effort", default=None, help="Of quantize; default: its own.")
@click.option("--steps", type=int, default=None, help="Of quantize; default: its own.")
@click.option("--per-tensor", is_flag=True, help="Also 8/8 with one scale per weight.")
@click.option("--limit", type=int, help="Test on this many images only.")
@click.option("--real", is_flag=True, help="quantize learns from the images of --split, too.")
@click.option("--peer/--no-peer", default=True, help="Also onnxruntime's, where it has images.")
@click.option("--seed", default=0)
def accuracy(
    model: str,
    test: str,
    preprocess: str,
    bits: str,
    calibration: str | None,
    split: int | None,
    count: int,
    inputs: str | None,
    synthetic: int | None,
    effort: str | None,
    steps: int | None,
    per_tensor: bool,
    limit: int | None,
    real: bool,
    peer: bool,
    seed: int,
) -> None:
    """Top-1 on TEST for each number of bits, and of onnxruntime with real images."""
    from onnxcompress.data.image_set import load_images
    from onnxcompress.data.preprocess import Preprocess

    parsed = Preprocess.parse(preprocess)
    images = load_images(test, preprocess=parsed, labels=True)
    learned = (
        None if calibration is None else load_images(calibration, preprocess=parsed, count=count, seed=seed)
    )
    if split is not None:
        learned = load_images(test, preprocess=parsed, count=split, seed=seed)
        taken = set(learned.names)
        images = images.take([i for i, name in enumerate(images.names) if name not in taken])
    if limit is not None:
        images = images.take(np.random.default_rng(seed).permutation(len(images))[:limit])
    exact = _row("float", model, images, None, None)
    options: dict[str, Any] = {"preprocess": preprocess, "seed": seed}
    asked = {"inputs": inputs, "synthetic": synthetic, "effort": effort, "steps": steps}
    options |= {name: value for name, value in asked.items() if value is not None}
    options |= {"images": test, "count": split} if real else {}
    with tempfile.TemporaryDirectory() as folder:
        if learned is not None and peer:
            for per_channel in (False, True):
                start = time.perf_counter()
                onnxruntime_static(model, f"{folder}/peer.onnx", learned.array(), per_channel)
                name = f"onnxruntime W8A8 {'per channel' if per_channel else 'per tensor'}"
                _row(name, f"{folder}/peer.onnx", images, exact, time.perf_counter() - start)
        chosen = [(*map(int, pair.split("/")), True) for pair in bits.split(",") if pair]
        for weight, activation, whole in chosen + ([(8, 8, False)] if per_tensor else []):
            own = {"weight_bits": weight, "activation_bits": activation % 32, "per_channel": whole}
            start = time.perf_counter()
            measured = quantized(model, f"{folder}/own.onnx", options | own)
            name = f"W{weight}A{activation}{'' if whole else ' per tensor'}"
            seconds = time.perf_counter() - start
            _row(name, f"{folder}/own.onnx", images, exact, seconds, _account(measured))


@cli.command()
@click.argument("model")
@click.option("--preprocess", required=True)
@click.option("--batch", default=1)
@click.option("--threads", default=0)
@click.option("--seconds", default=20.0)
def latency(model: str, preprocess: str, batch: int, threads: int, seconds: float) -> None:
    """W8A8 against MODEL in onnxruntime on the CPU, interleaved."""
    from onnxcompress.runtime.latency import benchmark, ratio

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/own.onnx"
        quantized(model, file, {"preprocess": preprocess, "inputs": "procedural", "synthetic": 16})
        timed = benchmark(
            {"float": model, "W8A8": file}, provider="cpu", batch=batch, threads=threads, seconds=seconds
        )
    share = ratio(timed["float"], timed["W8A8"])
    for name, one in timed.items():
        print(f"{name:8} median {one.median_ms:7.2f} ms  least {one.min_ms:7.2f} ms  {one.runs} runs")
    print(f"W8A8 / float: {share.value:.3f} (95 % interval {share.low:.3f} to {share.high:.3f})")


def quantized(model: str, target: str, options: dict[str, Any]) -> dict[str, Any]:
    from onnxcompress.model import load, save
    from onnxcompress.passes.base import run
    from onnxcompress.passes.quantize import Quantize

    network = load(model)
    (result,) = run([Quantize(**options)], network)
    save(network, target)
    return result.measured_json()


def _account(measured: dict[str, Any]) -> str:
    seconds = measured["seconds"]
    used = ", ".join(f"{u['count']} {u['source']}" for u in measured["inputs"])
    tuning, outcome = seconds.get("tuning"), measured.get("tuning")
    tuned = ""
    if tuning is not None and outcome is not None:
        before, after = outcome["error_before"] ** 0.5, outcome["error"] ** 0.5
        tuned = f", tuning {tuning:.0f} s: error {before:.3f} to {after:.3f} on {outcome['held_out']} aside"
    fused = sum(measured["runtime"]["fused"].values())
    return (
        f"{used}; inputs {seconds['inputs']:.0f} s, layers {seconds['layers']:.0f} s{tuned}; {fused} fused"
    )


def _row(
    name: str, model: str, images: Any, exact: Any, seconds: float | None, account: str = ""
) -> np.ndarray:
    from onnxcompress.evaluation.accuracy import agreement, logits, topk

    scores = logits(model, images, provider="cpu")
    top1 = 100 * topk(scores, images.y)[0]
    text = f"{name:32} {top1:6.2f} %"
    if exact is not None:
        drop = 100 * topk(exact, images.y)[0] - top1
        text += f"  drop {drop:6.2f}  agreement {100 * agreement(exact, scores):6.2f} %"
    took = "" if seconds is None else f"  {seconds:5.0f} s"
    print(f"{text}{took}  {Path(model).stat().st_size / 1e6:.2f} MB  {account}", flush=True)
    return scores


def onnxruntime_static(model: str, target: str, images: np.ndarray, per_channel: bool) -> None:
    """onnxruntime's static quantization, on the network with BatchNorm folded."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    from onnxcompress.model import load, save
    from onnxcompress.passes.fold_bn import FoldBatchNorm

    logging.disable(logging.WARNING)
    network = load(model)
    FoldBatchNorm().apply(network)
    name = network.graph.inputs[0].name
    save(network, f"{target}.float.onnx")

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            one = next(self.left, None)
            return None if one is None else {name: one[None]}

    quantize_static(
        f"{target}.float.onnx",
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


if __name__ == "__main__":
    cli()
