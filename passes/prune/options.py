"""The options of `prune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxcompress.errors import OptionError
from onnxcompress.graph.node_selection import SelectionOptions
from onnxcompress.optimize.input_options import InputOptions
from onnxcompress.option_fields import option


@dataclass(frozen=True)
class PruneOptions(SelectionOptions, InputOptions):
    """What `prune` is asked for; its fields are the options of the command."""

    sparsity: float = option(
        0.5, "Share of zeros among all weights; an N:M pattern has its own.", gt=0, lt=1
    )
    pattern: str = option(
        "unstructured",
        "unstructured: zeros anywhere; N:M: of M neighbouring inputs N stay (2:4, as NVIDIA's "
        "sparse tensor cores take them).",
        metavar="TEXT",
    )
    storage: Literal["dense", "sparse"] = option(
        "dense",
        "dense: zeros are stored, for a file that is compressed anyway; sparse: they "
        "are left out, and put back when a runtime loads it.",
    )
    skip_first_last: bool = option(
        False, "Leave the first and the last layer dense, which often bear least."
    )
    depthwise: bool = option(
        False, "Prune depthwise convolutions, too; they have few weights and lose much."
    )
    scope: Literal["global", "layer"] = option(
        "global",
        "global: zeros where they cost least in the whole network; layer: the same share in each layer.",
        advanced=True,
    )
    sensitivity: str | None = option(
        None,
        "With --scope global: the file that `onnxcompress sensitivity MODEL --sparsity … --json` wrote, "
        "instead of measuring.",
        metavar="JSON",
        file="read",
        advanced=True,
    )
    reconstruct: bool = option(
        True,
        "Fit the weights that stay to the layer's output; without it the smallest weights go, "
        "and no inputs are needed.",
        advanced=True,
    )
    copy_shared: bool = option(
        False,
        "Give layers that share a weight copies of their own, also where the file grows by more than 1 %.",
        advanced=True,
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Device on which torch makes inputs and tunes layers.", advanced=True
    )

    def check(self) -> None:
        """Check all options.

        Raises:
            OptionError: A value is out of range, or options contradict each other.
        """
        from onnxcompress.optimize.reconstruction.sparsity_pattern import Pattern

        super().check()
        pattern = Pattern.parse(self.pattern)
        if pattern is None:
            raise OptionError(f"--pattern {self.pattern!r}: expected unstructured, or N:M with 0 < N < M")
        if self.sensitivity is not None and (self.scope != "global" or pattern.group):
            raise OptionError("--sensitivity goes with --scope global and --pattern unstructured")

    def hints(self) -> list[str]:
        """Suggest options that leave more of the network as it is.

        Returns:
            Options with their values, as on the command line.
        """
        found = [f"--sparsity {self.sparsity / 2:g}", "--skip-first-last"]
        return found + ([] if self.images else ["--images with a hundred real ones"])
