"""Choose inputs that no pass of a chain learned from, to judge by what the chain makes.

| what                 | where                                                                       |
|----------------------|-----------------------------------------------------------------------------|
| images kept apart    | named to judge by, and by no pass to learn from                             |
| images left out      | those of a pass's own `images` that its `count` leaves out                  |
| procedural images    | of a seed that no pass has: they share no image with those of another seed  |
| random numbers       | where no picture fits, and for passes that keep the function what it is     |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxcompress.data.image_set import ImageSet, as_type, check_fits, image_count, load_images
from onnxcompress.data.input_shapes import parse_input_shapes
from onnxcompress.data.preprocessing_choice import choose
from onnxcompress.errors import CompressError, InputError, ModelError
from onnxcompress.formatting import counted
from onnxcompress.graph.query import read_inputs
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import InputRequest, assume_sizes
from onnxcompress.optimize.synthesis.drawn_inputs import Samples
from onnxcompress.optimize.synthesis.synthetic_inputs import image_input, synthetic_images
from onnxcompress.runtime.inference import unread_feeds
from onnxcompress.runtime.random_inputs import SEED, UnseenInputs, has_open_sizes, random_inputs
from onnxcompress.runtime.several_inputs import shapes_that_run

COUNT = 16
"""Images to judge by, at most, but for a fixed batch."""
FEWEST = 4
"""Images left out that are worth judging by."""
MANY = 160
"""Images of which 16 can be kept aside: what a pass learns from the others differs little."""
BATCH = 4
"""Images that go through at once where the file leaves it open."""


def kept_aside(images: str) -> int | None:
    """How many images a pass is to learn from, so that some of them are left out to judge by.

    Args:
        images: Path of the folder or .npz that the pass would use all of.

    Returns:
        Their number; None where there are too few to keep any aside.
    """
    total = image_count(images)
    return total - COUNT if total >= MANY else None


def unseen_inputs(
    model: Model, learned: Sequence[InputRequest], judged_by: InputRequest | None = None
) -> UnseenInputs:
    """Choose inputs that none of the requests gives.

    Args:
        model: The model that will be run.
        learned: What the passes of a chain ask for.
        judged_by: Images that are kept to judge by, if there are any.

    Returns:
        Images where the network takes them, else random numbers.

    Raises:
        CompressError: No inputs can be made: a dimension is open, say.
    """
    own = sized(model, learned, judged_by)
    try:
        spec = image_input(own)
        images, description = _images(own, spec.dtype, learned, judged_by)
        if isinstance(images, ImageSet):
            check_fits(images, spec.shape, spec.name)
    except (ModelError, InputError):  # it has several inputs, or takes none of these
        return random_inputs(own)
    fixed = spec.shape[0] if spec.shape else None
    batch = fixed if isinstance(fixed, int) else BATCH
    x = as_type(images.array(), spec.dtype)
    x = x[np.arange(max(batch, len(x) // batch * batch)) % len(x)]
    others = unread_feeds(own)
    runs = tuple({spec.name: x[start : start + batch], **others} for start in range(0, len(x), batch))
    return UnseenInputs(runs, description)


def sized(model: Model, learned: Sequence[InputRequest], judged_by: InputRequest | None) -> Model:
    """Give sizes to the dimensions of a model's inputs that the file leaves open.

    Args:
        model: The model; it is not changed.
        learned: What the passes of a chain ask for.
        judged_by: Images that are kept to judge by, and sizes.

    Returns:
        A copy with assumed sizes, or the model itself where none is open or none are known.
    """
    if not has_open_sizes(model):
        return model
    requests = [*learned, *([judged_by] if judged_by is not None else [])]
    said = [request for request in requests if request.input_shape is not None]
    request = (said or [r for r in requests if r.images is not None] or requests or [InputRequest()])[0]
    own = model.copy()
    try:
        if len(read_inputs(model)) > 1:
            own.assume(shapes_that_run(model, parse_input_shapes(request.input_shape)))
        else:
            assume_sizes(own, request)
    except CompressError:  # random inputs say it better
        return model
    return own


def _images(
    model: Model,
    dtype: np.dtype[Any],
    learned: Sequence[InputRequest],
    judged_by: InputRequest | None,
) -> tuple[Samples, str]:
    """The best images that nothing learned from, and what they are."""
    real = [one for one in learned if one.images is not None]
    if judged_by is not None and judged_by.images not in (None, *(one.images for one in real)):
        how = choose(judged_by.preprocess, model.metadata, model.name, dtype).preprocess
        kept = load_images(str(judged_by.images), preprocess=how).spread(COUNT)
        return kept, f"{counted(len(kept), 'image')} of {judged_by.images} that the gates judge by"
    if real and (left := _left_out(model, dtype, real)) is not None:
        return left, f"{counted(len(left), 'image')} of {real[0].images} that no pass learned from"
    text = real[0].preprocess if real else next((one.preprocess for one in learned if one.preprocess), None)
    choice = choose(text, model.metadata, model.name, dtype)
    seed = next(s for s in range(SEED, SEED + len(learned) + 1) if all(s != one.seed for one in learned))
    preprocess = choice.preprocess if real else choice.explicit
    images = synthetic_images(model, "procedural", COUNT, preprocess, seed)
    kind = "procedural images" if isinstance(images, ImageSet) else "drawn inputs"
    return images, f"{len(images)} {kind} of seed {seed}"


def _left_out(model: Model, dtype: np.dtype[Any], real: Sequence[InputRequest]) -> ImageSet | None:
    """Images of the first request that all requests leave out; None where there are next to none."""
    first = real[0]
    if any(
        replace(one, inputs=first.inputs, why=first.why, synthetic=first.synthetic) != first for one in real
    ):
        return None
    if first.count is None or image_count(str(first.images)) - first.count < FEWEST:
        return None
    how = choose(first.preprocess, model.metadata, model.name, dtype).preprocess
    try:
        return load_images(
            str(first.images), preprocess=how, count=first.count, seed=first.seed, left_out=COUNT
        )
    except CompressError:  # the pass says it better
        return None
