"""Inputs to judge by that no pass learned from, and random numbers as such inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnxcompress.graph.query import read_inputs
from onnxcompress.model import Model
from onnxcompress.model.model_like import input_specs
from onnxcompress.runtime.inference import random_feeds
from onnxcompress.runtime.several_inputs import several_feeds

SEED = 7_919_001
"""The first seed that is tried: far from those that people, and passes for their stages, take."""
RANDOM_ROWS = 8
EXACT_ROWS = 2
"""Rows of random numbers, two in a batch where the file leaves it open; fewer show whether a network is
still the same."""


@dataclass(frozen=True)
class UnseenInputs:
    """Inputs, and where they came from."""

    feeds: tuple[Mapping[str, np.ndarray], ...]
    """One mapping for each run: input name -> value."""
    description: str
    """For a person: `16 images of photos that no pass learned from`."""
    single: bool = False
    """Whether each run is of one input, whatever the first dimensions of its arrays are."""

    @property
    def count(self) -> int:
        """Rows of all runs."""
        if self.single:
            return len(self.feeds)
        return sum(next((len(v) for v in feed.values() if v.ndim), 1) for feed in self.feeds)

    def one_by_one(self) -> UnseenInputs:
        """Give each row a run of its own.

        Returns:
            The same inputs; arrays that have fewer rows than others stay whole.
        """
        if self.single:
            return self
        feeds = []
        for feed in self.feeds:
            rows = max((len(value) for value in feed.values() if value.ndim), default=1)
            feeds += [
                {
                    name: value[row : row + 1] if value.ndim and len(value) == rows else value
                    for name, value in feed.items()
                }
                for row in range(rows)
            ]
        return replace(self, feeds=tuple(feeds))


def has_open_sizes(model: Model) -> bool:
    """Return whether an input has an open dimension behind the first, which is taken as the batch.

    Args:
        model: The model.

    Returns:
        True also where an input has no shape at all.
    """
    shapes = [spec.shape for spec in input_specs(model)]
    return any(shape is None or any(not isinstance(d, int) for d in shape[1:]) for shape in shapes)


def random_inputs(model: Model, rows: int = RANDOM_ROWS) -> UnseenInputs:
    """Draw random numbers for any inputs.

    Args:
        model: The model that will be run.
        rows: Number of rows of all batches together, at least.

    Returns:
        The batches.

    Raises:
        CompressError: A dimension is open, or a type has no random values.
    """
    drawn = UnseenInputs((), "", single=len(read_inputs(model)) > 1)
    while drawn.count < rows:
        seed = SEED + len(drawn.feeds)
        feeds = several_feeds(model, {}, seed) if drawn.single else random_feeds(model, seed=seed)
        drawn = replace(drawn, feeds=(*drawn.feeds, feeds))
    return replace(drawn, description=f"{drawn.count} random inputs")
