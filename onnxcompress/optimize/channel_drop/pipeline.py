"""The steps of cutting channels, on one model: price, time widths, choose, cut, refit, tune, measure."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from onnxcompress.account import BeforeAfter, StageSeconds
from onnxcompress.errors import CompressWarning, ModelError
from onnxcompress.graph.channel_groups.cut_tracer import CutGroup, CutGroups
from onnxcompress.graph.channel_removal import Kept, cut_channels
from onnxcompress.graph.macs import count_macs, count_parameters
from onnxcompress.graph.query import before_softmax, data_input
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop.recoverability import BATCH
from onnxcompress.optimize.channel_drop.figures import ChannelGroupRow, DropChannelsFigures
from onnxcompress.optimize.channel_drop.options import DropChannelsOptions
from onnxcompress.optimize.channel_drop.output_error import OutputErrors
from onnxcompress.optimize.channel_drop.repair import ChannelRepair, with_kept_channels
from onnxcompress.optimize.channel_drop.widths import (
    choose_widths,
    narrowings,
    possible_widths,
    signature,
    thinned,
)
from onnxcompress.optimize.channel_drop.worth import (
    Removal,
    is_unread,
    measure_readers,
    removal_by_norm,
    removal_by_refit,
)
from onnxcompress.optimize.device import pick_device
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.open_batch import small_batch, timed_batch
from onnxcompress.optimize.reconstruction.feature_loss import Matched
from onnxcompress.optimize.reconstruction.levels import feature_levels, pooled_features
from onnxcompress.optimize.reconstruction.tuning_inputs import gather_tuning_inputs
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome
from onnxcompress.progress import Progress
from onnxcompress.runtime.block_latency import LatencyChange, Share
from onnxcompress.runtime.stopwatch import Stopwatch

PRICING_IMAGES = 256
"""Images that channels are priced on, at most."""
PRICING_BATCH = 32
"""Images that run at once when gradients are taken, at most."""
PRICING_RIDGE = 1e-3
"""λ of the second moments by which channels are priced, as a share of their mean diagonal."""
VARIANTS, AT_ONCE = 128, 32
"""Networks with one kind of group narrowed that are measured, and of these in one measurement."""
LEAST_WIDTHS = 2
"""Widths of a group that are measured, however many groups there are."""
ERRORS = 3
"""Widths of a group at which the error of the outputs is measured, at most."""
SURPLUS = 2.0
"""Percent of the latency above the target from which on the account says that more was saved than asked."""

BUSY = (
    "the wall clock is too noisy: widths were chosen by processor time, which overstates what fewer "
    "channels save (where it says 19 % of ResNet-56, 11 % were saved on an idle machine); run it again "
    "when the machine is idle"
)


class ChannelDropper:
    """One run of the pass `drop-channels`. `model` is canonical and is changed in place."""

    def __init__(
        self,
        options: DropChannelsOptions,
        original: Model,
        model: Model,
        groups: CutGroups,
        progress: Progress,
    ) -> None:
        self.options, self.original, self.model, self.progress = options, original, model, progress
        self.groups = groups
        self.by_name = {group.name: group for group in groups.free}
        self.source = str(data_input(model).name)
        found = model.analysis(Topology).feature()
        if found is not None and found.name == self.source:  # branches part at the input: it has no error
            found = None
        self.tunes = options.feature is not None or found is not None
        self.feature = options.feature or str((found or model.graph.outputs[0]).name)
        self.device = pick_device(options.device)
        batch = timed_batch(original, options.latency_batch)
        self.stopwatch = Stopwatch(options.runs_on, batch, options.threads, options.seed)
        self.stopwatch.check(original)
        announce = partial(options.announce, "drop-channels", model, progress)
        self.inputs = gather_tuning_inputs(model, options.request, self.device, progress, announce)
        self.whole = model.copy()
        self.widths: Mapping[str, int] = {}
        self.kept: Mapping[str, Kept] = {}
        self.removals: dict[str, Removal] = {}
        self.errors: OutputErrors | None = None
        self.feature_error: float | None = None
        self.tuning: TuningOutcome | None = None

    def run(self) -> DropChannelsFigures:
        """Run all steps in order.

        Returns:
            What was measured.

        Raises:
            ModelError: The features are unusable, or a weight became infinite.
            RuntimeUnavailable: The memory of the device does not hold even a few images.
        """
        named = self.options.kept()
        self._price([self.by_name[name] for name in named] if named else list(self.groups.free))
        if named:
            self._rescale({name: {kept: 1.0} for name, kept in named.items()})
        self.widths = named or self._choose()
        if self.widths:
            self.kept = cut_channels(self.model, self.groups, self._gone(self.widths))
            self._repair()
        return self._measure()

    def _price(self, groups: list[CutGroup]) -> None:
        """Order the channels of each group by what they are worth."""
        if self.options.criterion != "refit":
            readers = self.options.criterion == "group-norm"
            self.removals = {g.name: removal_by_norm(g.group, readers=readers) for g in groups}
            return
        answers, batch = (
            _answers(self.model, self.feature),
            small_batch(self.model, PRICING_BATCH, self.device),
        )
        measured = measure_readers(
            self.model, self.groups, self.inputs.images[:PRICING_IMAGES], self.source, answers,
            ridge=PRICING_RIDGE, batch=batch, seed=self.options.seed, device=self.device,
            progress=self.progress,
        )  # fmt: skip
        self.errors = OutputErrors.of(
            self.model, measured, self.inputs.aside, self.source, answers, batch=batch, device=self.device
        )
        for done, group in enumerate(groups, 1):
            self.removals[group.name] = removal_by_refit(group.group, measured)
            self.progress("ordering channels", done, len(groups))

    def _choose(self) -> Mapping[str, int]:
        """Choose widths that meet the target, at the least predicted error."""
        by_latency = self.options.latency_reduction is not None
        saving = self._latency_saved if by_latency else self._macs_saved
        priced = [g for g in self.groups.free if self.removals[g.name].costs[-1] > 0 or is_unread(g.group)]
        gains = self._gains(priced) if priced else {}
        self._rescale(gains)
        costs = {name: self.removals[name].costs.tolist() for name in gains}
        kept = choose_widths(narrowings(costs, gains), self._target, saving).kept
        if by_latency and self.stopwatch.clock == "processor":
            warnings.warn(BUSY, CompressWarning, stacklevel=2)
        return kept

    def _rescale(self, gains: Mapping[str, Mapping[int, float]]) -> None:
        """Scale the costs of groups to errors of the outputs, measured at some widths that gain."""
        if self.errors is None:
            return
        for done, (name, widths) in enumerate(gains.items(), 1):
            removal = self.removals[name]
            lost = [len(removal.labels) - kept for kept, gain in widths.items() if gain > 0]
            self.removals[name] = self.errors.rescale(removal, thinned(lost, ERRORS))
            self.progress("measuring errors", done, len(gains))

    def _gains(self, groups: Sequence[CutGroup]) -> dict[str, dict[int, float]]:
        """Measure what each width of each group saves.

        Groups of equal layers are narrowed together: their saving is easier to tell from noise.
        """
        alike: dict[object, list[CutGroup]] = {}
        for group in groups:
            alike.setdefault(signature(group), []).append(group)
        most = max(LEAST_WIDTHS, VARIANTS // len(alike))
        step = self.options.width_step
        tried = [(own, w) for own in alike.values() for w in thinned(possible_widths(own[0], step), most)]
        gains: dict[str, dict[int, float]] = {group.name: {} for group in groups}
        for start in range(0, len(tried), AT_ONCE):
            self.progress("measuring widths", start, len(tried))
            part = tried[start : start + AT_ONCE]
            variants = {f"{own[0].name}={w}": self._cut({g.name: w for g in own}) for own, w in part}
            saved = self._savings(variants)
            for own, width in part:
                for group in own:
                    gains[group.name][width] = saved[f"{own[0].name}={width}"] / len(own)
        self.progress("measuring widths", len(tried), len(tried))
        return gains

    def _savings(self, variants: Mapping[str, Model]) -> dict[str, float]:
        if self.options.macs_reduction is not None:
            whole = count_macs(self.whole)
            return {name: 1 - count_macs(model) / whole for name, model in variants.items()}
        shares = self.stopwatch.savings(self.whole, variants)
        return {name: _sure(share) for name, share in shares.items()}

    def _macs_saved(self, widths: Mapping[str, int]) -> float:
        return 1 - count_macs(self._cut(widths)) / count_macs(self.whole)

    def _latency_saved(self, widths: Mapping[str, int]) -> float:
        return self.stopwatch.saved(self.original, self._cut(widths), self._target, seconds=5.0)

    @property
    def _target(self) -> float:
        """Part of the latency, or of the multiply-accumulates, that is to be saved."""
        return (self.options.latency_reduction or self.options.macs_reduction or 0.0) / 100

    def _cut(self, widths: Mapping[str, int]) -> Model:
        """Return a copy of the whole network with these widths, not repaired."""
        model = self.whole.copy()
        cut_channels(model, self.groups, self._gone(widths))
        return model

    def _gone(self, widths: Mapping[str, int]) -> set[int]:
        gone: set[int] = set()
        for name, kept in widths.items():
            labels = self.removals[name].labels
            gone.update(labels[: len(labels) - kept].tolist())
        return gone

    def _repair(self) -> None:
        """Refit and fine-tune what is left."""
        levels = feature_levels(self.whole, self.model, self.feature)
        pooled = pooled_features(self.whole, self.model, self.feature, len(self.inputs.images))
        names = [self.feature, *(name for _, name in (*levels, *pooled))]
        whole, named = with_kept_channels(self.whole, names, self.kept)
        matched = Matched(
            self.source,
            (self.feature, named[self.feature]),
            tuple((own, named[name]) for own, name in levels),
            tuple((own, named[name]) for own, name in pooled),
        )
        options = self.options if self.tunes else replace(self.options, steps=0, time=None)
        repair = ChannelRepair(
            options, self.model, self.whole, Executor.from_model(whole, device=self.device), matched,
            self.inputs, None, self.device, BATCH, self.progress, self.kept,
        )  # fmt: skip
        self.feature_error, self.tuning = repair.run({})

    def _measure(self) -> DropChannelsFigures:
        self.progress("measuring the result", 0, 1)
        latency = self.stopwatch.compare_again(self.original, self.model, seconds=8.0)
        macs = self._macs_change()
        missed = self._missed(latency, macs)
        self.progress("measuring the result", 1, 1)
        return DropChannelsFigures(
            feature=self.feature,
            preprocess=self.inputs.gathered.sources[0].preprocess,
            latency=latency,
            groups=tuple(self._row(group) for group in self.groups.free),
            macs=macs,
            parameters=BeforeAfter(count_parameters(self.original), count_parameters(self.model)),
            feature_error=self.feature_error,
            tuning=self.tuning,
            inputs=self.inputs.gathered.sources,
            seconds=StageSeconds(inputs=self.inputs.seconds),
            target_missed=f"{missed}; the file was written as it is" if missed else None,
        )

    def _row(self, group: CutGroup) -> ChannelGroupRow:
        kept = self.widths.get(group.name, group.width)
        cut = group.width - kept
        error = float(self.removals[group.name].costs[cut]) if cut else None
        return ChannelGroupRow(group.name, group.width, kept, group.parameters, group.macs, error)

    def _macs_change(self) -> BeforeAfter | None:
        try:
            return BeforeAfter(count_macs(self.whole), count_macs(self.model))
        except ModelError:  # of sizes that are open
            return None

    def _missed(self, latency: LatencyChange, macs: BeforeAfter | None) -> str:
        """Say by how much the target is missed, where the interval does not explain it."""
        options = self.options
        if options.macs_reduction is not None and macs is not None:
            saved = 100 * (1 - macs.after / macs.before)
            return (
                "" if saved >= options.macs_reduction else _sentence("work", saved, options.macs_reduction)
            )
        target = options.latency_reduction
        if target is None:
            return ""
        saved, least, most = (100 * share for share in latency.saved)
        if most < target or least > target + SURPLUS:
            return _sentence("latency", saved, target)
        return ""


def _answers(model: Model, feature: str) -> list[str]:
    """Return the tensors at which errors of channels count: the outputs, before a softmax.

    The features do not tell what their own channels are worth. They are taken where no output has
    gradients; channels that then cost nothing are not chosen.
    """
    floats = [t for t in model.graph.outputs if t.dtype is not None and np.dtype(t.dtype).kind == "f"]
    return [str(before_softmax(tensor).name) for tensor in floats] or [feature]


def _sure(share: Share) -> float:
    """Return what a width saves; 0 where that is not sure."""
    return share.value if share.low > 0 else 0.0


def _sentence(what: str, saved: float, target: float) -> str:
    return f"{what} is {saved:.1f} % lower, {target:g} % was asked for"
