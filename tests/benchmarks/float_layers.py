"""Latency and accuracy of W8A8, and of W8A8 with layers in floats that gain no time (`--only-faster`).

    python -m tests.benchmarks.float_layers NETWORK TEST --preprocess TEXT [--provider openvino]
        [--learn IMAGES --count 100] [--judge top1 | agreement | scores] [--input-shape 1x3x320x320]

Rows: the network, `quantize`, `quantize --only-faster`. All three are timed interleaved on the provider,
and judged there, on images of TEST that nothing was learned from. agreement: the share of images, each
turned by 0, 90, 180 and 270 degrees with --turn, that keep the class that the float network gives; scores:
of a detector's class scores over 0.25 (output 1 x (4 + classes) x places) the share that stays over it.
"""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from onnxcompress.data.image_set import load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.model import Model, load
from onnxcompress.passes.quantize import Quantize
from onnxcompress.passes.quantize.figures import QuantizeFigures
from onnxcompress.runtime.latency import benchmark, ratio
from onnxcompress.runtime.providers import Provider
from onnxcompress.runtime.session import session

BATCH = 4
THRESHOLD = 0.25


@click.command()
@click.argument("network")
@click.argument("test")
@click.option("--preprocess", required=True)
@click.option("--provider", default="cpu", show_default=True)
@click.option("--learn", help="Images to learn from; without them inputs are made.")
@click.option("--count", default=100, show_default=True, help="Images of --learn.")
@click.option("--judged", default=2000, show_default=True, help="Images of TEST, at most.")
@click.option("--judge", type=click.Choice(["top1", "agreement", "scores"]), default="top1")
@click.option("--turn", is_flag=True, help="Judge by each image in four directions.")
@click.option("--input-shape")
@click.option("--effort", default="fast", show_default=True)
@click.option("--seconds", default=30.0, show_default=True, help="Time for timing the three, at most.")
@click.option(
    "--clock", type=click.Choice(["wall", "processor"]), default="wall", help="As in `benchmark`."
)
@click.option("--provider-options", help="As on the command line.")
def main(network: str, test: str, **how: Any) -> None:
    x, y = _judged(test, how)
    learn = {"preprocess": how["preprocess"], "effort": how["effort"], "input_shape": how["input_shape"]}
    learn |= {"images": how["learn"], "count": how["count"]} if how["learn"] else {}
    models = {"float": load(network), "W8A8": load(network), "--only-faster": load(network)}
    Quantize(**learn).apply(models["W8A8"])
    settings = tuple(filter(None, (how["provider_options"] or "").split(",")))
    runs_on = Provider.of(how["provider"], settings)
    own = {"only_faster": True, "provider": how["provider"], "provider_options": settings}
    pass_ = Quantize(**learn, **own)
    figures = pass_.apply(models["--only-faster"]).measured
    shapes = _shapes(models["float"], how["input_shape"])
    timed = benchmark(
        models, provider=runs_on, seconds=how["seconds"], shapes=shapes, clock=how["clock"], tolerance=0.003
    )
    exact = _outputs(models["float"], x, runs_on)
    title = f"{network.rsplit('/', 1)[-1]} on {timed['float'].device}, {how['clock']} clock"
    click.echo(f"{title}, {timed['float'].runs} rounds; {len(x)} images")
    for name, model in models.items():
        given = exact if name == "float" else _outputs(model, x, runs_on)
        time = ratio(timed["float"], timed[name])
        noise = float(np.square(given - exact).mean() / np.square(exact - exact.mean(0)).mean())
        span = f"{time.value:.3f} ({time.low:.3f} to {time.high:.3f}) of float's"
        judged = f"{_figure(how['judge'], given, exact, y)}, noise {100 * noise:.2f} %"
        click.echo(f"  {name:14}{timed[name].median_ms:8.3f} ms  {span}  {judged}")
    gained = ratio(timed["W8A8"], timed["--only-faster"])
    click.echo(f"  --only-faster / W8A8: {gained.value:.3f} ({gained.low:.3f} to {gained.high:.3f})")
    _echo_layers(figures)


def _judged(test: str, how: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
    """Load the images to judge by, as the network takes them, and their labels."""
    parsed, top1 = Preprocess.parse(how["preprocess"]), how["judge"] == "top1"
    images = load_images(test, preprocess=parsed, labels=top1)
    if how["learn"] == test:  # drawn as the pass draws them
        taken = set(load_images(test, preprocess=parsed, count=how["count"], seed=0).names)
        images = images.take([i for i, name in enumerate(images.names) if name not in taken])
    images = images.spread(how["judged"])
    x = images.array()
    if how["turn"]:
        x = np.concatenate([np.rot90(x, quarter, (2, 3)) for quarter in range(4)])
    return x, images.y


def _shapes(model: Model, shape: str | None) -> dict[str, list[int]]:
    if shape is None:
        return {}
    return {model.graph.inputs[0].name: [int(size) for size in shape.split("x")]}


def _outputs(model: Model, x: np.ndarray, provider: Provider) -> np.ndarray:
    """Run the network on the provider, batch by batch; the first output."""
    opened = session(model, provider=provider)
    name = opened.get_inputs()[0].name
    found = [opened.run(None, {name: x[at : at + BATCH]})[0] for at in range(0, len(x), BATCH)]
    return np.concatenate(found).astype(np.float64)


def _figure(judge: str, given: np.ndarray, exact: np.ndarray, y: np.ndarray | None) -> str:
    if judge == "scores":
        before, after = exact[:, 4:] > THRESHOLD, given[:, 4:] > THRESHOLD
        kept = 100 * int((after & before).sum()) / int(before.sum())
        return f"{kept:.1f} % of {before.sum()} scores stay, {int((after & ~before).sum())} are new"
    same = 100 * (given.argmax(1) == exact.argmax(1)).mean()
    if y is None or judge == "agreement":
        return f"{same:.2f} % keep their class"
    return f"top-1 {100 * (given.argmax(1) == y).mean():.2f} %, {same:.2f} % keep their class"


def _echo_layers(figures: QuantizeFigures | None) -> None:
    if figures is None or figures.float_layers is None:
        click.echo("  all layers stay quantized" if figures else "  all layers stay floats")
        return
    for layer in figures.float_layers.layers:
        click.echo(f"  {layer.refusal(figures.float_layers.latency.provider)}")


if __name__ == "__main__":
    main()
