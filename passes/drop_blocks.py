"""Drop residual blocks until the network is as fast as asked, with a few unlabelled images, or none.

Wang & Wu, Practical Network Acceleration with Tiny Sets (CVPR 2023, arXiv 2202.07861), with what beats it:

 1. BatchNorm is folded; blocks are found in the graph            `passes.fold_bn`, `blocks`
 2. τ(B): the share of each block, measured in onnxruntime        `shares`
 3. R(B): what adapters cannot recover                            `optimize.block_drop.recoverability`
 4. the lowest R/τ is dropped, what is left is scored again       `optimize.block_drop.selection`
    (the lowest R where the target is a number of blocks)
 5. the layers behind are refitted in closed form                 `optimize.reconstruction.residual_refit`
 6. the network is fine-tuned to the original's features          `optimize.reconstruction.finetune`

Adapters are folded into the convolutions beside them as they are found: the output has no node that the
input did not have. The classifier behind the features is not touched, no label is used.

Does not handle: several inputs; networks whose features are not one tensor (name one with `feature`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import ClassVar

from onnxcompress.account import Change, Figures, Refusal
from onnxcompress.errors import ModelError, OptionError
from onnxcompress.evaluation.guard import LOSSY, Floors
from onnxcompress.formatting import counted
from onnxcompress.graph.batch_norm import OLDEST_OPSET
from onnxcompress.graph.blocks import Discovery, find_blocks
from onnxcompress.graph.edit import lift_weights
from onnxcompress.graph.features import matched_feature
from onnxcompress.graph.linear_layer import LINEAR_OPS
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop.figures import DropBlocksFigures
from onnxcompress.optimize.block_drop.options import DropBlocksOptions
from onnxcompress.optimize.calibration import assume_sizes
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.opsets import at_opset
from onnxcompress.passes.preview import check_inputs, raised
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.quantized_models import check_not_quantized
from onnxcompress.statistics.record import read_record, write_present


@dataclass(frozen=True)
class DropBlocks(DropBlocksOptions, Pass):
    """Drop residual blocks of a CNN to make it faster, with a few unlabelled images or none.

    \b
    Give one target:
      --latency-reduction 20   until onnxruntime takes 20 % less time, as measured
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
    figures: ClassVar[type[Figures]] = DropBlocksFigures
    needs: ClassVar[tuple[str, ...]] = ("torch", "onnxruntime")
    floors: ClassVar[Floors] = LOSSY

    def is_repeatable(self, figures: Figures) -> bool:
        """Return whether another run would choose the same blocks.

        Args:
            figures: The figures of a result.

        Returns:
            False where the target was missed, blocks were chosen by the latency of a disturbed clock, or
            steps by --time.
        """
        if self.time is not None:
            return False
        if self.latency_reduction is not None and isinstance(figures, DropBlocksFigures):
            disturbed = figures.latency.clock == "processor" or figures.noisy_latency
            return super().is_repeatable(figures) and not disturbed
        return super().is_repeatable(figures)

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[DropBlocksFigures]:
        """Drop blocks in place.

        Args:
            model: The model to change.
            progress: Called with the stage, the steps done and the steps in all.

        Returns:
            The dropped blocks, the near misses with the reasons, and the figures.

        Raises:
            OptionError: Options contradict each other, or name a block or tensor that the model lacks.
            InputError: The images cannot be used.
            ModelError: The network has no block that can be dropped, or no feature tensor.
        """
        self.check()
        return at_opset(model, OLDEST_OPSET, lambda own: self._drop(own, progress))

    def preview(self, model: Model, progress: Progress = silent) -> list[Refusal]:
        """List the near misses, and check that inputs can be gathered.

        Args:
            model: The model; it stays as it is.
            progress: Called with the expected work, with no steps.

        Returns:
            What is nearly a block, with the reason why it cannot be dropped.

        Raises:
            CompressError: `apply` would fail on this model with these options.
        """
        self.check()
        check_not_quantized(model, "drop blocks before quantizing")
        own = raised(model, OLDEST_OPSET)
        assume_sizes(own, self.request)
        FoldBatchNorm().apply(own)
        found, _ = self._find(own)
        check_inputs(own, self.request)
        options = self.with_counts(self.name, own)
        options.announce(self.name, own, progress, options.request.expected)
        return list(found.near_misses)

    def _drop(self, model: Model, progress: Progress) -> PassResult[DropBlocksFigures]:
        check_not_quantized(model, "drop blocks before quantizing")
        assume_sizes(model, self.request)
        original = model.copy()
        folded = FoldBatchNorm().apply(model)
        found, feature = self._find(model)
        from onnxcompress.optimize.block_drop.pipeline import Dropper
        from onnxcompress.optimize.deterministic_threads import one_thread_each

        with one_thread_each():
            options = self.with_counts(self.name, model)
            work = Dropper(options, original, model, found, feature, progress)
            figures = replace(work.run(), effort=options.effort)
        write_present(model, read_record(model))
        changes = [Change(b.name, f"{b.kind} block dropped") for b in work.dropped]
        if folded.measured.folded:
            changes.append(Change(model.name, f"{counted(folded.measured.folded, 'BatchNorm')} folded"))
        return PassResult(changes, work.discovery.near_misses, figures, work.inputs.gathered.shown)

    def _find(self, model: Model) -> tuple[Discovery, str]:
        """Find the features, and the blocks in front of them: others can be neither scored nor repaired."""
        lift_weights(model, *LINEAR_OPS)
        found = find_blocks(model)
        self._check_blocks(model, found)
        feature = matched_feature(model, self.feature)
        known = model.analysis(Topology).made_of(feature)
        behind = [b for b in found.blocks if b.exit not in known]
        left = tuple(b for b in found.blocks if b.exit in known)
        rule, remedy = f"the features {feature!r} do not depend on it", "name a later --feature"
        for name in self.drop:
            if found[name] in behind:
                raise OptionError(f"--drop {name!r}: {rule}; {remedy}")
        if len(left) < (self.blocks or 1):
            names = ", ".join(b.name for b in behind)
            raise OptionError(
                f"the features {feature!r} depend on {len(left)} blocks, not on {names}; {remedy}"
            )
        misses = (*found.near_misses, *(Refusal(b.name, rule, remedy) for b in behind))
        return Discovery(left, misses), feature

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
        inside = {b.exit: set(b.inner) for b in found.blocks if {b.name, b.exit} & set(self.drop)}
        for block in found.blocks:
            around = [o for o in found.blocks if o is not block and block.exit in inside.get(o.exit, ())]
            if block.exit in inside and around:
                raise OptionError(
                    f"--drop {block.name!r}: it lies inside {around[0].name!r}, which goes as a whole; "
                    "leave one of them out"
                )
        if self.blocks is not None and self.blocks > len(found.blocks):
            raise OptionError(f"--blocks {self.blocks}: the network has {len(found.blocks)} to drop")
