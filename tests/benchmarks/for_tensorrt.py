"""Accuracy of int8 over float16 in one file, as TensorRT 11 takes it, beside that of W8A8 alone.

    python tests/benchmarks/for_tensorrt.py NETWORK TRAIN TEST --preprocess TEXT

TRAIN and TEST may be the same: images that were learned from are not judged by. Rows: the network;
`quantize`; `quantize --for tensorrt`; the same and `fp16`, with what its file breaks of the rules of strong
typing (`tests/helpers/strong_typing.py`). All of it runs in onnxruntime on the CPU. Agreement: the share of
images that keep the float network's class.
"""

from __future__ import annotations

import click
import numpy as np
import onnxruntime as ort

from onnxcompress.data.image_set import load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.evaluation.accuracy import agreement, logits, topk
from onnxcompress.model import load
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.quantize import Quantize
from tests.helpers.strong_typing import violations

BATCH = 50


@click.command()
@click.argument("network")
@click.argument("train")
@click.argument("test")
@click.option("--preprocess", required=True)
@click.option("--count", default=128, show_default=True, help="Images of TRAIN to learn from.")
@click.option("--judged", default=2000, show_default=True, help="Images of TEST to judge by.")
@click.option("--effort", default="fast", show_default=True)
def main(
    network: str, train: str, test: str, preprocess: str, count: int, judged: int, effort: str
) -> None:
    parsed = Preprocess.parse(preprocess)
    images = load_images(test, preprocess=parsed, labels=True)
    if train == test:  # drawn as the passes draw them
        taken = set(load_images(train, preprocess=parsed, count=count, seed=0).names)
        images = images.take([i for i, name in enumerate(images.names) if name not in taken])
    images = images.spread(judged)
    labels = np.asarray(images.y)
    learn = {"images": train, "preprocess": preprocess, "count": count, "effort": effort}
    exact = logits(network, images, provider="cpu")

    def row(name: str, scores: np.ndarray, broken: str = "") -> None:
        top1, same = topk(scores, labels)[0], agreement(exact, scores)
        click.echo(f"{name:22}{100 * top1:7.2f} %, agreement {100 * same:6.2f} %{broken}")

    plain, chosen = load(network), load(network)
    row("float", exact)
    Quantize(**learn).apply(plain)  # type: ignore[arg-type]
    row("W8A8", logits(plain, images, provider="cpu"))
    Quantize(for_runtime="tensorrt", **learn).apply(chosen)  # type: ignore[arg-type]
    row("W8A8 --for tensorrt", logits(chosen, images, provider="cpu"))
    HalfPrecision(images=train, preprocess=preprocess, count=count, provider="cpu").apply(chosen)
    proto = chosen.to_proto()
    broken = violations(proto)
    opened = ort.InferenceSession(  # that optimizer computes something else (`passes.fp16.quantized`)
        proto.SerializeToString(),
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["WeightBiasQuantization"],
    )
    name = opened.get_inputs()[0].name
    scores = np.concatenate([opened.run(None, {name: x})[0] for x in images.batches(BATCH)])
    row("int8 over float16", scores, f", {len(broken)} rules broken {broken[:3]}")


if __name__ == "__main__":
    main()
