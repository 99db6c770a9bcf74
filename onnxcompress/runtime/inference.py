"""Run a model on arrays, in onnxruntime with graph optimizations off, and make random inputs for it.

The optimizer would fold and fuse one of two equal graphs and not the other; without it a difference
comes from the graphs themselves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np

from onnxcompress.data.input_shapes import USUAL, is_guessed, named, sized, with_batch
from onnxcompress.errors import CompressWarning, InputError, ModelError, OptionError, one_line
from onnxcompress.model.model_like import InputSpec, ModelLike, dims, input_specs, label, metadata_of
from onnxcompress.runtime.providers import ProviderLike
from onnxcompress.runtime.session import session

Arrays = Mapping[str, np.ndarray]
T = TypeVar("T")

INTEGER_RANGE = 8
"""Random integers are below this: small enough for the index of any table."""
MOST = 1 << 28
"""Largest number of elements of a random input: 2 GB while they are drawn."""


def random_feeds(
    model: ModelLike,
    *,
    batch: int = 2,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    fixed_batch_ok: bool = True,
) -> dict[str, np.ndarray]:
    """Draw random inputs: floats from N(0, 1), 8-bit integers over their range, others in [0, 8), bools.

    Args:
        model: The model to make inputs for.
        batch: Size of a symbolic first dimension.
        seed: Random seed.
        shapes: Whole shapes by input name, "" for a model's only input; other open sizes are chosen as
            `data.input_shapes` describes.
        fixed_batch_ok: Keep a first dimension that the file fixes to another size than `batch`; False
            raises instead.

    Returns:
        An array for each input, by name.

    Raises:
        OptionError: A name is not an input's, a shape contradicts the file, or the batch is fixed.
        InputError: A shape is too large, or an input has a type without random values.
    """
    specs = input_specs(model)
    given = named(shapes or {}, specs, label(model))
    metadata = metadata_of(model)
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in specs:
        shape = given.get(spec.name)
        if shape is None:
            _check_batch(spec, batch, fixed_batch_ok, label(model))
            guess = usual_size(model, spec)
            shape = with_batch(sized(spec, None, label(model), metadata=metadata, guess=guess), batch)
        else:
            sized(spec, shape, label(model))  # raises where the shape contradicts the file
        if math.prod(shape) > MOST:
            raise InputError(
                f"{label(model)}: input {spec.name!r}: the shape {dims(shape)} is too large to be fed; "
                "correct it in the file, or give --input-shape"
            )
        feeds[spec.name] = random_values(rng, spec.dtype, shape)
    return feeds


def usual_size(model: ModelLike, spec: InputSpec) -> tuple[int, int]:
    """Choose a height and width for an input that leaves both open: the first usual ones at which it runs.

    Args:
        model: The model; it is run on random inputs.
        spec: The input.

    Returns:
        Height and width in pixels.
    """
    first, *others = USUAL
    if not spec.read or not is_guessed(spec, metadata_of(model)) or find_spec("onnxruntime") is None:
        return first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressWarning)
        for sides in (first, *others):
            shape = with_batch(sized(spec, None, label(model), guess=sides), 1)
            if _runs(model, random_feeds(model, batch=1, shapes={spec.name: shape})):
                return sides
    return first


def _runs(model: ModelLike, feeds: Arrays) -> bool:
    """Return whether onnxruntime runs the model on these inputs; nothing is logged."""
    import onnxruntime as ort

    options = ort.RunOptions()
    options.log_severity_level = 4
    try:
        session(model, provider="cpu", optimize=False).run(None, dict(feeds), options)
    except Exception:  # onnxruntime's exceptions have no common base
        return False
    return True


def unread_feeds(model: ModelLike) -> dict[str, np.ndarray]:
    """Make zeros for the inputs that no node reads: onnxruntime requires them all the same.

    Args:
        model: The model.

    Returns:
        An array for each unread input, by name.
    """
    return {
        spec.name: np.zeros(with_batch(spec.shape or (), 1), spec.dtype)
        for spec in input_specs(model)
        if not spec.read
    }


def run(
    model: ModelLike, feeds: Arrays, optimize: bool = False, *, threads: int = 0
) -> dict[str, np.ndarray]:
    """Run a model once on the CPU.

    Args:
        model: The model.
        feeds: An array for each input, by name.
        optimize: Let onnxruntime optimize the graph.
        threads: Threads of one operator; 0: the available cores.

    Returns:
        All outputs by name.

    Raises:
        ModelError: onnxruntime refuses the model or its inputs, or an output is not a tensor.
    """
    opened = session(model, provider="cpu", threads=threads, optimize=optimize)
    names = [o.name for o in opened.get_outputs()]
    try:
        values = opened.run(names, dict(feeds))
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise ModelError(f"{label(model)}: the run failed ({one_line(error)})") from error
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, np.ndarray):
            raise ModelError(f"{label(model)}: output {name!r} is not a tensor; not handled")
    return dict(zip(names, values, strict=True))


def run_each(
    model: ModelLike, feeds: Sequence[Arrays], *, optimize: bool = True, provider: ProviderLike = "cpu"
) -> dict[str, list[np.ndarray]]:
    """Run a model on several inputs, one after the other.

    Args:
        model: The model.
        feeds: For each run an array for each input, by name.
        optimize: Let onnxruntime optimize the graph.
        provider: The execution provider.

    Returns:
        Output name -> its value in each run.

    Raises:
        ModelError: onnxruntime refuses the model or its inputs, or an output is not a tensor of numbers.
    """
    import onnxruntime as ort

    opened = session(model, provider=provider, optimize=optimize)
    names = [output.name for output in opened.get_outputs()]
    silent = ort.RunOptions()
    silent.log_severity_level = 4  # what it would print is in the error
    runs: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for feed in feeds:
        try:
            values = opened.run(names, dict(feed), silent)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ModelError(f"{label(model)}: the run failed ({one_line(error)})") from error
        for name, value in zip(names, values, strict=True):
            if not hasattr(value, "dtype") or value.dtype.kind not in "fiub":
                raise ModelError(f"{label(model)}: output {name!r} is no tensor of numbers; not handled")
            runs[name].append(value)
    return runs


def feeds_for(model: ModelLike, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename inputs of a reference to another model's input names, by order where the names differ.

    Args:
        model: The other model.
        feeds: Arrays by input name of the reference.

    Returns:
        Arrays by input name of `model`, floats in the precision that it takes.

    Raises:
        ModelError: The models differ in the number or the shapes of inputs.
    """
    specs = input_specs(model)
    if len(specs) != len(feeds):
        raise ModelError(f"the models have {len(feeds)} and {len(specs)} inputs; expected as many")
    by_name = {s.name for s in specs} == set(feeds)
    sources = [s.name for s in specs] if by_name else list(feeds)
    for spec, source in zip(specs, sources, strict=True):
        if not spec.takes(feeds[source].shape):
            got, expected = dims(feeds[source].shape), dims(spec.shape or ())
            raise ModelError(
                f"{label(model)}: input {spec.name!r} takes {expected}, the other model's {got}; only "
                "models with the same inputs can be compared"
            )
    return {s.name: _as_float(feeds[source], s.dtype) for s, source in zip(specs, sources, strict=True)}


def _as_float(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Convert floats to the model's type: a float16 model is compared with its float32 original."""
    return values.astype(dtype, copy=False) if values.dtype.kind == dtype.kind == "f" else values


def or_one_by_one(compute: Callable[[int], T], batch: int) -> T:
    """Compute at a batch; where that fails, with one image at a time.

    Many files leave the batch open and yet hold a batch of 1 in the target of a Reshape.

    Args:
        compute: Takes the number of images that run at once.
        batch: The number to try first.

    Returns:
        What `compute` returns.

    Raises:
        ModelError: It fails with both; the reason is that of the first.
    """
    try:
        return compute(batch)
    except ModelError:
        if batch > 1:
            with suppress(ModelError):
                return compute(1)
        raise


def _check_batch(spec: InputSpec, batch: int, fixed_batch_ok: bool, model: str) -> None:
    """Raise OptionError for a batch that the file does not take."""
    first = spec.shape[0] if spec.shape else None
    if isinstance(first, int) and first != batch and not fixed_batch_ok:
        raise OptionError(
            f"{model}: input {spec.name!r}: its batch is fixed to {first}, got {batch}; use batch {first}"
        )


def random_values(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Draw random numbers of a type, as `random_feeds` describes.

    Args:
        rng: Source of randomness.
        dtype: Element type.
        shape: Shape of the array.

    Returns:
        The array.

    Raises:
        InputError: The type is neither a number nor a bool.
    """
    if dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    if dtype.kind == "b":
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    if dtype.kind not in "iu":
        raise InputError(f"no random values of type {dtype}")
    info = np.iinfo(dtype)
    low, high = (int(info.min), int(info.max) + 1) if dtype.itemsize == 1 else (0, INTEGER_RANGE)
    return np.asarray(rng.integers(low, high, shape)).astype(dtype)
