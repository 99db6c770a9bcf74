"""The options of `drop-channels`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxcompress.errors import OptionError
from onnxcompress.optimize.input_options import InputOptions
from onnxcompress.option_fields import PROVIDER_HELP, option, provider_options_option
from onnxcompress.runtime.providers import Provider


@dataclass(frozen=True)
class DropChannelsOptions(InputOptions):
    """The options of the command `drop-channels`."""

    latency_reduction: float | None = option(
        None, "Target, in percent of the latency.", metavar="PCT", gt=0, lt=100
    )
    macs_reduction: float | None = option(
        None, "Target, in percent of the multiply-accumulates.", metavar="PCT", gt=0, lt=100
    )
    channels_kept: tuple[str, ...] = option(
        (), "Channels that groups keep, with commas.", metavar="NAME=N,…"
    )
    steps: int | None = option(None, "Steps of fine-tuning; 0: none; default: by --effort.", ge=0)
    provider: str = option("auto", PROVIDER_HELP, metavar="NAME")
    latency_batch: int = option(1, "Images in a run when latency is measured.", ge=1)
    feature: str | None = option(
        None, "Tensor to match; default: the one before the global pool.", advanced=True
    )
    criterion: Literal["refit", "magnitude"] = option(
        "refit",
        "What a channel is worth: refit: the error that refitting its readers leaves; magnitude: the norm "
        "of its weights.",
        advanced=True,
    )
    width_step: int = option(
        0, "Groups keep multiples of this many channels; 0: 4 to 32 by width.", advanced=True, ge=0
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
        self.runs_on  # noqa: B018  it checks itself
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
        found = ["a smaller reduction", f"--steps {2 * max(self.steps or 0, 500)}"]
        return found + ([] if self.images else ["--images with a few hundred real ones"])

    @property
    def runs_on(self) -> Provider:
        """The execution provider on which latency is measured. Raises OptionError for a wrong option."""
        return Provider.of(self.provider, self.provider_options)
