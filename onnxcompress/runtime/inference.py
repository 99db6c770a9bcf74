"""What a model computes, and how far two models are apart: onnxruntime with graph optimizations off.

The optimizer would fold and fuse one of two equal graphs and not the other; without it a difference
comes from the graphs themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxcompress.errors import InputError, ModelError, OptionError, one_line
from onnxcompress.model.model_like import InputSpec, ModelLike, dims, input_specs, label
from onnxcompress.runtime.session import session

Arrays = Mapping[str, np.ndarray]

INTEGER_RANGE = 8
"""Random integers are below this: small enough for the index of any table."""
MOST = 1 << 28
"""Numbers of an input that are made: 2 GB while they are drawn."""


def random_feeds(
    model: ModelLike,
    *,
    batch: int = 2,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    fixed_batch_ok: bool = True,
) -> dict[str, np.ndarray]:
    """Random inputs: floats from N(0, 1), 8-bit integers over their range, others in [0, 8), bools.

    A symbolic first dimension becomes `batch`; a fixed one stays, unless `fixed_batch_ok` is False and
    it differs: then it is an error. `shapes` gives whole shapes by input name.
    Raises OptionError for dimensions that are not known and names that are no inputs.
    """
    specs = input_specs(model)
    given = dict(shapes or {})
    for name in given:
        if name not in {s.name for s in specs}:
            known = ", ".join(s.name for s in specs) or "none"
            raise OptionError(f"{label(model)}: shape for {name!r}; the model's inputs are {known}")
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in specs:
        shape = _resolve(spec, batch, given.get(spec.name), fixed_batch_ok, label(model))
        feeds[spec.name] = _random(rng, spec.dtype, shape)
    return feeds


def run(
    model: ModelLike, feeds: Arrays, optimize: bool = False, *, threads: int = 0
) -> dict[str, np.ndarray]:
    """All outputs by name, on the CPU. Raises ModelError where onnxruntime refuses the model or feeds."""
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


def _resolve(
    spec: InputSpec, batch: int, given: Sequence[int] | None, fixed_batch_ok: bool, model: str
) -> tuple[int, ...]:
    """The shape to feed. `given` wins, but must agree with what the model fixes."""
    where = f"{model}: input {spec.name!r}"
    ask = f"give its shape, as in --shape {spec.name}=1x3x224x224"
    if given is not None:
        fixed = spec.shape if spec.shape is not None else (None,) * len(given)
        clash = any(isinstance(f, int) and f != g for f, g in zip(fixed, given, strict=False))
        if len(fixed) != len(given) or clash:
            raise OptionError(f"{where}: expected the shape {dims(fixed)}, got {dims(given)}")
        return tuple(given)
    if spec.shape is None:
        raise OptionError(f"{where}: its rank is not known; {ask}")
    first = spec.shape[0] if spec.shape else None
    if isinstance(first, int) and first != batch and not fixed_batch_ok:
        raise OptionError(f"{where}: its batch is fixed to {first}, got {batch}; use batch {first}")
    resolved = []
    for axis, size in enumerate(spec.shape):
        if isinstance(size, int):
            resolved.append(size)
        elif axis == 0 or (size is not None and size == first):
            resolved.append(batch)
        else:
            raise OptionError(f"{where}: dimension {axis} of {dims(spec.shape)} is open; {ask}")
    if math.prod(resolved) > MOST:
        raise InputError(
            f"{where}: the shape {dims(resolved)} is too large to be fed; correct it in the file"
        )
    return tuple(resolved)


def _random(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    if dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    if dtype.kind == "b":
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    if dtype.kind not in "iu":
        raise InputError(f"no random values of type {dtype}")
    info = np.iinfo(dtype)
    low, high = (int(info.min), int(info.max) + 1) if dtype.itemsize == 1 else (0, INTEGER_RANGE)
    return np.asarray(rng.integers(low, high, shape)).astype(dtype)
