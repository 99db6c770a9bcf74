"""The options of `prune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxcompress.errors import OptionError
from onnxcompress.optimize.calibration import (
    FEW_MADE,
    InputRequest,
    count_option,
    images_option,
    inputs_option,
    preprocess_option,
)
from onnxcompress.option_fields import input_shape_option, option


@dataclass(frozen=True)
class PruneOptions:
    """What `prune` is asked for; its fields are the options of the command."""

    images: str | None = images_option()
    preprocess: str | None = preprocess_option()
    count: int | None = count_option()
    inputs: Literal["auto", "images", "distilled", "procedural", "layerwise"] = inputs_option()
    synthetic: int | None = option(
        None, "Images to make; default: 512, of more than 64x64 pixels 128.", metavar="N"
    )
    input_shape: str | None = input_shape_option()
    sparsity: float = option(0.5, "Share of zeros among all weights; an N:M pattern has its own.")
    pattern: str = option(
        "unstructured", "unstructured, or N:M: N of M neighbouring inputs stay (2:4).", metavar="TEXT"
    )
    scope: Literal["global", "layer"] = option(
        "global", "Zeros where they cost least in the whole network, or as many in each layer."
    )
    sensitivity: str | None = option(
        None,
        "With --scope global, what `onnxcompress sensitivity MODEL --sparsity … --json` printed: instead "
        "of measuring.",
        metavar="JSON",
        file="read",
    )
    reconstruct: bool = option(
        True, "New values for the weights that stay; else the smallest go and no inputs are needed."
    )
    depthwise: bool = option(False, "Prune depthwise convolutions, too.")
    skip_first_last: bool = option(False, "Leave the first and last layer dense.")
    storage: Literal["dense", "sparse"] = option(
        "dense", "Zeros as they are, or left out of the file; put back when a runtime loads it."
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where torch makes inputs and tunes layers.")
    seed: int = option(0, "Of all draws.")

    def check(self) -> None:
        """Raises OptionError for wrong options."""
        from onnxcompress.optimize.reconstruction.sparsity_pattern import Pattern

        self.request.check()
        if not 0 < self.sparsity < 1:
            raise OptionError(f"--sparsity {self.sparsity:g}: expected a share between 0 and 1")
        if self.synthetic is not None and self.synthetic < 1:
            raise OptionError(f"--synthetic {self.synthetic}: expected 1 or more")
        pattern = Pattern.parse(self.pattern)
        if pattern is None:
            raise OptionError(f"--pattern {self.pattern!r}: expected unstructured, or N:M with 0 < N < M")
        if self.sensitivity is not None and (self.scope != "global" or pattern.group):
            raise OptionError("--sensitivity goes with --scope global and --pattern unstructured")

    def hints(self) -> list[str]:
        """Options that leave more of the network what it is."""
        found = [f"--sparsity {self.sparsity / 2:g}", "--skip-first-last"]
        return found + ([] if self.images else ["--images with a hundred real ones"])

    @property
    def request(self) -> InputRequest:
        return InputRequest(
            self.images,
            self.preprocess,
            self.count,
            self.inputs,
            self.synthetic or FEW_MADE,
            self.seed,
            input_shape=self.input_shape,
        )
