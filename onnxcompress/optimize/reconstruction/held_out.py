"""Inputs kept aside from all learning, and how far a student's features are from the teacher's there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onnxcompress.data.image_set import ImageSet
from onnxcompress.errors import CompressWarning
from onnxcompress.formatting import counted
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import Inputs
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.synthesis.synthetic_inputs import synthetic_images

EVERY = 8
"""One of so many inputs is kept aside."""
MOST = 64
"""Inputs kept aside, at most: more tell the same and are missing where something learns from them."""
FEWEST = 4
"""Inputs kept aside that are worth judging by; where they would be fewer, MADE others are made instead."""
MADE = 32
SEED = 5_200_003
"""Added to the seed of inputs that are made to judge by: far from those that people take."""


def keep_aside(
    model: Model, inputs: Inputs, values: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Divide inputs into those to learn from and those to judge by.

    Those kept aside are evenly spread, so that each source and each class has its share.

    Args:
        model: The network that takes the inputs.
        inputs: The inputs.
        values: Their values, as the network takes them, (N, …).
        seed: Random seed of inputs that are made to judge by, where there are too few to divide.

    Returns:
        The values to learn from, those to judge by, and how often each of the first is drawn, relative to
        the others; None: equally often.
    """
    shares, count = inputs.shares(), len(values)
    every = max(EVERY, -(-count // MOST))
    aside = torch.arange(count) % every == every - 1
    if int(aside.sum()) < FEWEST:
        warnings.warn(
            f"{counted(count, 'input')} to learn from: too few to keep some of them aside; what is kept, "
            f"and the error that is shown, go by {MADE} made images",
            CompressWarning,
            stacklevel=2,
        )
        how = inputs.images.preprocess if isinstance(inputs.images, ImageSet) else None
        made = synthetic_images(model, "procedural", MADE, how, seed + SEED)
        return values, torch.from_numpy(made.array()), shares
    return values[~aside], values[aside], None if shares is None else shares[~aside]


class HeldOut:
    """Inputs kept aside, with the teacher's features of them."""

    def __init__(
        self, teacher: Executor, images: Tensor, source: str, feature: str, *, batch: int = 64
    ) -> None:
        """Compute the teacher's features.

        Args:
            teacher: The network that gives the target.
            images: The inputs as the network takes them, (N, …).
            source: Name of the input.
            feature: Name of the feature tensor in the teacher.
            batch: Inputs that run at once.
        """
        self.images, self.source, self.batch = images.to(teacher.device), source, batch
        self.wanted = teacher.run_batched({source: self.images}, [feature], count=len(images), batch=batch)[
            feature
        ]
        self.energy = max(float(self.wanted.double().square().sum()), 1e-30)

    def error(self, student: Executor, feature: str, values: Mapping[str, Tensor] | None = None) -> float:
        """Compute the relative squared error of a student's features.

        Args:
            student: The student.
            feature: Name of the feature tensor in the student.
            values: Initializer -> value to use in place of the student's own.

        Returns:
            ‖s − t‖² / ‖t‖²; infinite where a feature is not finite.
        """
        feeds, count = {self.source: self.images}, len(self.images)
        made = student.run_batched(feeds, [feature], count=count, batch=self.batch, parameters=values)
        error = float((made[feature].double() - self.wanted.double()).square().sum()) / self.energy
        return error if error < float("inf") else float("inf")

    def mean_squares(self, teacher: Executor, names: Sequence[str]) -> list[float]:
        """Compute the mean square of some of the teacher's tensors.

        Args:
            teacher: The network that gives the target.
            names: Names of tensors.

        Returns:
            One value for each.
        """

        def sums(made: dict[str, Tensor]) -> list[float]:
            return [float(made[name].double().square().mean()) * len(made[name]) for name in names]

        feeds, count = {self.source: self.images}, len(self.images)
        parts = teacher.map_batches(feeds, names, sums, count=count, batch=self.batch)
        return [sum(column) / count for column in zip(*parts, strict=True)]
