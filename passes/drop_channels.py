"""Cut channels until the network is as fast as asked, with a few unlabelled images, or none.

 1. BatchNorm is folded; channels that go together are found     `channel_groups.cut_tracer`
 2. the least worth of each group is found                       `channel_drop.worth`
 3. the latency of widths is measured in onnxruntime             `channel_drop.widths`
 4. widths are chosen by error per latency, the channels cut     `graph.channel_removal`
 5. the layers behind are refitted in closed form                `channel_drop.repair`
 6. the network is fine-tuned to the original's features         `optimize.reconstruction.finetune`

No label is used. The output has the nodes of the input, BatchNorm folded, with narrower layers.

Does not handle: several inputs; channels that a network computes with operators without a rule
(`inspect` lists what stays, with the reason).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, ClassVar

from onnxcompress.account import Change, Figures, Refusal
from onnxcompress.errors import ModelError, OptionError
from onnxcompress.evaluation.guard import LOSSY, Floors
from onnxcompress.formatting import counted
from onnxcompress.graph.canonicalize import canonicalize
from onnxcompress.graph.features import matched_feature
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import assume_sizes
from onnxcompress.optimize.channel_drop.figures import DropChannelsFigures
from onnxcompress.optimize.channel_drop.options import DropChannelsOptions
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.opsets import at_opset
from onnxcompress.passes.preview import check_inputs, raised
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.quantized_models import check_not_quantized
from onnxcompress.statistics.record import ChannelStatistics, read_record, write_present

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnxcompress.graph.channel_groups.cut_tracer import CutGroups
    from onnxcompress.graph.channel_removal import Kept


@dataclass(frozen=True)
class DropChannels(DropChannelsOptions, Pass):
    """Cut channels of a CNN to make it faster, with a few unlabelled images or none.

    \b
    Give one target:
      --latency-reduction 20     until onnxruntime takes 20 % less time, as measured
      --macs-reduction 30        until it has 30 % fewer multiply-accumulates
      --channels-kept /conv1=48  these widths (`onnxcompress inspect` lists the groups)

    \b
    Example:
      onnxcompress drop-channels net.onnx fast.onnx --images photos/ \\
          --preprocess imagenet --latency-reduction 20

    The output is the input's network with narrower layers and new weights, BatchNorm folded. Exit code 3:
    it was written but misses the target.
    """

    name: ClassVar[str] = "drop-channels"
    figures: ClassVar[type[Figures]] = DropChannelsFigures
    needs: ClassVar[tuple[str, ...]] = ("torch", "onnxruntime")
    floors: ClassVar[Floors] = LOSSY

    def is_repeatable(self, figures: Figures) -> bool:
        """Return whether another run would choose the same channels.

        Args:
            figures: The figures of a result.

        Returns:
            False where the target was missed, widths were chosen by the latency of a disturbed clock, or
            steps by --time.
        """
        if self.time is not None:
            return False
        disturbed = isinstance(figures, DropChannelsFigures) and figures.latency.clock == "processor"
        return super().is_repeatable(figures) and not (disturbed and self.latency_reduction is not None)

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[DropChannelsFigures]:
        """Cut channels in place.

        Args:
            model: The model to change.
            progress: Called with the stage, the steps done and the steps in all.

        Returns:
            The groups that were cut, those that cannot be with the reasons, and the figures.

        Raises:
            OptionError: Options contradict each other, or name a group or tensor that the model lacks.
            InputError: The images cannot be used.
            ModelError: The network has no channels that can be cut.
        """
        self.check()
        from onnxcompress.graph.channel_removal import OLDEST_OPSET

        return at_opset(model, OLDEST_OPSET, lambda own: self._drop(own, progress))

    def preview(self, model: Model, progress: Progress = silent) -> list[Refusal]:
        """List the groups that cannot be cut, and check that inputs can be gathered.

        Args:
            model: The model; it stays as it is.
            progress: Called with the expected work, with no steps.

        Returns:
            Groups of channels that stay, with the reasons.

        Raises:
            CompressError: `apply` would fail on this model with these options.
        """
        self.check()
        from onnxcompress.graph.channel_removal import OLDEST_OPSET

        own = raised(model, OLDEST_OPSET)
        groups = self._prepare(own)[1]
        check_inputs(own, self.request)
        options = self.with_counts(self.name, own)
        options.announce(self.name, own, progress, options.request.expected)
        return list(groups.refusals)

    def _drop(self, model: Model, progress: Progress) -> PassResult[DropChannelsFigures]:
        assume_sizes(model, self.request)  # before it is copied: both are timed at the same size
        original = model.copy()
        folded, groups = self._prepare(model)
        from onnxcompress.optimize.channel_drop.pipeline import ChannelDropper
        from onnxcompress.optimize.deterministic_threads import one_thread_each

        with one_thread_each():
            options = self.with_counts(self.name, model)
            work = ChannelDropper(options, original, model, groups, progress)
            figures = replace(work.run(), effort=options.effort)
        write_present(model, _kept_statistics(read_record(model), work.kept))
        changes = [
            Change(row.name, f"{row.channels} channels cut to {row.kept}")
            for row in figures.groups
            if row.kept < row.channels
        ]
        if folded:
            changes.append(Change(model.name, f"{counted(folded, 'BatchNorm')} folded"))
        return PassResult(changes, groups.refusals, figures, work.inputs.gathered.shown)

    def _prepare(self, model: Model) -> tuple[int, CutGroups]:
        """Fold BatchNorm, and find the channels; returns how many were folded."""
        check_not_quantized(model, "cut channels before quantizing")
        from onnxcompress.graph.channel_groups.cut_tracer import find_cut_groups

        assume_sizes(model, self.request)
        folded = FoldBatchNorm().apply(model)
        canonicalize(model)
        groups = find_cut_groups(model)
        self._check_groups(model, groups)
        return folded.measured.folded, groups

    def _check_groups(self, model: Model, groups: CutGroups) -> None:
        if self.feature is not None:
            matched_feature(model, self.feature)
        if not groups.free:
            raise ModelError(
                f"{model.name}: no channels can be cut; `onnxcompress inspect {model.name}` says why"
            )
        widths = {group.name: group.width for group in groups.free}
        for name, kept in self.kept().items():
            if name not in widths:
                near = get_close_matches(name, list(widths), n=1)
                hint = f"did you mean {near[0]!r}?" if near else "`onnxcompress inspect` lists them"
                raise OptionError(f"--channels-kept {name!r}: no such group; {hint}")
            if kept > widths[name]:
                raise OptionError(f"--channels-kept {name}={kept}: it has {widths[name]} channels")


def _kept_statistics(
    record: Mapping[str, ChannelStatistics], kept: Mapping[str, Kept]
) -> dict[str, ChannelStatistics]:
    """Leave the cut channels out of the recorded statistics."""
    own = dict(record)
    for name in own.keys() & kept.keys():
        known, stays = own.pop(name), kept[name]
        if stays.axis == 1 and len(known.mean) == len(stays.mask):  # else it is of another tensor
            own[name] = replace(known, mean=known.mean[stays.index], std=known.std[stays.index])
    return own
