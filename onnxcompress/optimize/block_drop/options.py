"""The options of `drop-blocks`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onnxcompress.errors import OptionError
from onnxcompress.optimize.input_options import InputOptions
from onnxcompress.option_fields import PROVIDER_HELP, option, provider_options_option
from onnxcompress.runtime.providers import Provider


@dataclass(frozen=True)
class DropBlocksOptions(InputOptions):
    """The options of the command `drop-blocks`."""

    latency_reduction: float | None = option(
        None, "Target, in percent of the latency.", metavar="PCT", gt=0, lt=100
    )
    blocks: int | None = option(None, "Target, in blocks.", metavar="K", ge=1)
    drop: tuple[str, ...] = option((), "Names of the blocks to drop, with commas.", metavar="NAME,…")
    steps: int | None = option(
        None, "Steps of fine-tuning; 0: none; the default depends on --effort.", metavar="N", ge=0
    )
    provider: str = option("auto", PROVIDER_HELP, metavar="NAME")
    latency_batch: int = option(1, "Images in a run when latency is measured.", ge=1)
    scores: str | None = option(
        None, "Scores are read from this file, or written to it if it is new.", metavar="JSON", file="kept"
    )
    feature: str | None = option(
        None, "Tensor to match; default: the one before the global pool.", advanced=True
    )
    batch: int = option(32, "Images in a step of fine-tuning.", advanced=True, ge=1)
    learning_rate: float = option(
        0.005, "Peak rate of fine-tuning, relative to a weight's size.", advanced=True, gt=0
    )
    provider_options: tuple[str, ...] = provider_options_option()
    threads: int = option(0, "CPU threads of onnxruntime; 0: all cores.", advanced=True, ge=0)
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Device on which torch optimizes.", advanced=True
    )
    capture: bool = option(
        False, "On a GPU, record a step of fine-tuning as a CUDA graph and replay it.", advanced=True
    )
    seed: int = option(
        0, "Random seed; the same seed and --scores give the same file.", advanced=True, ge=0
    )

    def check(self) -> None:
        """Check that exactly one target is given, and that all values are in range.

        Raises:
            OptionError: They are not.
        """
        targets = [self.latency_reduction is not None, self.blocks is not None, bool(self.drop)]
        if sum(targets) != 1:
            raise OptionError("give one target: --latency-reduction PCT, --blocks K or --drop NAME,...")
        super().check()
        self.runs_on  # noqa: B018  it checks itself
        if self.scores is not None and not Path(self.scores).parent.is_dir():
            raise OptionError(f"--scores {self.scores}: name a file in an existing folder")

    def hints(self) -> list[str]:
        """Suggest options that leave more of the network as it is.

        Returns:
            Options with their values, as on the command line, or in words.
        """
        found = ["fewer blocks", f"--steps {2 * max(self.steps or 0, 500)}"]
        return found + ([] if self.images else ["--images with a few hundred real ones"])

    @property
    def runs_on(self) -> Provider:
        """The execution provider on which latency is measured. Raises OptionError for a wrong option."""
        return Provider.of(self.provider, self.provider_options)
