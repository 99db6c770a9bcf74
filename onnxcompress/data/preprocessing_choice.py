"""Choose how images are preprocessed: as the user says, as the model's metadata has it, or a default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcompress.data.preprocess import PREPROCESSING, PRESETS, Preprocess
from onnxcompress.errors import OptionError

SIGNED = Preprocess(mean=(128.0,), scale=1.0)
"""For inputs of type int8: pixels from −128 to 127."""


@dataclass(frozen=True)
class PreprocessingChoice:
    """The preprocessing that a command uses, and where it comes from."""

    explicit: Preprocess | None
    """The preprocessing that the user or the model's metadata specifies; None: neither does."""
    source: str
    """Where it comes from: option, model (its metadata) or default; for an option without a preset also
    what completes it: option-and-model or option-and-default."""
    base: Preprocess = PRESETS["unit"]
    """The default."""

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing of real images."""
        return self.explicit or self.base

    def as_dict(self) -> dict[str, str]:
        """Convert the choice to JSON values.

        Returns:
            The keys preprocess and preprocess_from.
        """
        return {"preprocess": str(self.preprocess), "preprocess_from": self.source}

    def __str__(self) -> str:
        """Describe the preprocessing and its source for people."""
        return preprocess_text(str(self.preprocess), self.source)


_SOURCES = {
    "option": "as asked for",
    "option-and-model": "as asked for, the rest from the model's metadata",
    "option-and-default": "as asked for, with default mean and std: neither --preprocess nor the model's "
    "metadata has them",
    "model": "from the model's metadata",
    "default": "the default, because neither --preprocess nor the model's metadata specifies it",
}


def base_for(dtype: np.dtype[Any] | None) -> Preprocess:
    """Return the default preprocessing for an input of a type.

    Args:
        dtype: Element type of the input; None: unknown.

    Returns:
        `unit`, or for integers the pixels as they are.
    """
    if dtype is None or dtype.kind not in "iu":
        return PRESETS["unit"]
    return SIGNED if dtype == np.int8 else PRESETS["raw"]


def choose(
    given: str | None,
    metadata: Mapping[str, str],
    model: str = "the model",
    dtype: np.dtype[Any] | None = None,
) -> PreprocessingChoice:
    """Choose the preprocessing: from the option, else from the model's metadata, else the default.

    Pairs without a preset, such as `size=24`, change what the metadata has and leave the rest of it.

    Args:
        given: The text of --preprocess; None: the option is not given.
        metadata: Metadata of the model.
        model: Name of the model in messages.
        dtype: Element type of its input; it decides the default, see `base_for`.

    Returns:
        The preprocessing and where it comes from.

    Raises:
        OptionError: A text cannot be read, or gives an input of integers fractions.
    """
    base = base_for(dtype)
    words = [] if given is None else given.split()
    if given is not None and words and "=" not in words[0]:
        return _whole(PreprocessingChoice(Preprocess.parse(given, base), "option", base), dtype, model)
    text = metadata.get(PREPROCESSING)
    if given is not None and (text is None or _says_all(words)):
        source = "option" if _says_all(words) else "option-and-default"
        return _whole(PreprocessingChoice(Preprocess.parse(given, base), source, base), dtype, model)
    if text is None:
        return PreprocessingChoice(None, "default", base)
    try:
        own = Preprocess.parse(text, base)
        if given is None:
            return _whole(PreprocessingChoice(own, "model", base), dtype, model)
        return _whole(
            PreprocessingChoice(Preprocess.parse(given, own), "option-and-model", base), dtype, model
        )
    except OptionError as error:
        raise OptionError(
            f"{model}: its metadata {PREPROCESSING!r} cannot be used ({error}); give --preprocess"
        ) from error


def _says_all(words: Sequence[str]) -> bool:
    """Return whether pairs specify how pixels are normalized."""
    return {"mean", "std"} <= {word.partition("=")[0] for word in words}


def preprocess_text(text: str, source: str) -> str:
    """Describe a preprocessing and its source for people.

    Args:
        text: The preprocessing, as `str` formats it.
        source: Where it comes from, see `PreprocessingChoice.source`.

    Returns:
        A clause such as `preprocessed by … (from the model's metadata)`.
    """
    return f"preprocessed by {text} ({_SOURCES[source]})"


def _whole(choice: PreprocessingChoice, dtype: np.dtype[Any] | None, model: str) -> PreprocessingChoice:
    """Check that an input of integers gets whole numbers. Raises OptionError."""
    if dtype is not None and dtype.kind in "iu":
        p = choice.preprocess
        channels = max(len(p.mean), len(p.std))
        levels = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, -1, 1, 1), channels, 3)
        x = p.normalize(levels)
        own = "raw mean=128" if dtype == np.int8 else "raw"
        if not np.array_equal(x, np.round(x)):
            raise OptionError(
                f"{model}: its input takes {dtype} pixels; use --preprocess {own!r}, not other mean and std"
            )
        ends = np.iinfo(dtype)
        if x.min() < ends.min or x.max() > ends.max:
            raise OptionError(
                f"{model}: its input takes {dtype} pixels, from {ends.min} to {ends.max}, and would get "
                f"some from {x.min():g} to {x.max():g}; use --preprocess {own!r}"
            )
    return choice
