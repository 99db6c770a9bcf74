"""Make inputs for a network without any data: procedural or distilled images, or drawn values."""

from __future__ import annotations

import math
from dataclasses import replace

from onnxcompress.data.image_set import ImageSet, check_fits
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.data.preprocessing_choice import base_for
from onnxcompress.errors import ModelError
from onnxcompress.formatting import counted
from onnxcompress.graph.query import data_input
from onnxcompress.model import Model
from onnxcompress.model.model_like import InputSpec, dims, input_specs
from onnxcompress.optimize.synthesis.drawn_inputs import DrawnSet, Samples, drawn_inputs
from onnxcompress.progress import Progress, silent
from onnxcompress.runtime.cores import thread_count
from onnxcompress.statistics.record import known_statistics

MOST_WORKERS = 8
"""Threads that draw procedural images."""
MADE_UP = ("procedural", "drawn")
"""Sources that know nothing of the training data."""
MOST_PIXELS = 1 << 26
"""Of an image that is made."""
STANDARDIZED = Preprocess(mean=(0.45,), std=(0.25,))
"""Where nobody says how images are normalized: procedural images get mean 0 and deviation 1, roughly."""


def best_kind(model: Model) -> tuple[str, str]:
    """Choose the best source of images that a file allows.

    Args:
        model: The network.

    Returns:
        `distilled` or `procedural`, and the reason.
    """
    known = known_statistics(model)
    real = [s for s in known.values() if not any(kind in s.source for kind in MADE_UP)]
    if real:
        return "distilled", f"the file knows the statistics of {counted(len(real), 'tensor')}"
    if known:
        return "procedural", "the file's statistics were themselves taken of procedural images"
    return "procedural", "the file has neither BatchNorm nor recorded statistics"


def synthetic_images(
    model: Model,
    kind: str,
    count: int,
    preprocess: Preprocess | None,
    seed: int,
    *,
    device: str = "cpu",
    progress: Progress = silent,
) -> Samples:
    """Make images in the size that the network takes; where it takes no pictures, its inputs are drawn.

    Args:
        model: The network, with one input.
        kind: `distilled`, or another kind: procedural images.
        count: Number of images.
        preprocess: How they are normalized; None: to mean 0 and deviation 1, roughly, and of an input of
            integers as pixels.
        seed: Random seed.
        device: Where torch computes.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The images.

    Raises:
        ModelError: Such inputs cannot be distilled, or there are no statistics to distil from.
    """
    from onnxcompress.data.dead_leaves import procedural_images

    if kind == "distilled":
        need_statistics(model, kind)
    spec = image_input(model)
    geometry = picture_geometry(model, spec, preprocess)
    if geometry is None:
        return _drawn(model, spec, kind, count, preprocess, seed)
    height, width, channels, layout = geometry
    default = base_for(spec.dtype) if spec.dtype.kind in "iu" else STANDARDIZED
    chosen = replace(preprocess or default, layout=layout)
    workers = min(MOST_WORKERS, thread_count())
    x = procedural_images(count, height, width, channels, seed, progress, workers)
    names = tuple(f"{kind}[{i}]" for i in range(count))
    made = ImageSet(x, None, names, chosen, spec.dtype)
    check_fits(made, spec.shape, spec.name)
    if kind != "distilled":
        return made
    from onnxcompress.optimize.synthesis.distillation import distill

    return distill(model, made, seed=seed, device=device, progress=progress)


def image_input(model: Model) -> InputSpec:
    """Describe the one input that the network reads, with the sizes that are assumed for it.

    Args:
        model: The network.

    Returns:
        The input.

    Raises:
        ModelError: It reads none, or several.
    """
    name = str(data_input(model).name)
    return next(spec for spec in input_specs(model) if spec.name == name)


def _drawn(
    model: Model, spec: InputSpec, kind: str, count: int, preprocess: Preprocess | None, seed: int
) -> DrawnSet:
    """Return inputs that are no pictures."""
    text = dims((spec.shape or ())[1:])
    if kind == "distilled":
        raise ModelError(
            f"{model.name}: distilled inputs are pictures, input {spec.name!r} takes {text}; take --inputs "
            "procedural, which are drawn for such an input"
        )
    sizes = [d for d in (spec.shape or ())[1:] if isinstance(d, int)]
    if spec.shape is None or len(sizes) < len(spec.shape) - 1 or math.prod(sizes) > MOST_PIXELS:
        raise ModelError(
            f"{model.name}: input {spec.name!r} takes {text}, which is unknown or absurdly large; correct "
            "it in the file, or give --input-shape"
        )
    if preprocess is None and spec.dtype.kind in "iu":
        preprocess = base_for(spec.dtype)
    statistics = known_statistics(model).get(spec.name)
    return drawn_inputs((count, *sizes), spec.dtype, seed, statistics=statistics, preprocess=preprocess)


def picture_geometry(
    model: Model, spec: InputSpec, preprocess: Preprocess | None
) -> tuple[int, int, int, str] | None:
    """Read what pictures an input takes.

    Args:
        model: The network.
        spec: The input.
        preprocess: How its pictures are normalized; None: unknown.

    Returns:
        Height, width, channels and layout; None where it takes no pictures.
    """
    dims = [d if isinstance(d, int) else None for d in (spec.shape or ())[1:]]
    if len(dims) == 3:
        layout = preprocess.layout if preprocess else "nchw" if dims[0] in (1, 3) else "nhwc"
        channels, height, width = dims if layout == "nchw" else (dims[2], *dims[:2])
        if preprocess is not None and preprocess.size is not None:
            height, width = height or preprocess.size[0], width or preprocess.size[1]
        if height and width and height * width <= MOST_PIXELS and channels in (1, 3):
            return height, width, channels, layout
    return None


def need_statistics(model: Model, kind: str) -> None:
    """Check that a file has statistics to make inputs from.

    Args:
        model: The network.
        kind: Kind of the inputs, for the message.

    Raises:
        ModelError: It has none.
    """
    if not known_statistics(model):
        raise ModelError(
            f"{model.name}: making {kind} inputs needs BatchNorm or recorded statistics, the file has "
            "neither; export with BatchNorm kept (onnxcompress.export), estimate them (onnxcompress "
            "calibrate), or take procedural ones"
        )
