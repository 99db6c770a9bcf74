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
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.device import fitting
from onnxcompress.optimize.effort import TUNING_BATCH, TUNING_RATE
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.open_batch import small_batch
from onnxcompress.optimize.reconstruction.feature_loss import Matched
from onnxcompress.optimize.reconstruction.finetune import Finetuned, Schedule, finetune
from onnxcompress.optimize.reconstruction.held_out import HeldOut
from onnxcompress.optimize.reconstruction.residual_refit import RefitSettings, ResidualRefit
from onnxcompress.optimize.reconstruction.ridge import TARGET_MADE, TARGET_REAL
from onnxcompress.optimize.reconstruction.tuning_inputs import TuningInputs
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.optimize.tuning_options import TuningOptions
from onnxcompress.progress import Progress

REFIT_IMAGES = 500
"""Images that layers are refitted on, at most."""
MAX_BATCH = 125
"""Images that run at once when nothing is trained, at most."""


@dataclass(frozen=True)
class Repair:
    """Refits and fine-tunes a student, the network without its dropped blocks, to the teacher."""

    options: TuningOptions
    model: Model
    """The student; `run` changes its weights in place."""
    whole: Model
    """The network with all its blocks."""
    teacher: Executor
    """The same."""
    matched: Matched
    """The tensors of student and teacher that are brought together."""
    inputs: TuningInputs
    alignment: StatisticsAlignment | None
    """The alignment that both networks run with, which is taken back at the end; None: none."""
    device: str
    scoring_batch: int
    """Images that run at once when nothing is trained."""
    progress: Progress

    def run(self, adapted: Mapping[str, Tensor]) -> tuple[float, TuningOutcome | None]:
        """Refit and fine-tune the student, and store its new weights in the model.

        Args:
            adapted: Initializer -> value with the adapters of the dropped blocks folded in.

        Returns:
            The relative squared error of the features on the inputs kept aside, and the outcome of
            fine-tuning; None: there was none.

        Raises:
            ModelError: A weight became infinite.
            RuntimeUnavailable: The memory of the device does not hold even a few images.
        """
        student = Executor.from_model(self.model, device=self.device)
        weights = {n: w for n, w in adapted.items() if n in student.parameters}
        if [tensor.name for tensor in self.whole.analysis(Topology).trunk()[:1]] == [self.matched.source]:
            weights = fitting(
                "refitting layers", small_batch(self.model, MAX_BATCH, self.device), self._refit
            )
        held_out = fitting("judging", self.scoring_batch, self._held_out)
        outcome = None
        if (self.options.steps or self.options.tuning_seconds) and self.alignment is None:
            tuned = fitting(
                "fine-tuning",
                self.options.batch or TUNING_BATCH,
                lambda batch: self._finetune(student, weights, held_out, batch),
            )
            weights, outcome = tuned.values, tuned.outcome
        self._store(weights)
        error = held_out.error(Executor.from_model(self.model, device=self.device), self.matched.feature[0])
        if self.alignment is not None:
            self.alignment.revert(self.model)
            self._store(self.alignment.restored(weights))
        return error, outcome

    def _held_out(self, batch: int) -> HeldOut:
        source, feature = self.matched.source, self.matched.feature[1]
        return HeldOut(self.teacher, self.inputs.aside, source, feature, batch=batch)

    def _refit(self, batch: int) -> dict[str, Tensor]:
        ridge = TARGET_REAL if self.inputs.gathered.real else TARGET_MADE
        settings = RefitSettings(batch=batch, seed=self.options.seed, ridge=ridge)
        refit = ResidualRefit.of(self.whole, self.model, self.matched.feature[1], settings, self.device)
        return refit.run(self.inputs.images[:REFIT_IMAGES], self.progress)

    def _finetune(
        self, student: Executor, start: dict[str, Tensor], held_out: HeldOut, batch: int
    ) -> Finetuned:
        rate = self.options.learning_rate or TUNING_RATE
        schedule = Schedule(
            steps=self.options.steps or 0,
            batch=batch,
            learning_rate=rate * batch / (self.options.batch or TUNING_BATCH),  # the memory holds fewer
            seed=self.options.seed,
            captured=self.options.capture,
            seconds=self.options.tuning_seconds,
        )
        return finetune(
            student, self.teacher, self.matched, self.inputs.images, schedule, held_out,
            start=start, shares=self.inputs.shares, nhwc=self.inputs.nhwc, progress=self.progress,
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
