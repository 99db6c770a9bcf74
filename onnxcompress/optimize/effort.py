"""Effort: how much work a pass that learns does, chosen by one option.

    fast        closed forms on few inputs
    balanced    more inputs, fewer repetitions than `best`
    best        as many as help

Each pass maps an effort to its own counts; an option that the user gives replaces the count. `auto` is
`best` where its expected time at a nominal rate is at most PATIENCE, else `balanced`: it depends on the
network, never on the machine, so that a seed gives the same file on every CPU (a GPU rounds otherwise, and
tunes longer). What is said before the work
starts is the time expected on this machine:

    seconds = START + layers · LAYER[pass] + inputs · numbers · PASSES[pass][effort] / rate

numbers: those that the network computes for an input, the elements of all tensors; rate: how many numbers a
second an element-wise operator computes, as measured. Most layers of a small network cost memory traffic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from onnxcompress.formatting import counted, roughly
from onnxcompress.graph.query import data_input, is_op
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.option_fields import option
from onnxcompress.progress import Progress

if TYPE_CHECKING:
    from onnxcompress.model import Model

Effort = Literal["fast", "balanced", "best"]
Choice = Literal["auto", "fast", "balanced", "best"]

PATIENCE: Mapping[str, float] = {
    "quantize": 30.0,
    "prune": 380.0,
    "drop-blocks": 587.0,
    "drop-channels": 587.0,
}
"""Pass -> seconds at the nominal rate that `auto` lets `best` take. MobileNetV2 on images of 224 x 224 is
still within that of `drop-blocks`, where what less work costs was not measured, and not within that of
`prune`: half of its weights at zero, top-1 is 79.8 % with `balanced`, and was 78.0 % with `best` in 1.6
times the processor time (82.6 % before; `prune`, then `compare` on 500 images, one seed each)."""
NOMINAL_RATE = 1e9
"""Numbers a second, on one core of a common computer."""
START = 4.0
"""Seconds for loading libraries and the model, and for comparing the outputs."""
USUAL_PIXELS = 224 * 224
"""Pixels of an input for which counts are chosen; smaller inputs tell less, and more of them are used."""
RATE_NUMBERS, RATE_RUNS = 1 << 22, 8
"""Numbers on which the rate is measured, more than caches hold, and how often."""

INPUTS: Mapping[str, int] = {"fast": 64, "balanced": 256, "best": 500, "auto": 500}
"""Inputs to make for passes whose work grows little with their number."""


@dataclass(frozen=True)
class QuantizeWork:
    """Counts of `quantize`."""

    inputs: int
    """Inputs to make, of the usual size."""
    most_inputs: int
    """The same of small inputs."""
    places: int
    """Places at which an input gives a patch, at most."""
    ratios: int
    """Clipping ratios that are tried for each scale of a weight."""
    sweeps: int
    """Sweeps of coordinate descent; 0: weights are rounded to nearest."""
    steps: int = 0
    """Steps of tuning all layers together, where activations have fewer bits than 8."""
    stretch: bool = True
    """Channels are brought to equal ranges: a few inputs do not tell how far each reaches."""

    def count(self, pixels: int) -> int:
        """Count the inputs to make.

        Args:
            pixels: Height times width of an input; 0 where it is no picture.

        Returns:
            The number of inputs.
        """
        more = USUAL_PIXELS // pixels if pixels else 1
        return min(self.most_inputs, self.inputs * max(1, more))


QUANTIZE: Mapping[Effort, QuantizeWork] = {
    "fast": QuantizeWork(inputs=8, most_inputs=128, places=64, ratios=12, sweeps=0, stretch=False),
    "balanced": QuantizeWork(inputs=16, most_inputs=128, places=128, ratios=20, sweeps=1),
    "best": QuantizeWork(inputs=128, most_inputs=128, places=256, ratios=30, sweeps=3, steps=200),
}


@dataclass(frozen=True)
class PruneWork:
    """Counts of `prune`."""

    inputs: int
    """Inputs to make."""
    small_inputs: int
    """The same of small ones."""
    starts: int
    """Images from which inputs of the deep layers are made; 0: these get no inputs of their own.
    EfficientNet-Lite0 at 34 % (`python tests/benchmarks/prune.py`): KL divergence 0.029 from 1,024, 0.037
    from 128 (`--synthetic 128`)."""
    deep: int = 0
    """Inputs of the deep layers, at most."""


PRUNE: Mapping[Effort, PruneWork] = {
    "fast": PruneWork(inputs=32, small_inputs=128, starts=0),
    "balanced": PruneWork(inputs=64, small_inputs=256, starts=256, deep=512),
    "best": PruneWork(inputs=128, small_inputs=512, starts=1024, deep=2048),
}


@dataclass(frozen=True)
class DropBlocksWork:
    """Counts of `drop-blocks` and of `drop-channels`."""

    inputs: int
    """Inputs to make."""
    steps: int
    """Steps of fine-tuning."""
    gpu_steps: int
    """The same on a GPU, which takes many more in the time."""


DROP_BLOCKS: Mapping[Effort, DropBlocksWork] = {
    "fast": DropBlocksWork(inputs=128, steps=0, gpu_steps=0),
    "balanced": DropBlocksWork(inputs=256, steps=200, gpu_steps=1000),
    "best": DropBlocksWork(inputs=500, steps=300, gpu_steps=2000),
}
TUNING_BATCH, GPU_TUNING_BATCH = 32, 64
"""Images in a step of fine-tuning."""
TUNING_RATE = 0.015
"""Peak rate of fine-tuning with TUNING_BATCH images, relative to a weight's size; in proportion with
others. MobileNetV2, 2,000 steps on an H100, error on images kept aside, without features 3, 5, 6 and
without 6, 9, 10: 0.200 and 0.150 with 32 images, 0.197 and 0.147 at twice the rate, 0.202 and 0.153 at four
times; 0.187 and 0.137 with 64 images at twice the rate."""

PASSES: Mapping[str, Mapping[Effort, float]] = {
    "quantize": {"fast": 25.0, "balanced": 30.0, "best": 35.0},
    "prune": {"fast": 60.0, "balanced": 240.0, "best": 240.0},
    "drop-blocks": {"fast": 240.0, "balanced": 135.0, "best": 75.0},
    "drop-channels": {"fast": 240.0, "balanced": 135.0, "best": 75.0},
}
"""Times that a pass goes over all numbers of an input, in element-wise operations, without tuning."""
TUNED: Mapping[str, float] = {"quantize": 20.0, "drop-blocks": 10.0, "drop-channels": 10.0}
"""The same of an input in a step of tuning."""
LAYER: Mapping[str, float] = {"quantize": 0.1, "prune": 0.2, "drop-blocks": 0.2, "drop-channels": 0.2}
"""Seconds that a layer takes, however small: ResNet-56's 56 of few numbers take as long as those of
MobileNetV2 at 224 x 224."""
TIMING = 10.0
"""Seconds that the latencies of a network without parts of it take."""


def effort_option() -> Any:
    """Declare the field `effort` of a pass that learns.

    Returns:
        A dataclass field.
    """
    return option(
        "auto",
        "How much work: fast (closed forms on few inputs, to see what is possible), balanced, or "
        "best (for the file that you ship); auto: best for small networks, else balanced. A "
        "count that is given as an option wins.",
    )


def choose_effort(wanted: Choice, model: Model, pass_: str, inputs: int) -> Effort:
    """Resolve `auto` by the size of the network.

    Args:
        wanted: The value of the option.
        model: The model.
        pass_: Name of the pass.
        inputs: Inputs that the pass learns from at the effort `best`.

    Returns:
        The effort.
    """
    if wanted != "auto":
        return wanted
    seconds = inputs * computed_numbers(model) * PASSES[pass_]["best"] / NOMINAL_RATE
    return "best" if seconds <= PATIENCE[pass_] else "balanced"


def announce(
    pass_: str,
    effort: Effort,
    model: Model,
    progress: Progress,
    inputs: int,
    *,
    tuned: int = 0,
    known: float = 0.0,
    device: str = "cpu",
) -> None:
    """Report the effort and the expected time, before the work starts.

    Args:
        pass_: Name of the pass.
        effort: The effort.
        model: The model.
        progress: Called once, with no steps.
        inputs: Inputs that the pass learns from.
        tuned: Inputs of all steps of tuning together.
        known: Seconds that are known beforehand.
        device: Where most of the work is done.
    """
    work = (inputs * PASSES[pass_][effort] + tuned * TUNED.get(pass_, 0.0)) * computed_numbers(model)
    layers = sum(is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul") for node in model.graph.nodes)
    seconds = START + known + layers * LAYER[pass_] + work / measured_rate(device)
    progress(f"{effort} effort on {counted(inputs, 'input')}, about {roughly(seconds)}", 0, 0)


def computed_numbers(model: Model) -> int:
    """Count the numbers that a network computes for one input.

    Args:
        model: The model.

    Returns:
        The elements of the outputs of all nodes, as far as their sizes are known.
    """
    shapes = tensor_shapes(model)
    names = [t.name for node in model.graph.nodes for t in node.outputs if t.name in shapes]
    return sum(math.prod(d for d in shapes[name][1:] if isinstance(d, int)) for name in names)


def pixels_of(model: Model) -> int:
    """Return height times width of the network's input.

    Args:
        model: The model, with one input.

    Returns:
        The pixels; 0 where it takes no pictures.
    """
    shape = tensor_shapes(model).get(data_input(model).name, ())
    return math.prod(d for d in shape[1:] if isinstance(d, int) and d > 4) if len(shape) == 4 else 0


def measured_rate(device: str = "cpu") -> float:
    """Measure how fast this machine computes an element-wise operator, as busy as it is.

    Args:
        device: Where: on the GPU, or on one thread of the CPU.

    Returns:
        Numbers a second.
    """
    import torch

    x = torch.ones(RATE_NUMBERS, device=device)
    y = torch.clamp(x, 0, 6)  # memory is had, the operator loaded
    float(y[0])  # a GPU is waited for
    start = time.perf_counter()
    for _ in range(RATE_RUNS):
        torch.clamp(x, 0, 6, out=y)
    float(y[0])
    return RATE_RUNS * RATE_NUMBERS / (time.perf_counter() - start)
