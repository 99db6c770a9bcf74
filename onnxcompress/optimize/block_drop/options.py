"""The options of `drop-blocks`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnxcompress.errors import OptionError
from onnxcompress.optimize.tuning_options import TuningOptions
from onnxcompress.option_fields import option


@dataclass(frozen=True)
class DropBlocksOptions(TuningOptions):
    """The options of the command `drop-blocks`."""

    blocks: int | None = option(
        None,
        "Target: drop this many blocks, those that can be repaired best.",
        metavar="K",
        target=True,
        ge=1,
    )
    drop: tuple[str, ...] = option(
        (),
        "Target: drop these blocks, with commas; `onnxcompress inspect` lists their names.",
        metavar="NAME,…",
        target=True,
    )
    scores: str | None = option(
        None,
        "File of block scores: read where it exists, else written. A second target then needs no scoring.",
        metavar="JSON",
        file="kept",
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
        if self.scores is not None and not Path(self.scores).parent.is_dir():
            raise OptionError(f"--scores {self.scores}: name a file in an existing folder")
        if self.scores is not None and Path(self.scores).is_dir():
            raise OptionError(f"--scores {self.scores}: it is a folder")
        if self.scores is not None and self.drop:
            raise OptionError("--scores goes with --latency-reduction or --blocks: --drop scores nothing")

    def hints(self) -> list[str]:
        """Suggest options that leave more of the network as it is.

        Returns:
            Options with their values, as on the command line, or in words.
        """
        return ["fewer blocks", *super().hints()]
