"""Random inputs for models that are timed together: of one size, or their times would not compare."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from onnxcompress.data.input_shapes import is_guessed, sized
from onnxcompress.errors import CompressWarning, OptionError
from onnxcompress.model.model_like import InputSpec, ModelLike, input_specs, label, metadata_of
from onnxcompress.runtime.inference import random_feeds


def timed_feeds(
    models: Mapping[str, ModelLike], batch: int, seed: int, shapes: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, np.ndarray]]:
    """Draw random inputs for each model.

    Args:
        models: The models by name.
        batch: Images per run.
        seed: Random seed.
        shapes: Whole shapes by input name; each counts for all models that have an input of its name.

    Returns:
        An array for each input, by name, for each model. Sizes that a model leaves open, and that nothing
        but a guess gives, are those of another model's input of the same name.

    Raises:
        OptionError: No model has an input of a name, or as `random_feeds`.
    """
    inputs = {name: {s.name for s in input_specs(model)} for name, model in models.items()}
    for name in shapes:
        if name and not any(name in known for known in inputs.values()):
            known = ", ".join(sorted(set().union(*inputs.values()))) or "none"
            raise OptionError(f"shape for {name!r}: no model has this input; inputs are {known}")
    found = {}
    for name, model in models.items():
        own = {k: v for k, v in shapes.items() if not k or k in inputs[name]}
        if not own:
            own = dict(_sizes_of_others(model, [m for m in models.values() if m is not model], batch))
        found[name] = random_feeds(model, batch=batch, seed=seed, shapes=own, fixed_batch_ok=False)
    return found


def _sizes_of_others(
    model: ModelLike, others: Sequence[ModelLike], batch: int
) -> dict[str, tuple[int, ...]]:
    """Find shapes of inputs whose sizes only a guess could give."""
    found = {}
    for spec in input_specs(model):
        if spec.read and is_guessed(spec, metadata_of(model)):
            shapes = (_known(spec, other) for other in others)
            sizes = next((shape for shape in shapes if shape and spec.takes((batch, *shape[1:]))), None)
            if sizes is not None:
                found[spec.name] = (batch, *sizes[1:])
    return found


def _known(spec: InputSpec, other: ModelLike) -> tuple[int, ...] | None:
    """Return the shape of another model's input of the same name, where more than a guess gives it."""
    metadata = metadata_of(other)
    for one in input_specs(other):
        if one.name == spec.name and one.shape and not is_guessed(one, metadata):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CompressWarning)
                shape = sized(one, None, label(other), metadata=metadata)
            return (1, *(size for size in shape[1:] if isinstance(size, int)))
    return None
