"""The options of `drop-blocks`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onnxcompress.errors import OptionError
from onnxcompress.optimize.calibration import (
    InputRequest,
    count_option,
    images_option,
    inputs_option,
    preprocess_option,
    synthetic_option,
)
from onnxcompress.option_fields import PROVIDER_HELP, input_shape_option, option, provider_options_option
from onnxcompress.runtime.providers import Provider


@dataclass(frozen=True)
class DropBlocksOptions:
    """The options of the command `drop-blocks`."""

    images: str | None = images_option()
    preprocess: str | None = preprocess_option()
    count: int | None = count_option()
    inputs: Literal["auto", "images", "distilled", "procedural", "layerwise"] = inputs_option()
    synthetic: int = synthetic_option()
    input_shape: str | None = input_shape_option()
    latency_reduction: float | None = option(None, "Target, in percent of the latency.", metavar="PCT")
    blocks: int | None = option(None, "Target, in blocks.", metavar="K")
    drop: tuple[str, ...] = option((), "Names of the blocks to drop, with commas.", metavar="NAME,…")
    feature: str | None = option(None, "Tensor to match; default: the one before the global pool.")
    scores: str | None = option(
        None, "Scores are read from this file, or written to it if it is new.", metavar="JSON", file="kept"
    )
    steps: int = option(500, "Steps of fine-tuning; 0: none.")
    batch: int = option(64, "Images in a step of fine-tuning.")
    learning_rate: float = option(0.005, "Peak rate of fine-tuning, relative to a weight's size.")
    latency_batch: int = option(1, "Images in a run when latency is measured.")
    provider: str = option("auto", PROVIDER_HELP, metavar="NAME")
    provider_options: tuple[str, ...] = provider_options_option()
    threads: int = option(0, "CPU threads of onnxruntime; 0: all cores.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where torch optimizes.")
    capture: bool = option(False, "On a GPU, record a step of fine-tuning as a CUDA graph and replay it.")
    seed: int = option(0, "Random seed; the same seed and --scores give the same file.")

    def check(self) -> None:
        """Check that exactly one target is given, and that all values are in range.

        Raises:
            OptionError: They are not.
        """
        targets = [self.latency_reduction is not None, self.blocks is not None, bool(self.drop)]
        if sum(targets) != 1:
            raise OptionError("give one target: --latency-reduction PCT, --blocks K or --drop NAME,...")
        self.request.check()
        self.runs_on  # noqa: B018  it checks itself
        if self.latency_reduction is not None and not 0 < self.latency_reduction < 100:
            raise OptionError(f"--latency-reduction {self.latency_reduction}: expected 0 to 100 percent")
        for name in ("blocks", "batch", "latency_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
        for name in ("steps", "threads", "seed"):
            if getattr(self, name) < 0:
                raise OptionError(f"--{name} {getattr(self, name)}: expected 0 or more")
        if not 0 < self.learning_rate < float("inf"):
            raise OptionError(f"--learning-rate {self.learning_rate}: expected more than 0")
        if self.scores is not None and not Path(self.scores).parent.is_dir():
            raise OptionError(f"--scores {self.scores}: name a file in an existing folder")

    def hints(self) -> list[str]:
        """Options that leave more of the network what it is."""
        found = ["fewer blocks", f"--steps {2 * max(self.steps, 500)}"]
        return found + ([] if self.images else ["--images with a few hundred real ones"])

    @property
    def request(self) -> InputRequest:
        """The inputs that were asked for."""
        return InputRequest(
            self.images,
            self.preprocess,
            self.count,
            self.inputs,
            self.synthetic,
            self.seed,
            input_shape=self.input_shape,
        )

    @property
    def runs_on(self) -> Provider:
        """The execution provider on which latency is measured. Raises OptionError for a wrong option."""
        return Provider.of(self.provider, self.provider_options)
