"""The options of `drop-channels`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxcompress.errors import OptionError
from onnxcompress.optimize.tuning_options import TuningOptions
from onnxcompress.option_fields import option


@dataclass(frozen=True)
class DropChannelsOptions(TuningOptions):
    """The options of the command `drop-channels`."""

    macs_reduction: float | None = option(
        None,
        "Target: cut until there are this much fewer multiply-accumulates, in percent; needs no clock.",
        metavar="PCT",
        target=True,
        gt=0,
        lt=100,
    )
    channels_kept: tuple[str, ...] = option(
        (),
        "Target: the channels that groups keep, with commas; `onnxcompress inspect` lists the groups.",
        metavar="NAME=N,…",
        target=True,
    )
    criterion: Literal["refit", "group-norm", "magnitude"] = option(
        "refit",
        "What a channel is worth. refit: the error that is left when its readers are refitted; "
        "group-norm: the norm of all its weights; magnitude: the norm of the weights that "
        "compute it (the last two to compare with).",
        advanced=True,
    )
    width_step: int = option(
        0,
        "Groups keep multiples of this many channels, such as 8 for tensor cores; 0: 4 to 32 by width.",
        advanced=True,
        ge=0,
    )
    seed: int = option(
        0,
        "Random seed; with --channels-kept or --macs-reduction it gives the same file.",
        advanced=True,
        ge=0,
    )

    def check(self) -> None:
        """Check that exactly one target is given, and that all values are in range.

        Raises:
            OptionError: They are not.
        """
        targets = [
            self.latency_reduction is not None,
            self.macs_reduction is not None,
            bool(self.channels_kept),
        ]
        if sum(targets) != 1:
            raise OptionError(
                "give one target: --latency-reduction PCT, --macs-reduction PCT or --channels-kept NAME=N"
            )
        if self.inputs == "layerwise":
            raise OptionError(
                "--inputs layerwise: channels are judged on inputs that go through all layers"
            )
        super().check()
        self.kept()

    def kept(self) -> dict[str, int]:
        """Read `channels_kept`.

        Returns:
            Name of a group -> channels that it keeps.

        Raises:
            OptionError: A part is not NAME=N with N at least 1, or a name stands there twice.
        """
        found: dict[str, int] = {}
        for part in self.channels_kept:
            name, _, number = part.rpartition("=")
            if not name or not number.isdecimal() or int(number) < 1:
                raise OptionError(f"--channels-kept {part!r}: expected NAME=N, with N at least 1")
            if name in found:
                raise OptionError(f"--channels-kept {part!r}: {name!r} stands there twice")
            found[name] = int(number)
        return found

    def hints(self) -> list[str]:
        """Suggest options that leave more of the network as it is.

        Returns:
            Options with their values, as on the command line, or in words.
        """
        return ["a smaller reduction", *super().hints()]
