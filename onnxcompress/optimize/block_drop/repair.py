"""The repair of a network from which blocks were dropped: layers refitted, then all fine-tuned.

The layers behind a dropped block are refitted in closed form (`residual_refit`). Then all that the features
depend on is fine-tuned to the original's features; not where the networks are aligned with their recorded
statistics (`statistics_alignment`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onnxcompress.errors import ModelError
from onnxcompress.graph.edit import set_values
from onnxcompress.graph.query import read
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop.options import DropBlocksOptions
from onnxcompress.optimize.block_drop.recoverability import SCORING_IMAGES
from onnxcompress.optimize.calibration import Inputs
from onnxcompress.optimize.device import fitting
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction.finetune import Schedule, finetune
from onnxcompress.optimize.reconstruction.residual_refit import (
    RIDGE,
    RIDGE_SYNTHETIC,
    Reconstruction,
    Segment,
    segments,
)
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.progress import Progress

REFIT_IMAGES = 500
"""Images that layers are refitted on, at most."""
REFIT_BYTES = 1 << 30
"""Memory that one tensor of all those images may take; refitting holds about four."""
BATCH_BYTES = 16 << 20
"""Memory that one tensor of a batch may take: beyond, each is new memory that the system has to clear."""
MAX_BATCH = 125


@dataclass(frozen=True)
class Repair:
    """Refits and fine-tunes a student, the network without its dropped blocks, to the teacher."""

    options: DropBlocksOptions
    model: Model
    """The student; `run` changes its weights in place."""
    teacher: Executor
    source: str
    """Name of the input."""
    student_feature: str
    """The tensor of the student that is matched with `feature`."""
    feature: str
    """The tensor of the teacher whose values are the features."""
    inputs: Inputs
    images: Tensor
    """The inputs as normalized values, (N, C, H, W), or (N, H, W, C) with `nhwc`."""
    nhwc: bool
    twin: StatisticsAlignment | None
    """The alignment that both networks run with, which is taken back at the end; None: none."""
    device: str
    scoring_batch: int
    """Images that run at once when nothing is trained."""
    progress: Progress

    def run(self, adapted: Mapping[str, Tensor]) -> float:
        """Refit and fine-tune the student, and store its new weights in the model.

        Args:
            adapted: Initializer -> value with the adapters of the dropped blocks folded in.

        Returns:
            The relative squared error of the features, on inputs that are not augmented.

        Raises:
            ModelError: A weight became infinite.
            RuntimeUnavailable: The memory of the device does not hold even a few images.
        """
        student = Executor.from_model(self.model, device=self.device)
        pieces = segments(self.model, self.student_feature)
        weights = {n: w for n, w in adapted.items() if n in student.parameters}
        if pieces and pieces[0].start == self.source:
            weights = fitting(
                "refitting layers",
                inference_batch(self.model),
                lambda batch: self._refit(student, pieces, batch),
            )
        if self.options.steps and self.twin is None:
            weights = fitting(
                "fine-tuning", self.options.batch, lambda batch: self._finetune(student, weights, batch)
            )
        self._store(weights)
        error = self._feature_error()
        if self.twin is not None:
            self.twin.revert(self.model)
            self._store(self.twin.restored(weights))
        return error

    def _refit(self, student: Executor, pieces: list[Segment], batch: int) -> dict[str, Tensor]:
        largest = max(elements(tensor_shapes(self.model)[piece.end]) for piece in pieces)
        count = max(8, min(REFIT_IMAGES, len(self.images), REFIT_BYTES // (4 * largest)))
        refit = Reconstruction(
            student,
            self.teacher,
            pieces,
            batch=batch,
            seed=self.options.seed,
            ridge=RIDGE if self.inputs.real else RIDGE_SYNTHETIC,
        )
        return refit.run(self.images[:count].to(self.device), self.progress)

    def _finetune(self, student: Executor, start: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
        schedule = Schedule(
            steps=self.options.steps or 0,
            batch=batch,
            learning_rate=self.options.learning_rate,
            seed=self.options.seed,
            captured=self.options.capture,
        )
        return finetune(
            student, self.teacher, start, self.images, self.source,
            (self.student_feature, self.feature), schedule,
            shares=self.inputs.shares(), nhwc=self.nhwc, progress=self.progress,
        )  # fmt: skip

    def _store(self, weights: dict[str, Tensor]) -> None:
        """Put the new values into the model, in its own types."""
        tensors = self.model.graph.tensors()
        for name, value in weights.items():
            dtype = read(tensors[name]).dtype
            new = value.detach().to("cpu", torch.float32).numpy().astype(dtype)
            if not np.isfinite(new).all():
                raise ModelError(
                    f"{self.model.name}: weight {name!r} became infinite; try a smaller --learning-rate"
                )
            set_values(tensors[name], np.ascontiguousarray(new))
        self.model.touch()

    def _feature_error(self) -> float:
        """Compute the relative squared error of the features on the images, without augmentation."""
        student = Executor.from_model(self.model, device=self.device)
        lost = energy = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for part in torch.split(self.images[:SCORING_IMAGES], self.scoring_batch):
                feeds = {self.source: part.to(self.device)}
                wanted = self.teacher.run(feeds, [self.feature])[self.feature].double()
                got = student.run(feeds, [self.student_feature])[self.student_feature].double()
                lost = lost + (got - wanted).square().sum()
                energy = energy + wanted.square().sum()
        return float(lost) / max(float(energy), 1e-30)


def elements(shape: tuple[int | str | None, ...]) -> int:
    """Count the numbers that a tensor holds for one image.

    Args:
        shape: The tensor's shape, (N, …).

    Returns:
        The product of the sizes behind the batch; sizes that are open count as 1.
    """
    count = 1
    for dim in shape[1:]:
        count *= dim if isinstance(dim, int) else 1
    return count


def inference_batch(model: Model) -> int:
    """Choose how many images run at once when nothing is trained: larger tensors cost more than they gain.

    Args:
        model: The network.

    Returns:
        The number of images, from 1 to MAX_BATCH.
    """
    largest = max((elements(shape) for shape in tensor_shapes(model).values() if len(shape) > 2), default=1)
    return max(1, min(MAX_BATCH, BATCH_BYTES // (4 * largest)))
