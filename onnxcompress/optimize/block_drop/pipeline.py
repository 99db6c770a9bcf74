"""The steps of dropping blocks, on one model: score, choose, refit, fine-tune, measure."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from onnxcompress.account import StageSeconds, as_json
from onnxcompress.errors import ModelError
from onnxcompress.formatting import counted
from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import Block, Discovery, outermost
from onnxcompress.graph.macs import node_macs
from onnxcompress.graph.query import data_input
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop.figures import BlockRow, DropBlocksFigures
from onnxcompress.optimize.block_drop.kept_scores import latency_shares, recoverabilities
from onnxcompress.optimize.block_drop.options import DropBlocksOptions
from onnxcompress.optimize.block_drop.recoverability import BATCH, SCORING_IMAGES, Probe, Scorer, probe
from onnxcompress.optimize.block_drop.refinement import Refinement
from onnxcompress.optimize.block_drop.repair import MAX_BATCH, Repair
from onnxcompress.optimize.block_drop.score_file import read_scores, write_scores
from onnxcompress.optimize.block_drop.selection import (
    BlockSelection,
    choose,
    target_missed,
)
from onnxcompress.optimize.device import fitting, pick_device
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.open_batch import small_batch, timed_batch
from onnxcompress.optimize.executor.walk_plan import floats
from onnxcompress.optimize.intermediate_results import array_digest
from onnxcompress.optimize.reconstruction.feature_loss import Matched
from onnxcompress.optimize.reconstruction.levels import feature_levels, pooled_features
from onnxcompress.optimize.reconstruction.tuning_inputs import gather_tuning_inputs
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment, standardize
from onnxcompress.progress import Progress
from onnxcompress.runtime.block_latency import Additivity, Share, added, usable
from onnxcompress.runtime.stopwatch import Stopwatch

TAPS_BYTES = 2 << 30
"""Memory that the tensors kept for scoring may take; fewer images are used where they would need more."""

CHOSEN_SECONDS, SHOWN_SECONDS = 8.0, 2.0
"""Time to measure shares for, where blocks are chosen by them, and where they are only shown."""


class Dropper:
    """One run of the pass `drop-blocks`. `model` has BatchNorm folded and is changed in place."""

    def __init__(
        self,
        options: DropBlocksOptions,
        original: Model,
        model: Model,
        found: Discovery,
        feature: str,
        progress: Progress,
    ) -> None:
        self.options, self.original, self.model, self.progress = options, original, model, progress
        self.latency_batch = timed_batch(original, options.latency_batch)
        self.source = str(data_input(model).name)
        self.feature = self.student_feature = feature
        self.device = pick_device(options.device)
        self.teacher = Executor.from_model(model, device=self.device)
        self.discovery = found
        self.dropped: list[Block] = []
        self.weights: dict[str, Tensor] = {}
        self.shares: dict[str, Share] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.noisy_latency: bool | None = None
        self.choosing_loss: float | None = None
        self.feature_error: float | None = None
        self.tuning: TuningOutcome | None = None
        self.stopwatch = Stopwatch(options.runs_on, self.latency_batch, options.threads, options.seed)
        self.saved = 0.0
        """Part of the latency that the blocks dropped so far save, as last measured."""
        self.stopwatch.check(original)
        announce = partial(options.announce, "drop-blocks", model, progress)
        self.inputs = gather_tuning_inputs(model, options.request, self.device, progress, announce)
        self.scoring_batch = BATCH
        self.alignment: StatisticsAlignment | None = None
        if self.inputs.gathered.layerwise:
            given = self.inputs.images[:SCORING_IMAGES].to(self.device)
            self.alignment = standardize(
                model,
                given,
                self.feature,
                batch=small_batch(model, MAX_BATCH, self.device),
                device=self.device,
            )
            self.alignment.apply(model)
        self.teacher = Executor.from_model(model, device=self.device)
        self.whole = model.copy()

    def run(self) -> DropBlocksFigures:
        """Run all steps in order.

        Returns:
            What was measured.

        Raises:
            ModelError: The features are unusable, or a weight became infinite.
            RuntimeUnavailable: The memory of the device does not hold even a few images.
        """
        if self.options.drop:
            named = {self.discovery[name] for name in self.options.drop}
            self.dropped = sorted(named, key=self.discovery.blocks.index)
            instead = drop_blocks(self.model, [b.exit for b in self.dropped])
            self.student_feature = instead.get(self.feature, self.feature)
        else:
            self._score()
            self._choose()
        if self.dropped:
            self._repair()
        return self._measure()

    def _probe(self) -> Probe:
        shapes = tensor_shapes(self.model)
        each = sum(floats(shapes[b.entry]) * 2 for b in self.discovery.blocks) * 4
        count = max(8, min(SCORING_IMAGES, len(self.inputs.images), TAPS_BYTES // max(each, 1)))
        made = fitting("scoring", self.scoring_batch, lambda batch: self._probed(count, batch))
        if not 0 < made.energy < float("inf"):
            raise ModelError(
                f"{self.model.name}: the features {self.feature!r} are all zero, or not finite, on these "
                "images; check --preprocess"
            )
        return made

    def _probed(self, count: int, batch: int) -> Probe:
        self.scoring_batch = batch
        return probe(self.teacher, self.inputs.images[:count], self.source, self.feature, batch=batch)

    def _score(self) -> None:
        self.probe = self._probe()
        exits = {b.exit for b in self.discovery.blocks}
        file = Path(self.options.scores) if self.options.scores else None
        saved = read_scores(file, self._scores_of(), exits) if file else None
        if saved is not None:
            self.shares, self.scores = saved
            return
        blocks = self.discovery.blocks
        seconds = SHOWN_SECONDS if self.options.latency_reduction is None else CHOSEN_SECONDS
        measure = partial(self.stopwatch.shares, self.model, blocks, seconds)
        self.shares = latency_shares(
            blocks, measure, lambda: self.stopwatch.parts_clock == "wall", self._scores_of(), self.progress
        )
        fitting("scoring", self.scoring_batch, self._recover)
        if file:
            write_scores(file, self._scores_of(), [as_json(row) for row in self._rows()])

    def _recover(self, batch: int) -> None:
        """Score each block, `batch` images at once."""
        self.scoring_batch = batch
        tau, blocks = self._tau(), self.discovery.blocks
        digest = array_digest(self.probe.images.cpu().numpy())
        context = {
            "model": self.original.digest(),
            "feature": self.feature,
            "sources": [used.source for used in self.inputs.gathered.sources],
            "inputs": digest,
            "run": [batch, self.device],
        }

        def scorer() -> Scorer:
            return Scorer(self.model, blocks, self.probe, executor=self.teacher, batch=batch)

        losses = recoverabilities(blocks, scorer, context, self.progress)
        for exit, loss in losses.items():
            self.scores[exit] = {"recoverability": loss, "score": loss / tau[exit]}

    def _tau(self) -> dict[str, float]:
        tau, self.noisy_latency = usable(self.shares, self.discovery.blocks, self._macs())
        return tau

    def _macs(self) -> int | None:
        """Count the multiply-accumulates of the network with all its blocks, as `Block.macs` does."""
        try:
            return sum(node_macs(node, tensor_shapes(self.original)) for node in self.original.graph.nodes)
        except ModelError:  # of sizes that are open
            return None

    def _scores_of(self) -> dict[str, Any]:
        """Return what scores depend on, except the images."""
        options = self.options
        return {
            "model_sha256": self.original.digest(),
            "feature": self.feature,
            "preprocess": self.inputs.gathered.sources[0].preprocess,
            "latency": [
                options.provider,
                self.latency_batch,
                options.threads,
                *options.provider_options,
            ],
        }

    def _rows(self) -> tuple[BlockRow, ...]:
        """Return one row for each block, as the report shows them."""
        gone = {b.exit for b in self.dropped}
        return tuple(
            BlockRow(b.name, b.exit, b.exit in gone, self.shares[b.exit], **self.scores[b.exit])
            if b.exit in self.scores
            else BlockRow(b.name, b.exit, b.exit in gone)
            for b in self.discovery.blocks
        )

    def _choose(self) -> None:
        by_latency = self.options.blocks is None  # a target in blocks costs 1 a block, whatever its τ
        choice = choose(
            self.model,
            {e: row["score" if by_latency else "recoverability"] for e, row in self.scores.items()},
            self._tau() if by_latency else dict.fromkeys(self.scores, 1.0),
            self.probe,
            self._enough,
            batch=self.scoring_batch,
            device=self.device,
            progress=self.progress,
            expected=self.options.blocks or 0,
        )
        if by_latency and self.saved >= self._target:
            losses = {exit_: row["recoverability"] for exit_, row in self.scores.items()}
            refinement = Refinement(
                self.whole, self.discovery.blocks, losses, self._tau(), self._target, self.probe,
                self._saving, self.scoring_batch, self.device, self.progress,
            )  # fmt: skip
            choice = refinement.better(choice, self.saved)
            if choice.model is not self.model:
                self.model.become(choice.model)
        self.dropped, self.weights = choice.dropped, choice.weights
        self.student_feature = choice.feature
        self.choosing_loss = choice.loss

    def _enough(self, choice: BlockSelection) -> bool:
        if self.options.blocks is not None:
            return len(choice.dropped) >= self.options.blocks
        target = self._target
        tau = self._tau()  # corrected for a noisy clock: by its shares alone all blocks might be dropped
        predicted = sum(tau[b.exit] for b in outermost(choice.dropped))
        if not choice.dropped or predicted < 0.9 * target:
            return False
        self.saved = self._saving(choice.model)
        return self.saved >= target

    @property
    def _target(self) -> float:
        """Part of the latency that is to be saved."""
        return (self.options.latency_reduction or 0.0) / 100

    def _saving(self, model: Model) -> float:
        """Measure the part of the original's latency that the model saves."""
        return self.stopwatch.saved(self.original, model, self._target, seconds=5.0)

    def _repair(self) -> None:
        """Refit and fine-tune what is left."""
        instead = drop_blocks(self.whole.copy(), [b.exit for b in self.dropped])
        matched = Matched(
            self.source,
            (self.student_feature, self.feature),
            feature_levels(self.whole, self.model, self.feature, instead),
            pooled_features(self.whole, self.model, self.feature, len(self.inputs.images), instead),
        )
        repair = Repair(
            self.options, self.model, self.whole, self.teacher, matched, self.inputs, self.alignment,
            self.device, self.scoring_batch, self.progress,
        )  # fmt: skip
        self.feature_error, self.tuning = repair.run(self.weights)

    def _measure(self) -> DropBlocksFigures:
        self.progress("measuring the result", 0, 1)
        latency = self.stopwatch.compare_again(self.original, self.model, seconds=8.0)
        additivity = None
        if self.dropped and all(b.exit in self.shares for b in self.dropped):
            predicted = added(self.shares[b.exit] for b in outermost(self.dropped))
            additivity = Additivity(predicted, latency.saved, self.stopwatch.parts_clock)
        target = self.options.latency_reduction
        missed = "" if target is None else target_missed(latency, target, self.dropped, self._tau())
        if (self.options.blocks or 0) > len(self.dropped):
            missed = (
                f"{counted(len(self.dropped), 'block')} dropped, {self.options.blocks} asked for: what is "
                "left holds no other, or is not finite without it"
            )
        self.progress("measuring the result", 1, 1)
        return DropBlocksFigures(
            feature=self.feature,
            preprocess=self.inputs.gathered.sources[0].preprocess,
            latency=latency,
            blocks=self._rows(),
            noisy_latency=self.noisy_latency,
            order=None if self.options.drop else tuple(b.name for b in self.dropped),
            choosing_loss=self.choosing_loss,
            feature_error=self.feature_error,
            tuning=self.tuning,
            additivity=additivity,
            inputs=self.inputs.gathered.sources,
            seconds=StageSeconds(inputs=self.inputs.seconds),
            target_missed=f"{missed}; the file was written as it is" if missed else None,
        )
