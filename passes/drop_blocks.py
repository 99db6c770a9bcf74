"""Drop residual blocks until the network is as fast as asked, with a few unlabelled images, or none.

Wang & Wu, Practical Network Acceleration with Tiny Sets (CVPR 2023, arXiv 2202.07861), with what beats it:

 1. BatchNorm is folded; blocks are found in the graph            `passes.fold_bn`, `blocks`
 2. τ(B): the share of each block, measured in onnxruntime        `shares`
 3. R(B): what adapters cannot recover                            `optimize.score`
 4. the lowest R/τ is dropped, what is left is scored again       `optimize.select`
    (the lowest R where the target is a number of blocks)
 5. the layers behind are refitted in closed form                 `optimize.reconstruct`
 6. the network is fine-tuned to the original's features          `optimize.finetune`

Adapters are folded into the convolutions beside them as they are found: the output has no node that the
input did not have. The classifier behind the features is not touched, no label is used.

Does not handle: several inputs; networks whose features are not one tensor (name one with `feature`).
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar, Literal

from onnxcompress.blocks import LINEAR, Discovery, find_blocks
from onnxcompress.errors import ModelError, OptionError
from onnxcompress.graph import lift_weights
from onnxcompress.inputs.source import (
    InputRequest,
    count_option,
    images_option,
    inputs_option,
    preprocess_option,
    synthetic_option,
)
from onnxcompress.model import Model
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passing import (
    PROVIDER_HELP,
    Change,
    Pass,
    PassResult,
    Progress,
    option,
    provider_options_option,
    silent,
)
from onnxcompress.providers import Provider


@dataclass(frozen=True)
class DropBlocks(Pass):
    """Drop residual blocks of a CNN to make it faster, with a few unlabelled images or none.

    \b
    Give one target:
      --latency-reduction 20   until onnxruntime is 20 % faster, as measured
      --blocks 3               three blocks
      --drop layer1.1,layer2.3 these blocks (`onnxcompress inspect` lists them)

    \b
    Example:
      onnxcompress drop-blocks net.onnx fast.onnx --images photos/ \\
          --preprocess imagenet --latency-reduction 20

    The output is the input's network with fewer blocks and new weights, BatchNorm folded. Exit code 3: it
    was written but misses the target.
    """

    name: ClassVar[str] = "drop-blocks"
    needs: ClassVar[tuple[str, ...]] = ("torch", "onnxruntime")

    images: str | None = images_option()
    preprocess: str | None = preprocess_option()
    count: int | None = count_option()
    inputs: Literal["auto", "images", "distilled", "procedural", "layerwise"] = inputs_option()
    synthetic: int = synthetic_option()
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
    seed: int = option(0, "Of all draws; the same seed and --scores give the same file.")

    def apply(self, model: Model, progress: Progress = silent) -> PassResult:
        """Drop blocks from `model` in place; `measured` holds scores, latency and errors.

        Raises OptionError for wrong options, InputError for unusable images, ModelError where the
        network has no block or no feature tensor.
        """
        self.check()
        original = model.copy()
        folded = FoldBatchNorm().apply(model)
        lift_weights(model, *LINEAR)
        found = find_blocks(model)
        self._check_blocks(model, found)
        from onnxcompress.optimize.dropper import Dropper

        work = Dropper(self, original, model, found, progress)
        work.run()
        changes = [Change(b.name, f"{b.kind} block dropped") for b in work.dropped]
        if folded.measured["folded"]:
            changes.append(Change(model.name, f"{folded.measured['folded']} BatchNorms folded"))
        return PassResult(changes, list(work.found.near_misses), work.measured, work.inputs.shown)

    def check(self) -> None:
        """Raise OptionError for anything but one target, and for values out of range."""
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

    @property
    def request(self) -> InputRequest:
        return InputRequest(
            self.images, self.preprocess, self.count, self.inputs, self.synthetic, self.seed
        )

    @property
    def runs_on(self) -> Provider:
        """Where latency is measured, and how. Raises OptionError."""
        return Provider.of(self.provider, self.provider_options)

    def _check_blocks(self, model: Model, found: Discovery) -> None:
        if not found.blocks:
            raise ModelError(
                f"{model.name}: no block can be dropped; `onnxcompress inspect {model.name}` says why"
            )
        for name in self.drop:
            if name not in {n for b in found.blocks for n in (b.name, b.exit)}:
                near = get_close_matches(name, [b.name for b in found.blocks], n=1)
                hint = f"did you mean {near[0]!r}?" if near else "`onnxcompress inspect` lists them"
                raise OptionError(f"--drop {name!r}: no such block; {hint}")
        if self.blocks is not None and self.blocks > len(found.blocks):
            raise OptionError(f"--blocks {self.blocks}: the network has {len(found.blocks)} to drop")
