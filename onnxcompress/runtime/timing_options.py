"""Where and how latency is measured, as options of commands and recipes."""

from __future__ import annotations

from dataclasses import dataclass

from onnxcompress.option_fields import PROVIDER_HELP, check_limits, option, provider_options_option
from onnxcompress.runtime.providers import Provider


@dataclass(frozen=True)
class RuntimeOptions:
    """What onnxruntime runs a network on when its latency is measured."""

    provider: str = option("auto", PROVIDER_HELP, metavar="NAME")
    latency_batch: int = option(
        1, "Images in a run when latency is measured: as many as you will run.", ge=1
    )
    provider_options: tuple[str, ...] = provider_options_option()
    threads: int = option(
        0, "CPU threads of onnxruntime, as many as the model will have; 0: all cores.", advanced=True, ge=0
    )

    @property
    def runs_on(self) -> Provider:
        """The execution provider. Raises OptionError for a wrong option."""
        return Provider.of(self.provider, self.provider_options)


@dataclass(frozen=True)
class TimingOptions(RuntimeOptions):
    """Whether and how the latency before and after a pass is measured.

    The fields are options of passes and keys of a recipe's `timing`.
    """

    latency: bool = option(
        True,
        "Measure the latency before and after, in turn, for some seconds; leave it out where the "
        "file alone is wanted.",
    )

    def check(self) -> None:
        """Check that latency can be measured on this machine.

        Raises:
            OptionError: A value is out of range, or the provider is unknown.
            RuntimeUnavailable: The provider cannot start.
        """
        check_limits(self)
        chosen = self.runs_on
        if self.latency and chosen.name not in ("auto", "cpu"):
            from onnxcompress.runtime.session import check_provider

            check_provider(chosen)
