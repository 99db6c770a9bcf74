"""What 8-bit quantization without data leaves of networks that packages ship, on real photographs.

    python -m tests.benchmarks.field_accuracy scores DETECTOR.onnx IMAGES [--inputs procedural] [--peer]
    python -m tests.benchmarks.field_accuracy orientation CLASSIFIER.onnx IMAGES [--result OWN.onnx]
    python -m tests.benchmarks.field_accuracy masks TEXT_DETECTOR.onnx [--inputs layerwise] [--effort fast]

`scores`: of the class scores over 0.25 that the float network gives (YOLOv8: output 1 x (4 + classes) x
places), how many stay over 0.25 at their class and place. `orientation`: the share of images, each turned
by 0, 90, 180 and 270 degrees, that keep their class. `masks`: intersection over union of where a text
detector (PP-OCR: output 1 x 1 x height x width) says yes on pages drawn with text. The network is
quantized with the defaults, or --result is measured instead. The peer is onnxruntime's static quantization
with 64 images. Tested are images that those 64 leave out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from onnxcompress.data.image_set import load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.runtime.session import session
from tests.benchmarks.quantize import onnxruntime_static, quantized

THRESHOLD = 0.25
SIDE = 320
CALIBRATED = 64
"""Images that onnxruntime's static quantization takes."""
BATCH = 8
MASK = 0.3
"""Probability from which on PP-OCR takes a place as text."""
WORDS = "invoice total amount street number order closed water station library exit"


@click.group()
def cli() -> None:
    """Figures of networks from the field."""


def _figure(command: Callable[..., None]) -> Callable[..., None]:
    """Add the arguments that both figures share."""
    for decorate in (
        click.option("--seed", default=0),
        click.option("--peer", is_flag=True, help="Also onnxruntime's static quantization."),
        click.option("--inputs", default="auto", help="Of quantize."),
        click.option("--result", "results", multiple=True, help="Measure this file instead of quantizing."),
        click.option("--count", default=200, help="Images to test on."),
        click.argument("images"),
        click.argument("model"),
    ):
        command = decorate(command)
    return cli.command()(command)


@_figure
def scores(model: str, images: str, count: int, **how: Any) -> None:
    """Scores of a detector that stay over the threshold at their place."""
    preprocess = f"unit size={SIDE}x{SIDE} resize=stretch"
    tested, learned = _photographs(images, preprocess, count, how["seed"])
    before = _outputs(model, tested)[:, 4:] > THRESHOLD

    def row(file: str) -> str:
        after = _outputs(file, tested)[:, 4:] > THRESHOLD
        stay, new = int((after & before).sum()), int((after & ~before).sum())
        share = 100 * stay / before.sum()
        return f"{share:5.1f} % ({stay} of {before.sum()}) over {THRESHOLD} stay, {new} are new"

    shape = f"1x3x{SIDE}x{SIDE}"
    _rows(row, model, learned, {"preprocess": preprocess, "input_shape": shape}, **how)


@_figure
def orientation(model: str, images: str, count: int, **how: Any) -> None:
    """Agreement with the float network on turned images."""
    tested, learned = _photographs(images, "imagenet", count, how["seed"])
    tested = np.concatenate([np.rot90(tested, quarter, (2, 3)) for quarter in range(4)])
    before = _outputs(model, tested).argmax(1)

    def row(file: str) -> str:
        same = (_outputs(file, tested).argmax(1) == before).mean()
        return f"{100 * same:5.1f} % of {len(tested)} turned images keep their class"

    _rows(row, model, learned, {"preprocess": "imagenet"}, **how)


@cli.command()
@click.argument("model")
@click.option("--count", default=24, help="Pages to test on.")
@click.option("--seed", default=0, help="Of quantize.")
@click.option("--inputs", default="auto", help="Of quantize.")
@click.option("--effort", default="best", help="Of quantize.")
@click.option("--result", "results", multiple=True, help="Measure this file instead of quantizing.")
def masks(model: str, count: int, effort: str, **how: Any) -> None:
    """Overlap of a text detector's masks on drawn pages."""
    preset = Preprocess.parse("imagenet")
    pages = np.stack([_page(number) for number in range(count)]) / 255
    tested = ((pages - preset.mean) / preset.std).transpose(0, 3, 1, 2).astype(np.float32)
    before = _outputs(model, tested) > MASK

    def row(file: str) -> str:
        after = _outputs(file, tested) > MASK
        both, either = (before & after).sum(), (before | after).sum()
        return f"masks overlap by {both / either:.3f}, {100 * both / before.sum():.1f} % of text stay"

    given = {"effort": effort}
    _rows(row, model, tested, given, peer=False, **how)


def _page(number: int) -> np.ndarray:
    """Draw a page with a few lines of text, (height, width, 3) of 0 to 255."""
    rng = np.random.default_rng(number)
    paper, ink = rng.integers(120, 256, 3), rng.integers(0, 110, 3)
    page = Image.new("RGB", (SIDE, SIDE), tuple(paper.tolist()))
    draw = ImageDraw.Draw(page)
    for _ in range(7):
        font = ImageFont.load_default(int(rng.integers(14, 34)))
        place = int(rng.integers(0, SIDE // 2)), int(rng.integers(0, SIDE - 30))
        draw.text(place, " ".join(rng.choice(WORDS.split(), 3)), fill=tuple(ink.tolist()), font=font)
    return np.asarray(page)


def _photographs(images: str, preprocess: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Load images to test on, and those that the peer learns from."""
    parsed = Preprocess.parse(preprocess)
    tested = load_images(images, preprocess=parsed, count=CALIBRATED, seed=seed, left_out=count)
    learned = load_images(images, preprocess=parsed, count=CALIBRATED, seed=seed)
    return tested.array(), learned.array()


def _outputs(model: str, x: np.ndarray) -> np.ndarray:
    opened = session(model, provider="cpu")
    name = opened.get_inputs()[0].name
    parts = [x[start : start + BATCH] for start in range(0, len(x), BATCH)]
    return np.concatenate([opened.run(None, {name: np.ascontiguousarray(p)})[0] for p in parts])


def _rows(
    row: Callable[[str], str],
    model: str,
    learned: np.ndarray,
    given: dict[str, Any],
    *,
    results: tuple[str, ...],
    inputs: str,
    peer: bool,
    seed: int,
) -> None:
    """Print a row for each result, or for what quantizing gives."""
    for result in results:
        print(f"{Path(result).name:24} {row(result)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/quantized.onnx"
        if not results:
            start = time.process_time()
            account = quantized(model, file, {**given, "seed": seed, "inputs": inputs})
            snr = ", ".join(f"{db:.1f} dB" for db in account["output_snr_db"].values())
            seconds = time.process_time() - start
            print(f"{'W8A8':24} {row(file)}; {snr} on its inputs, {seconds:.0f} s of processor", flush=True)
        if peer:
            onnxruntime_static(model, file, learned, per_channel=True)
            print(f"{f'onnxruntime, {CALIBRATED} images':24} {row(file)}", flush=True)


if __name__ == "__main__":
    cli()
