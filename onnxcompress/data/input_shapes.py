"""Sizes for the dimensions that a network's inputs leave open: what a user says, or a choice.

A network with an open height and width runs at any size; whatever runs it needs one. `--input-shape` gives
it, by the same rule for every command:

 1. what `--input-shape` says: [NAME=]1x3x320x320, of several inputs with commas between;
 2. the size that images are brought to (`size=` in --preprocess or the model's metadata), or have;
 3. the size that the exporter noted in the metadata (`imgsz`, of Ultralytics);
 4. else a usual size.

Of a choice by 3 or 4 a warning tells.

The first dimension, the batch, stays open where the file leaves it open. The file that a pass writes keeps
its open dimensions.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence

from onnxcompress.errors import CompressWarning, OptionError
from onnxcompress.model import Shape
from onnxcompress.model.model_like import InputSpec, dims

USUAL = ((224, 224), (48, 320), (32, 320))
"""Height and width of images where nobody says them: the first at which the network runs."""
LINE_WIDTH, LINE_HEIGHT = 320, 96
"""Width of images whose height is fixed to a line of text, at most the second."""
LENGTH, EDGE, CHANNELS = 1024, 16, 3
"""Of sequences; of volumes; of images with open channels."""

Given = Mapping[str, Sequence[int]]
"""Whole shapes by name of the input; the name may be empty where there is one input."""


def parse_input_shapes(text: str | None) -> dict[str, tuple[int, ...]]:
    """Read `images=1x3x320x320,mask=1x320x320`; a single shape may have no name.

    Args:
        text: what the user says; None or empty for nothing.

    Returns:
        Shapes by name, "" for the shape without one.

    Raises:
        OptionError: it cannot be read.
    """
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    found: dict[str, tuple[int, ...]] = {}
    for part in parts:
        name, equals, sizes = part.rpartition("=")
        numbers = sizes.lower().split("x")
        shape = tuple(int(size) for size in numbers if size.isdecimal())
        if len(shape) < len(numbers) or min(shape) < 1 or (equals and not name):
            raise OptionError(f"--input-shape {part!r}: expected NAME=DIMS, such as images=1x3x224x224")
        if not equals and len(parts) > 1:
            raise OptionError(f"--input-shape {part!r}: of several shapes each needs the input's name")
        found[name] = shape
    return found


def named(given: Given, specs: Sequence[InputSpec], model: str) -> dict[str, tuple[int, ...]]:
    """The shapes with the input's name in place of none.

    Raises:
        OptionError: a name is no input's, or none is given and the network reads several.
    """
    known = [spec.name for spec in specs]
    read = [spec.name for spec in specs if spec.read]
    found = {}
    for name, shape in given.items():
        if (name or len(read) != 1) and name not in known:
            what = f"shape for {name!r}" if name else "shape without a name"
            raise OptionError(f"{model}: {what}; the model's inputs are {', '.join(known) or 'none'}")
        found[name or read[0]] = tuple(shape)
    return found


def sized(
    spec: InputSpec,
    given: Sequence[int] | None,
    model: str,
    *,
    size: tuple[int, int] | None = None,
    metadata: Mapping[str, str] | None = None,
    guess: tuple[int, int] = USUAL[0],
) -> Shape:
    """The input's shape with a size in each place that the file leaves open, but for the batch.

    Args:
        spec: the input.
        given: the whole shape as the user says it, if so.
        model: what messages call the network.
        size: height and width of the images that are at hand, if any.
        metadata: the network's.
        guess: height and width of images where nothing says them.

    Returns:
        Sizes; in place of the batch, and of dimensions of the same name, what the file has.

    Raises:
        OptionError: the given shape contradicts the file, or its rank is unknown and no shape is given.
    """
    where = f"{model}: input {spec.name!r}"
    if given is not None:
        if not spec.takes(given):
            raise OptionError(f"{where}: expected the shape {dims(spec.shape or ())}, got {dims(given)}")
        return (spec.shape[0] if spec.shape else given[0], *given[1:])
    if spec.shape is None:
        raise OptionError(f"{where}: its rank is not known; give --input-shape {spec.name}=1x3x224x224")
    places = [axis for axis in range(1, len(spec.shape)) if _is_open(spec.shape, axis)]
    if not places or not spec.read:
        return tuple(1 if axis in places else d for axis, d in enumerate(spec.shape))
    noted = _noted_size(metadata or {})
    sides = size or noted
    chosen = _usual(spec.shape, sides or guess, known=sides is not None)
    if size is None or len(spec.shape) != 4:
        why = "the size in its metadata" if noted and len(spec.shape) == 4 else "a usual size"
        warnings.warn(
            f"{where}: {dims(spec.shape)} leaves sizes open; it is run at {dims(with_batch(chosen, 1))}, "
            f"{why}: --input-shape {spec.name}=… says another",
            CompressWarning,
            stacklevel=2,
        )
    return chosen


def is_guessed(spec: InputSpec, metadata: Mapping[str, str]) -> bool:
    """Whether height and width are both open, and nothing tells them but what a user says."""
    shape = spec.shape or ()
    sides = (2, 3) if len(shape) == 4 and (isinstance(shape[1], int) or shape[3] is None) else (1, 2)
    return len(shape) == 4 and all(_is_open(shape, at) for at in sides) and _noted_size(metadata) is None


def _is_open(shape: Shape, axis: int) -> bool:
    """Whether the dimension has no size and is no second name of the batch."""
    size = shape[axis]
    return not isinstance(size, int) and (size is None or size != shape[0])


def _usual(shape: Shape, sides: tuple[int, int], *, known: bool) -> Shape:
    """The shape with usual sizes in its open places. known: whether the sides are more than a guess."""
    if len(shape) != 4:
        usual: list[int] = [LENGTH if len(shape) < 4 else EDGE] * len(shape)
        if len(shape) > 4:
            usual[1] = CHANNELS
    elif isinstance(shape[3], int) and not isinstance(shape[1], int):
        usual = [1, *sides, CHANNELS]
    else:
        usual = [1, CHANNELS, *sides]
        height = shape[2]
        if not known and isinstance(height, int):
            usual[3] = LINE_WIDTH if height <= LINE_HEIGHT else height
    return tuple(usual[axis] if axis and _is_open(shape, axis) else size for axis, size in enumerate(shape))


def _noted_size(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """The image size that the exporter noted."""
    try:
        value = json.loads(metadata.get("imgsz", "null"))
    except (ValueError, RecursionError):
        return None
    sides = [value, value] if isinstance(value, int) else value
    whole = isinstance(sides, list) and len(sides) == 2 and all(type(s) is int and s > 0 for s in sides)
    return (sides[0], sides[1]) if whole else None


def with_batch(shape: Shape, batch: int) -> tuple[int, ...]:
    """The shape with a batch in the places that are still open."""
    return tuple(size if isinstance(size, int) else batch for size in shape)
