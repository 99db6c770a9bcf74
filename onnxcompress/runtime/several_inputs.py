"""Shapes and values for a network that reads several inputs, such that onnxruntime runs it.

Their sizes depend on each other, and the file may leave them open. The batch is 1: the first dimension of
every input, and each of the same name. Dimensions of one name have one size; other open dimensions are
as `data.input_shapes` describes in the first input that has some, and 1 in those behind it.

One integer or bool alone is a setting, as a sample rate: it holds the number that the graph compares it
with, else 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxcompress.data.input_shapes import LENGTH, Given, named, sized, with_batch
from onnxcompress.errors import CompressWarning, ModelError
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.query import is_op, read_inputs
from onnxcompress.model import Model, Shape
from onnxcompress.model.model_like import InputSpec, dims, input_specs
from onnxcompress.runtime.inference import random_feeds, run

LENGTHS = (LENGTH, 512, 256)
"""Lengths of sequences that are tried where the file leaves them open: audio comes in frames of 512."""
PASSING = ("Reshape", "Squeeze", "Unsqueeze", "Gather", "Cast", "Identity")
"""Operators that pass a number on."""

Shapes = Mapping[str, tuple[int, ...]]


def read_specs(model: Model) -> list[InputSpec]:
    """Describe the inputs that the network reads.

    Args:
        model: The network.

    Returns:
        Their specifications, in order.
    """
    return [spec for spec in input_specs(model) if spec.read]


def settings(model: Model) -> dict[str, int]:
    """Choose the numbers of inputs that are one integer or bool alone.

    Args:
        model: The network.

    Returns:
        The numbers by name of the input.
    """
    return {s.name: _compared(model, s.name) for s in read_specs(model) if _is_setting(s)}


def shapes_that_run(model: Model, given: Given) -> dict[str, tuple[int, ...]]:
    """Choose a shape for each input that the network reads.

    Args:
        model: The network.
        given: Shapes by name, which the user says.

    Returns:
        Shapes by name, with a batch of 1.

    Raises:
        ModelError: onnxruntime does not run the network at the shapes that were tried.
        OptionError: A shape contradicts the file, or its rank is not known.
    """
    read, said = read_specs(model), named(given, input_specs(model), model.name)
    reason: ModelError | None = None
    shapes: dict[str, tuple[int, ...]] = {}
    for length in LENGTHS:
        shapes = _shapes(read, said, model, length)
        try:
            run(model, several_feeds(model, shapes))
        except ModelError as error:
            reason = reason or error
        else:
            return shapes
    text = ",".join(f"{name}={dims(shape)}" for name, shape in shapes.items() if shape)
    raise ModelError(
        f"{model.name}: it reads several inputs, and does not run at {text} ({reason}); give the shapes "
        f"that it has in use with --input-shape {text}"
    )


def several_feeds(model: Model, shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw all inputs at random, but for settings.

    Args:
        model: The network.
        shapes: Shapes by name.
        seed: Random seed.

    Returns:
        An array for each input, by name.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressWarning)
        feeds = random_feeds(model, batch=1, seed=seed, shapes=shapes)
    held = settings(model)
    return {name: np.full_like(x, held[name]) if name in held else x for name, x in feeds.items()}


def _shapes(
    read: Sequence[InputSpec], said: Shapes, model: Model, length: int
) -> dict[str, tuple[int, ...]]:
    """Choose a shape for each input; sequences of unknown length get this one."""
    sizes = {s.shape[0]: 1 for s in read if s.shape and isinstance(s.shape[0], str)}
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in read:
        behind = any(len(shape) > 1 for shape in shapes.values())
        own, given = spec.shape, said.get(spec.name)
        if own is not None and given is None:
            own = _own_shape(own, sizes, 1 if behind else length)
        chosen = sized(replace(spec, shape=own), given, model.name, metadata=model.metadata)
        shapes[spec.name] = shape = with_batch(chosen, 1)
        sizes |= {d: size for d, size in zip(spec.shape or (), shape, strict=False) if isinstance(d, str)}
    return shapes


def _own_shape(shape: Shape, sizes: Mapping[str, int], other: int) -> Shape:
    """Fill in known sizes, and `other` where none is known; heights and widths of pictures stay open."""
    known = [sizes.get(d, d) if isinstance(d, str) else d for d in shape]
    if known and not isinstance(known[0], int):
        known[0] = 1
    return tuple(d if isinstance(d, int) or len(shape) == 4 else other for d in known)


def _is_setting(spec: InputSpec) -> bool:
    """Return whether an input is one integer or bool, whatever the batch."""
    return spec.dtype.kind in "iub" and spec.shape is not None and all(size == 1 for size in spec.shape)


def _compared(model: Model, name: str) -> int:
    """Return the number that the graph compares an input with; 1 where it compares it with none."""
    pending, seen = [t for t in read_inputs(model) if t.name == name], set[str]()
    while pending:
        tensor = pending.pop()
        seen.add(str(tensor.name))
        for node in tensor.outputs:
            if is_op(node, "Equal"):
                values = [constant_value(model, t) for t in node.inputs if t is not tensor]
                if values and values[0] is not None and values[0].size == 1:
                    return int(values[0].reshape(()))
            elif is_op(node, *PASSING):
                pending += [t for t in node.outputs if t.name not in seen]
    return 1
