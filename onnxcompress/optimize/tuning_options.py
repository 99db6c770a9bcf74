"""Options of passes that make a network smaller, tune what is left to the original, and time it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from onnxcompress.errors import OptionError
from onnxcompress.model import Model
from onnxcompress.optimize.effort import (
    DROP_BLOCKS,
    GPU_TUNING_BATCH,
    TIMING,
    TUNING_BATCH,
    TUNING_RATE,
    announce,
    choose_effort,
)
from onnxcompress.optimize.input_options import InputOptions
from onnxcompress.option_fields import option, parse_duration
from onnxcompress.progress import Progress
from onnxcompress.runtime.timing_options import RuntimeOptions

Options = TypeVar("Options", bound="TuningOptions")


@dataclass(frozen=True)
class TuningOptions(RuntimeOptions, InputOptions):
    """How a smaller network is tuned to the original's features, and on what it is timed."""

    latency_reduction: float | None = option(
        None,
        "Target: until onnxruntime takes this much less time on --provider, in percent.",
        metavar="PCT",
        target=True,
        gt=0,
        lt=100,
    )
    steps: int | None = option(
        None,
        "Steps of fine-tuning: more take longer and lose less; 0: none, for a first look. The "
        "default depends on --effort, and is higher on a GPU.",
        metavar="N",
        ge=0,
    )
    time: str | None = option(
        None,
        "Time for fine-tuning, such as 90s or 5m, in place of --steps; the --steps that give the "
        "same file are printed.",
        metavar="TIME",
    )
    feature: str | None = option(
        None,
        "Tensor that is to stay as it was; default: the one before the global pool. Name one "
        "where there is no such pool, as in detectors.",
        advanced=True,
    )
    batch: int | None = option(
        None,
        f"Images in a step of fine-tuning; fewer need less memory. The default is {TUNING_BATCH}, and "
        f"{GPU_TUNING_BATCH} on a GPU.",
        advanced=True,
        ge=1,
    )
    learning_rate: float | None = option(
        None,
        "Peak rate of fine-tuning, relative to a weight's size; lower it where a weight becomes infinite. "
        f"The default is {TUNING_RATE} for {TUNING_BATCH} images in a step, in proportion for others.",
        advanced=True,
        gt=0,
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Where torch optimizes; auto: cuda where torch has it.", advanced=True
    )
    capture: bool = option(
        True,
        "On a GPU, replay a step of fine-tuning as a CUDA graph, several times as fast; leave it out where "
        "memory is short.",
        advanced=True,
    )

    def check(self) -> None:
        """Check that all values are in range, and that the provider is known.

        Raises:
            OptionError: They are not.
        """
        super().check()
        self.runs_on  # noqa: B018  it checks itself
        if self.tuning_seconds is not None and self.steps is not None:
            raise OptionError("give --steps or --time, not both")

    @property
    def tuning_seconds(self) -> float | None:
        """Time for fine-tuning, where it is given. Raises OptionError for no duration."""
        return None if self.time is None else parse_duration("time", self.time)

    def hints(self) -> list[str]:
        """Suggest options that leave more of the network as it is.

        Returns:
            Options with their values, as on the command line, or in words.
        """
        best = DROP_BLOCKS["best"]
        steps = 2 * max(self.steps or 0, best.gpu_steps if self._on_gpu else best.steps)
        found = [f"--steps {steps}" if self.time is None else "a longer --time"]
        return found + ([] if self.images else ["--images with a few hundred real ones"])

    def with_counts(self: Options, name: str, model: Model) -> Options:
        """Resolve the effort, and take the counts that it stands for where no option gives them.

        Args:
            name: Name of the pass.
            model: The network.

        Returns:
            The options with the effort and all counts.
        """
        effort = choose_effort(self.effort, model, name, DROP_BLOCKS["best"].inputs)
        work, on_gpu = DROP_BLOCKS[effort], self._on_gpu
        batch = self.batch or (GPU_TUNING_BATCH if on_gpu else TUNING_BATCH)
        return replace(
            self,
            effort=effort,
            synthetic=self.synthetic or work.inputs,
            steps=(work.gpu_steps if on_gpu else work.steps) if self.steps is None else self.steps,
            batch=batch,
            learning_rate=self.learning_rate or TUNING_RATE * batch / TUNING_BATCH,
        )

    def announce(self, name: str, model: Model, progress: Progress, inputs: int) -> None:
        """Report the effort and the expected time, of options `with_counts`.

        Args:
            name: Name of the pass.
            model: The network.
            progress: Called once, with no steps.
            inputs: Inputs that the pass learns from.
        """
        assert self.effort != "auto"
        announce(
            name, self.effort, model, progress, inputs,
            tuned=0 if self.time else (self.steps or 0) * (self.batch or TUNING_BATCH),
            known=TIMING + (self.tuning_seconds or 0.0),
            device="cuda" if self._on_gpu else "cpu",
        )  # fmt: skip

    @property
    def _on_gpu(self) -> bool:
        import torch

        return self.device != "cpu" and torch.cuda.is_available()
