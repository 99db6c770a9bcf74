"""The steps of `prune`: from a model and options to the pruned model and its figures."""

from __future__ import annotations

import time
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from onnxcompress.account import Change, InputSource, Refusal, StageSeconds, as_json
from onnxcompress.errors import CompressWarning
from onnxcompress.graph.edit import set_values
from onnxcompress.graph.query import read
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import SMALL_PIXELS, gather_inputs
from onnxcompress.optimize.deterministic_threads import one_thread_each
from onnxcompress.optimize.device import pick_device
from onnxcompress.optimize.effort import PRUNE, announce, pixels_of
from onnxcompress.optimize.executor.executor import UnsupportedOp
from onnxcompress.optimize.reconstruction.context import CalibrationContext
from onnxcompress.optimize.reconstruction.feature_inputs import BYTES, Stage, stages_of
from onnxcompress.optimize.reconstruction.global_tuning import finetune_sparse, subnetwork_from
from onnxcompress.optimize.reconstruction.prune import (
    LEVELS,
    Costs,
    Settings,
    Sparsifier,
    Trials,
    output_costs,
)
from onnxcompress.optimize.synthesis.drawn_inputs import NormalizedImages
from onnxcompress.passes.base import PassResult
from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
from onnxcompress.passes.prune import sparse_storage as packing
from onnxcompress.passes.prune.figures import PrunedLayerRow, PruneFigures, WeightBytes
from onnxcompress.passes.prune.options import PruneOptions
from onnxcompress.passes.prune.targets import (
    Target,
    check_reachable,
    choose_target,
    is_pruned,
    magnitude_prune,
    magnitudes,
    what_allows_more,
)
from onnxcompress.passes.prune.work import work_of
from onnxcompress.passes.quantize.output_noise import output_snr
from onnxcompress.progress import Progress
from onnxcompress.sensitivity.bit_allocation import sparsity_budget
from onnxcompress.sensitivity.rows import read_rows
from onnxcompress.sensitivity.sparsity_allocation import by_cost, by_magnitude, share_of, uniform

if TYPE_CHECKING:
    from onnxcompress.data.image_set import ImageSet

NO_SPEED = "onnxruntime computes zeros as any other weight: no speed is to be expected"


@dataclass(frozen=True)
class _Pruned:
    """What is known of pruning, beside the weights; None where nothing was pruned or refitted."""

    layers: tuple[PrunedLayerRow, ...] | None = None
    inputs: tuple[InputSource, ...] | None = None
    seconds: StageSeconds | None = None
    output_snr_db: Mapping[str, float] | None = None
    shown: ImageSet | None = None
    effort: str | None = None


@one_thread_each()
def prune(options: PruneOptions, model: Model, progress: Progress) -> PassResult[PruneFigures | None]:
    """Prune a model in place.

    Args:
        options: The options.
        model: The model.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The changes, the layers that stay dense with the reasons, and the figures; none of these where
        there is nothing to do.

    Raises:
        OptionError: Too few weights may become 0 for the sparsity.
        CompressError: The inputs cannot be gathered.
    """
    original, looked_at = model.copy(), model.copy()
    changes = fold_and_canonicalize(looked_at, options.copy_shared)
    options.selection.check(original, looked_at)
    target = choose_target(options, looked_at)
    pruned = bool(target.layers) and is_pruned(target, options.sparsity)
    refusals, work = layers_of(options, looked_at, target)
    if not work:
        return PassResult(refusals=refusals)
    fold_and_canonicalize(model, options.copy_shared)
    target, done = choose_target(options, model), _Pruned()
    if not pruned:
        how = _reconstruct if options.reconstruct else _zero_smallest
        done = how(options, original, model, target, progress)
        target = choose_target(options, model)
    figures = _figures(options, model, target, done)
    return PassResult([*changes, _summary(model, figures)], refusals, figures, done.shown)


def layers_of(
    options: PruneOptions, model: Model, target: Target | None = None
) -> tuple[list[Refusal], bool]:
    """Find the layers that would stay dense, and whether anything would be pruned or stored.

    Args:
        options: The options.
        model: The model, prepared (`fold_and_canonicalize`).
        target: What is to be pruned, where it is known.

    Returns:
        The layers that would stay dense, with the reasons, and whether there is anything to do.

    Raises:
        OptionError: Too few weights may become 0 for the sparsity.
    """
    target = target or choose_target(options, model)
    pruned = bool(target.layers) and is_pruned(target, options.sparsity)
    if pruned and options.storage == "dense":
        rule = "as many of its weights are zero already as are asked for"
        return [*target.refusals, Refusal(model.name, rule, "ask for more --sparsity")], False
    if not target.layers and not target.refusals:
        rule = "none of its layers may be pruned"
        return [Refusal(model.name, rule, "; ".join(what_allows_more(options, target)))], False
    if target.layers and not pruned:
        check_reachable(options, target)
    return target.refusals, bool(target.layers)


def layer_sparsities(
    options: PruneOptions, original: Model, target: Target, costs: Mapping[str, list[float]] | None
) -> dict[str, float]:
    """Choose the sparsity of each layer.

    Args:
        options: The options.
        original: The model before it was prepared, as `--sensitivity` was measured on it.
        target: What is to be pruned.
        costs: Name of the weight -> cost at each of LEVELS; None: not measured.

    Returns:
        Name of the weight -> share of zeros.

    Raises:
        OptionError: Too few weights may become 0 for the sparsity.
        InputError: The sensitivity file cannot be used.
    """
    sizes, total = target.sizes, target.total
    if target.pattern.group:
        return dict.fromkeys(sizes, target.pattern.sparsity)
    if options.scope == "layer":
        return uniform(sizes, total, options.sparsity)
    if options.sensitivity is not None:
        rows = read_rows(Path(options.sensitivity), original.digest())
        return sparsity_budget(rows, sizes, share_of(sum(sizes.values()), total, options.sparsity))
    if costs is not None:
        return by_cost(costs, LEVELS, sizes, total, options.sparsity)
    return by_magnitude(magnitudes(target), total, options.sparsity)


def _zero_smallest(
    options: PruneOptions, original: Model, model: Model, target: Target, progress: Progress
) -> _Pruned:
    """Set the smallest weights to 0 and leave the others as they are."""
    shares = layer_sparsities(options, original, target, None)
    _write(model, magnitude_prune(target, shares))
    return _Pruned(_rows(target, shares, {}))


def _reconstruct(
    options: PruneOptions, original: Model, model: Model, target: Target, progress: Progress
) -> _Pruned:
    """Choose the zeros and refit what stays, in closed form."""
    start, pixels, device = time.perf_counter(), pixels_of(model), pick_device(options.device)
    effort, request = work_of(options, model)
    work, count = PRUNE[effort], request.synthetic
    announced = partial(announce, "prune", effort, model, progress)
    inputs = gather_inputs(model, request, device=device, progress=progress, announce=announced)
    context = CalibrationContext.of(model, inputs, stretched=False)
    stages = [Stage(context.images, context.alignment)]
    if inputs.may_use_record and work.starts:
        many = min(work.starts, BYTES // max(12 * pixels, 1))
        more = options.synthetic is None and inputs.layerwise and pixels > SMALL_PIXELS and many > count

        def starts() -> NormalizedImages:
            made = gather_inputs(model, replace(request, synthetic=many), device=device, progress=progress)
            return NormalizedImages(made.images)

        better = starts if more else None
        stages = stages_of(
            context, better, most=work.deep, seed=options.seed, device=device, progress=progress
        )
    made = time.perf_counter() - start
    costs = _costs(options, context, stages, target, progress)
    shares = layer_sparsities(options, original, target, costs.levels if costs else None)
    settings = Settings(
        batch=context.batch,
        seed=options.seed,
        pattern=target.pattern,
        sparsity=shares,
        rows=costs.rows if costs else {},
    )
    learned, noise = _learned(options, context, stages, settings, device, progress)
    _write(model, {name: value.numpy() for name, value in learned.items()})
    return _Pruned(
        layers=_rows(target, shares, noise),
        inputs=(*inputs.sources, *(stage.used for stage in stages if stage.used)),
        seconds=StageSeconds(made, time.perf_counter() - start - made),
        output_snr_db=output_snr(original, model, context.images),
        shown=inputs.shown,
        effort=effort,
    )


def _write(model: Model, values: Mapping[str, np.ndarray]) -> None:
    tensors = model.graph.tensors()
    for name, value in values.items():
        set_values(tensors[name], value.astype(np.float32))
    model.touch()


def _costs(
    options: PruneOptions,
    context: CalibrationContext,
    stages: list[Stage],
    target: Target,
    progress: Progress,
) -> Costs | None:
    """Measure costs; None where neither sparsities nor rows depend on them, or no layer can be tried."""
    if target.pattern.group or options.sensitivity is not None:
        return None
    settings = Settings(batch=context.batch, seed=options.seed)
    found, names = Costs({}, {}), frozenset(target.layers)
    for stage in stages:
        start, stop = stage.start, stage.stop
        trials = Trials(
            context.model, context.plan, settings, stage.alignment, start=start, stop=stop, names=names
        )
        trials.pass_through(stage.inputs, "trying sparsities", progress)
        if trials.found:
            try:
                own = output_costs(trials, stage.inputs, stages[-1].inputs if stage.stop else None)
            except UnsupportedOp as error:  # of no gradient
                text = f"{error}: the layers' shares of zeros go by the size of their weights"
                warnings.warn(text, CompressWarning, stacklevel=2)
                return None
            found = Costs(found.levels | own.levels, found.rows | own.rows)
    return found if found.levels else None


def _learned(
    options: PruneOptions,
    context: CalibrationContext,
    stages: list[Stage],
    settings: Settings,
    device: str,
    progress: Progress,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the pruned parameters of all layers, and the noise of each layer."""
    learned: dict[str, Tensor] = {}
    noise: dict[str, float] = {}
    lost: Tensor | None = None
    for stage in stages:
        worker = Sparsifier(
            context.model, context.plan, settings, stage.alignment, start=stage.start, stop=stage.stop
        )
        seen = stage.seen(lost)
        worker.pass_through(stage.inputs, "pruning layers", progress, seen)
        learned, noise = learned | worker.results, noise | worker.noise
        if stage.stop is not None:
            lost = worker.lost(stage.stop)
        if stage.start is not None:
            where = subnetwork_from(context.model, stage.start)
            learned |= finetune_sparse(
                context.model,
                context.plan,
                where,
                stage.inputs,
                seen,
                learned,
                seed=options.seed,
                device=device,
                progress=progress,
            )
    return learned, noise


def _figures(options: PruneOptions, model: Model, target: Target, done: _Pruned) -> PruneFigures:
    """Store the zeros as the options say, and count them and the bytes that they save."""
    weights = {name: read(model.graph.tensors()[name]) for name in target.weights}
    zeros = sum(int(w.size - np.count_nonzero(w)) for w in weights.values())
    dense = sum(w.nbytes for w in weights.values())
    deflated = sum(len(zlib.compress(w.tobytes())) for w in weights.values())
    sparse = dense - _pack(model, target) if options.storage == "sparse" else None
    return PruneFigures(
        sparsity=zeros / max(target.total, 1),
        weights=target.total,
        zeros=zeros,
        bytes=WeightBytes(dense, deflated, sparse),
        speed=NO_SPEED,
        layers=done.layers,
        inputs=done.inputs,
        seconds=done.seconds,
        output_snr_db=done.output_snr_db,
        effort=done.effort,
    )


def _summary(model: Model, figures: PruneFigures) -> Change:
    sizes = as_json(figures.bytes).items()
    text = ", ".join(f"{count / 1e6:.2f} MB {how}" for how, count in sizes)
    share = f"{figures.sparsity:.1%} of {figures.weights} weights are zero"
    return Change(model.name, f"{share}: {text}; {NO_SPEED}")


def _pack(model: Model, target: Target) -> int:
    """Store the weights as sparse, and return the bytes saved."""
    saved = 0
    for layer in target.weights.values():
        weight = read(layer.linear.node.inputs[layer.linear.weight_at])
        stored = packing.pack(model, layer.linear, weight)
        saved += 0 if stored is None else weight.nbytes - stored
    model.touch()
    return saved


def _rows(
    target: Target, shares: Mapping[str, float], noise: Mapping[str, float]
) -> tuple[PrunedLayerRow, ...]:
    def decibels(name: str) -> float | None:
        return float(-10 * np.log10(max(noise[name], 1e-12))) if name in noise else None

    return tuple(
        PrunedLayerRow(
            layer.linear.label, layer.linear.node.op, name, shares.get(name, 0.0), decibels(name)
        )
        for name, layer in target.layers.items()
    )
