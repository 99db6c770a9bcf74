"""Accuracy of int8 over float16 in one file, as TensorRT 11 takes it, beside that of W8A8 alone.

    python tests/benchmarks/for_tensorrt.py NETWORK TRAIN TEST --preprocess TEXT

Rows: the network; `quantize`; `quantize --for tensorrt`; the same and `fp16`, with what its file breaks
of the rules of strong typing (`tests/helpers/strong_typing.py`). All of it runs in onnxruntime on the CPU.
"""

from __future__ import annotations

import click
import numpy as np
import onnxruntime as ort

from onnxcompress.data.image_set import load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.evaluation.accuracy import evaluate
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
    images = load_images(test, preprocess=Preprocess.parse(preprocess), labels=True, count=judged)
    learn = {"images": train, "preprocess": preprocess, "count": count, "effort": effort}

    def row(name: str, model: object, broken: str = "") -> None:
        found = evaluate(model, images, provider="cpu")  # type: ignore[arg-type]
        click.echo(f"{name:28}{100 * found.top1:7.2f} %  {broken}")

    plain, chosen = load(network), load(network)
    row("float", plain)
    Quantize(**learn).apply(plain)  # type: ignore[arg-type]
    row("W8A8", plain)
    Quantize(for_runtime="tensorrt", **learn).apply(chosen)  # type: ignore[arg-type]
    row("W8A8 --for tensorrt", chosen)
    HalfPrecision(images=train, preprocess=preprocess, provider="cpu").apply(chosen)
    proto = chosen.to_proto()
    broken = violations(proto)
    opened = ort.InferenceSession(  # that optimizer computes something else (`passes.fp16.quantized`)
        proto.SerializeToString(),
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["WeightBiasQuantization"],
    )
    right = [
        opened.run(None, {opened.get_inputs()[0].name: x})[0].argmax(-1) for x in images.batches(BATCH)
    ]
    share = (np.concatenate(right) == images.y).mean()
    click.echo(f"{'int8 over float16':28}{100 * share:7.2f} %  {len(broken)} rules broken {broken[:3]}")


if __name__ == "__main__":
    main()
