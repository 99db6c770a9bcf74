"""How many images run at once through a graph that may fix their number.

The executor reads targets of Reshape nodes so that they hold for any batch (`reshape_targets`). Whether the
graph then treats each image alone is tried, never assumed: what several images give at once must be what
each gives by itself.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from onnxcompress.errors import CompressWarning
from onnxcompress.graph.query import data_input
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.model.model_like import input_specs
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.executor import ExecutionError, UnsupportedOp
from onnxcompress.optimize.executor.walk_plan import floats

TRIED = 3
"""Batches that are tried at once. Not two: sizes of two are common in graphs."""
RELATIVE, SHARE = 1e-3, 0.01
"""At most this share of an output may differ by more than this part of its largest value: rounding moves
what lies at a threshold."""


BATCH = 32
"""Images that run at once where the graph leaves it open, at most."""
BATCH_BYTES, GPU_BATCH_BYTES = 24 << 20, 1 << 30
"""Memory that one tensor of a batch may take: beyond, each is new memory that the system has to clear; on a
GPU, which is kept busy by many images at once."""


def file_batch(model: Model) -> int | None:
    """Read the number of images that the network's input fixes.

    Args:
        model: The network, with one input.

    Returns:
        The batch; None where it is open.
    """
    name = data_input(model).name
    shape = next(spec.shape for spec in input_specs(model) if spec.name == name)
    return int(shape[0]) if shape and isinstance(shape[0], int) else None


def timed_batch(model: Model, asked: int) -> int:
    """Choose the batch at which a network is timed.

    Args:
        model: The network, with one input.
        asked: The batch that is asked for.

    Returns:
        The batch that its file fixes, with a CompressWarning where another than one image was asked for;
        else the one asked for.
    """
    fixed = file_batch(model)
    if fixed is not None and asked not in (1, fixed):
        warnings.warn(
            f"--latency-batch {asked}: the file fixes the batch to {fixed}, at which it is timed",
            CompressWarning,
            stacklevel=2,
        )
    return fixed or asked


def images_at_once(model: Model, images: Tensor) -> int | None:
    """Find out how many images the executor can run at once, by trying it.

    Args:
        model: The network, with one input.
        images: Inputs as the network takes them, (N, …).

    Returns:
        None for any number; else the number that the graph fixes.
    """
    base = file_batch(model) or 1
    count = min(TRIED, len(images) // base)
    if count < 2:
        return base
    topology, executor = model.analysis(Topology), Executor.from_model(model)
    names = [t.name for n in topology.order for t in n.outputs if id(t) in topology.data and t.name]
    outputs = {t.name for t in model.graph.outputs}
    source = str(data_input(model).name)
    try:
        with torch.no_grad():
            whole = executor.run({source: images[: base * count]}, names)
            for at in range(count):
                alone = executor.run({source: images[base * at : base * (at + 1)]}, names)
                if not all(_agrees(whole[n], alone[n], at, count, n in outputs) for n in names):
                    return base
    except (ExecutionError, UnsupportedOp):  # where more images are what cannot be run
        return base
    return None


def images_per_run(model: Model, images: Tensor) -> int:
    """Choose how many images run at once when nothing is trained.

    Args:
        model: The network, with one input.
        images: Inputs as the network takes them, (N, …).

    Returns:
        The number that the graph fixes; else one whose tensors are not too large, up to BATCH.
    """
    return images_at_once(model, images) or small_batch(model, BATCH)


def small_batch(model: Model, most: int, device: str = "cpu") -> int:
    """Choose how many images run at once so that no tensor is too large: that costs more than it gains.

    Args:
        model: The network, whose batch is open.
        most: The number of images, at most.
        device: Where they run.

    Returns:
        The number of images, at least 1.
    """
    room = BATCH_BYTES if device == "cpu" else GPU_BATCH_BYTES
    largest = max((floats(shape) for shape in tensor_shapes(model).values() if len(shape) > 2), default=1)
    return max(1, min(most, room // (4 * max(largest, 1))))


def _agrees(whole: object, alone: object, at: int, count: int, compared: bool) -> bool:
    """Return whether batch `at` of `count` gives by itself what it gives among the others."""
    if not isinstance(whole, Tensor) or not isinstance(alone, Tensor):
        return True  # pieces of a Split; what is made of them is looked at
    if not alone.ndim or len(whole) != count * len(alone) or whole.shape[1:] != alone.shape[1:]:
        return False
    if not compared or not alone.numel():
        return True
    a, b = whole[at * len(alone) : (at + 1) * len(alone)].double(), alone.double()
    apart = (a - b).abs() > RELATIVE * b.abs().max().clamp_min(1e-30)
    return float(apart.double().mean()) <= SHARE
