"""The call that makes images for a network."""

from __future__ import annotations

import time
from numbers import Integral
from typing import Any, Literal

from onnxcompress.api.models import model_of
from onnxcompress.api.results import Images, shown
from onnxcompress.data.image_set import ImageSet
from onnxcompress.errors import ModelError, OptionError
from onnxcompress.optimize.calibration import InputRequest, assume_sizes
from onnxcompress.progress import Progress, silent
from onnxcompress.report.run_data import File, Material


def synthesize(
    model: Any,
    *,
    kind: Literal["distilled", "procedural"] | None = None,
    count: int = 500,
    seed: int = 0,
    preprocess: str | None = None,
    input_shape: str | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Images:
    """Make images from a network's statistics, or from a seed.

    Args:
        model: A path, a ModelProto or its bytes, a `Model`, or an `onnx_ir.Model`; it is not changed.
        kind: `distilled` by the statistics, `procedural` from nothing; None: the better one that it allows.
        count: Number of images.
        seed: Random seed; the same seed gives the same images.
        preprocess: As --preprocess; None: what the model's metadata has.
        input_shape: Sizes of an input that the file leaves open.
        device: Where images are distilled: `auto`, `cpu` or `cuda`.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The images; `images.x` is uint8, (count, height, width, channels).

    Raises:
        ModelError: The network takes no images.
        OptionError: The kind is unknown, or the preprocessing contradicts the model.
    """
    from onnxcompress.data.preprocessing_choice import choose
    from onnxcompress.optimize.device import pick_device
    from onnxcompress.optimize.synthesis.synthetic_inputs import best_kind, image_input, synthetic_images
    from onnxcompress.report.collect import pictures

    if kind not in (None, "distilled", "procedural"):
        raise OptionError(f"kind {kind!r}: expected distilled or procedural")
    for name, value, least in (("count", count, 1), ("seed", seed, 0)):
        if not (isinstance(value, Integral) and value >= least):
            raise OptionError(f"{name}: {value}; expected a whole number, {least} or more")
    start, read = time.perf_counter(), model_of(model).copy()
    assume_sizes(read, InputRequest(preprocess=preprocess, input_shape=input_shape))
    choice = choose(preprocess, read.metadata, read.name, image_input(read).dtype)
    chosen, why = (kind, "asked for") if kind else best_kind(read)
    where = pick_device(device)
    made = synthetic_images(read, chosen, count, choice.explicit, seed, device=where, progress=progress)
    if not isinstance(made, ImageSet):
        raise ModelError(f"{read.name}: its input takes no images of 1 or 3 channels")
    account = {
        "kind": chosen, "why": why, "count": count, "seed": seed, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    files = (File("model", read.name, 0, ""),)
    told = Material("synthesize", account, files=files, pictures=(pictures("The images", made),))
    return shown(Images, {"images": made}, told)
