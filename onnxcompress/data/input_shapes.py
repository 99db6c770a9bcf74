"""Choose sizes for the dimensions that a network's inputs leave open.

A network with open height and width runs at any size, but running it needs one. Every command takes it from
the first of these that is there:

 1. `--input-shape`: [NAME=]1x3x320x320, with commas between several inputs;
 2. the size that images are brought to (`size=` in --preprocess or the model's metadata), or have;
 3. the size that the exporter wrote into the metadata (`imgsz`, by Ultralytics);
 4. a usual size.

A warning reports a choice by 3 or 4.

The first dimension, the batch, stays open where the file leaves it open. The file that a pass writes keeps
its open dimensions.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence

from onnxcompress.data.preprocess import PREPROCESSING, Preprocess
from onnxcompress.errors import CompressWarning, OptionError
from onnxcompress.model import Shape
from onnxcompress.model.model_like import InputSpec, dims

USUAL = ((224, 224), (48, 320), (32, 320))
"""Usual heights and widths of images: the first at which the network runs is taken."""
LINE_WIDTH, LINE_HEIGHT = 320, 96
"""Width of images whose height is fixed and at most LINE_HEIGHT, like that of a line of text."""
LENGTH, EDGE, CHANNELS = 1024, 16, 3
"""Length of sequences, edge of volumes, and number of channels where they are open."""

Given = Mapping[str, Sequence[int]]
"""Whole shapes by name of the input; the name may be empty where there is one input."""


def parse_input_shapes(text: str | None) -> dict[str, tuple[int, ...]]:
    """Read the text of --input-shape, such as `images=1x3x320x320,mask=1x320x320`.

    Args:
        text: The text; a single shape may have no name. None or empty: no shapes.

    Returns:
        Shapes by name; the name of a shape without one is empty.

    Raises:
        OptionError: The text cannot be read.
    """
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        name, equals, sizes = part.rpartition("=")
        numbers = sizes.lower().split("x")
        shape = tuple(int(size) for size in numbers if size.isdecimal())
        if len(shape) < len(numbers) or min(shape) < 1 or (equals and not name):
            raise OptionError(f"--input-shape {part!r}: expected NAME=DIMS, such as images=1x3x224x224")
        if not equals and len(parts) > 1:
            raise OptionError(f"--input-shape {part!r}: each of several shapes needs the input's name")
        shapes[name] = shape
    return shapes


def named(given: Given, specs: Sequence[InputSpec], model: str) -> dict[str, tuple[int, ...]]:
    """Give a shape without a name the name of the model's only input.

    Args:
        given: Shapes by name, as `parse_input_shapes` returns them.
        specs: The model's inputs.
        model: Name of the model in messages.

    Returns:
        Shapes by the inputs' names.

    Raises:
        OptionError: A name is not an input's, or it is missing and the network reads several inputs.
    """
    known = [spec.name for spec in specs]
    read = [spec.name for spec in specs if spec.read]
    shapes = {}
    for name, shape in given.items():
        if (name or len(read) != 1) and name not in known:
            what = f"shape for {name!r}" if name else "shape without a name"
            raise OptionError(f"{model}: {what}; the model's inputs are {', '.join(known) or 'none'}")
        shapes[name or read[0]] = tuple(shape)
    return shapes


def sized(
    spec: InputSpec,
    given: Sequence[int] | None,
    model: str,
    *,
    size: tuple[int, int] | None = None,
    metadata: Mapping[str, str] | None = None,
    guess: tuple[int, int] = USUAL[0],
) -> Shape:
    """Fill in the sizes that the file leaves open in an input's shape, except for the batch.

    Args:
        spec: The input.
        given: The whole shape that the user gives; None: choose the open sizes.
        model: Name of the model in messages.
        size: Height and width of the images that are to be used, if any.
        metadata: The model's metadata.
        guess: Height and width of images where nothing else gives them.

    Returns:
        Sizes; the batch, and dimensions with the same symbol, stay as in the file.

    Raises:
        OptionError: The given shape contradicts the file, or the rank is unknown and no shape is given.
    """
    where = f"{model}: input {spec.name!r}"
    if given is not None:
        if not spec.takes(given):
            raise OptionError(f"{where}: expected the shape {dims(spec.shape or ())}, got {dims(given)}")
        return (spec.shape[0], *given[1:]) if spec.shape else tuple(given)
    if spec.shape is None:
        raise OptionError(f"{where}: its rank is not known; give --input-shape {spec.name}=1x3x224x224")
    places = [axis for axis in range(1, len(spec.shape)) if _is_open(spec.shape, axis)]
    if not places or not spec.read:
        return tuple(1 if axis in places else d for axis, d in enumerate(spec.shape))
    size = size or _preprocessed_size(metadata or {})
    noted = _noted_size(metadata or {})
    sides = size or noted
    chosen = _usual(spec.shape, sides or guess, known=sides is not None)
    if size is None or len(spec.shape) != 4:
        why = "the size in its metadata" if noted and len(spec.shape) == 4 else "a usual size"
        warnings.warn(
            f"{where}: {dims(spec.shape)} leaves sizes open; it is run at {dims(with_batch(chosen, 1))}, "
            f"{why}: choose another with --input-shape {spec.name}=…",
            CompressWarning,
            stacklevel=2,
        )
    return chosen


def check_layout(shape: Sequence[int | str | None] | None, layout: str, where: str) -> None:
    """Check that an input whose last dimension alone can be channels gets them there.

    Args:
        shape: Shape of the input; None: unknown, nothing is checked.
        layout: The layout of the preprocessing, `nchw` or `nhwc`.
        where: The input, for a message.

    Raises:
        OptionError: Images would be read with their rows as channels.
    """
    if shape is None or len(shape) != 4:
        return
    first, last = (shape[at] in (1, 3) for at in (1, 3))
    if first != last and last != (layout == "nhwc") and not isinstance(shape[1 if last else 3], int):
        right = "nhwc" if last else "nchw"
        text = "x".join("?" if not isinstance(d, int) else str(d) for d in shape[1:])
        place = "last" if last else "first"
        raise OptionError(
            f"{where} takes {text}, with channels {place}; add layout={right} to --preprocess"
        )


def is_guessed(spec: InputSpec, metadata: Mapping[str, str]) -> bool:
    """Return whether height and width of an input are open and the metadata has no size for them.

    Args:
        spec: The input.
        metadata: The model's metadata.

    Returns:
        True where only the user could give them.
    """
    shape = spec.shape or ()
    sides = (2, 3) if len(shape) == 4 and (isinstance(shape[1], int) or shape[3] is None) else (1, 2)
    known = _preprocessed_size(metadata) or _noted_size(metadata)
    return len(shape) == 4 and all(_is_open(shape, at) for at in sides) and known is None


def _is_open(shape: Shape, axis: int) -> bool:
    """Return whether the dimension has no size and is not the batch under the same symbol."""
    size = shape[axis]
    return not isinstance(size, int) and (size is None or size != shape[0])


def _usual(shape: Shape, sides: tuple[int, int], *, known: bool) -> Shape:
    """Fill usual sizes into open places of the shape; `known`: the sides are more than a guess."""
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


def _preprocessed_size(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """Read the size that images are brought to by the metadata; a text that cannot be read says nothing."""
    try:
        return Preprocess.parse(metadata.get(PREPROCESSING, "")).size
    except OptionError:
        return None


def _noted_size(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """Read the image size that the exporter wrote into the metadata."""
    try:
        value = json.loads(metadata.get("imgsz", "null"))
    except (ValueError, RecursionError):
        return None
    sides = [value, value] if isinstance(value, int) else value
    whole = isinstance(sides, list) and len(sides) == 2 and all(type(s) is int and s > 0 for s in sides)
    return (sides[0], sides[1]) if whole else None


def with_batch(shape: Shape, batch: int) -> tuple[int, ...]:
    """Fill a batch size into the places of a shape that are still open.

    Args:
        shape: The shape.
        batch: The batch size.

    Returns:
        Sizes only.
    """
    return tuple(size if isinstance(size, int) else batch for size in shape)
