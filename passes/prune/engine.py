"""The steps of `prune`: from a model and options to the pruned model and its account."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from onnxcompress.account import Change, Refusal
from onnxcompress.graph.edit import set_values
from onnxcompress.graph.query import data_input, read
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import FEW_MADE, MANY_MADE, SMALL_PIXELS, gather_inputs, quick
from onnxcompress.optimize.deterministic_threads import one_thread_each
from onnxcompress.optimize.device import pick_device
from onnxcompress.optimize.reconstruction.context import CalibrationContext, whole_batches
from onnxcompress.optimize.reconstruction.feature_inputs import BYTES, STARTS, Stage, stages_of
from onnxcompress.optimize.reconstruction.global_tuning import finetune_sparse, subnetwork_from
from onnxcompress.optimize.reconstruction.prune import (
    LEVELS,
    Costs,
    Settings,
    Sparsifier,
    Trials,
    output_costs,
)
from onnxcompress.passes.base import PassResult
from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
from onnxcompress.passes.prune import sparse_storage as packing
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
from onnxcompress.passes.quantize.engine import output_snr
from onnxcompress.progress import Progress
from onnxcompress.sensitivity.bit_allocation import sparsity_budget
from onnxcompress.sensitivity.rows import read_rows
from onnxcompress.sensitivity.sparsity_allocation import by_cost, by_magnitude, share_of, uniform

NO_SPEED = "onnxruntime computes zeros as any other weight: no speed is to be expected"


@one_thread_each()
def prune(one: PruneOptions, model: Model, progress: Progress) -> PassResult:
    """Prune a model in place.

    Args:
        one: The options.
        model: The model.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The changes, the layers that stay dense, and what was measured.

    Raises:
        OptionError: Too few weights may become 0 for the sparsity.
        CompressError: The inputs cannot be gathered.
    """
    original, looked_at = model.copy(), model.copy()
    changes = fold_and_canonicalize(looked_at)
    target = choose_target(one, looked_at)
    pruned = bool(target.layers) and is_pruned(target, one.sparsity)
    refusals, work = layers_of(one, looked_at, target)
    result = PassResult(refusals=refusals)
    if not work:
        return result
    fold_and_canonicalize(model)
    target = choose_target(one, model)
    result.changes = changes
    if not pruned:
        if one.reconstruct:
            _reconstruct(one, original, model, target, result, progress)
        else:
            shares = layer_sparsities(one, original, target, None)
            _write(model, magnitude_prune(target, shares))
            result.measured["layers"] = _rows(target, shares, {})
        target = choose_target(one, model)
    _account(one, model, target, result)
    return result


def layers_of(one: PruneOptions, model: Model, target: Target | None = None) -> tuple[list[Refusal], bool]:
    """Find the layers that would stay dense, and whether anything would be pruned or stored.

    Args:
        one: The options.
        model: The model, prepared (`fold_and_canonicalize`).
        target: What is to be pruned, where it is known.

    Returns:
        The layers that would stay dense, with the reasons, and whether there is anything to do.

    Raises:
        OptionError: Too few weights may become 0 for the sparsity.
    """
    target = target or choose_target(one, model)
    pruned = bool(target.layers) and is_pruned(target, one.sparsity)
    if pruned and one.storage == "dense":
        rule = "as many of its weights are zero already as are asked for"
        return [*target.refusals, Refusal(model.name, rule, "ask for more --sparsity")], False
    if not target.layers and not target.refusals:
        rule = "none of its layers may be pruned"
        return [Refusal(model.name, rule, "; ".join(what_allows_more(one, target)))], False
    if target.layers and not pruned:
        check_reachable(one, target)
    return target.refusals, bool(target.layers)


def layer_sparsities(
    one: PruneOptions, original: Model, target: Target, costs: Mapping[str, list[float]] | None
) -> dict[str, float]:
    """Choose the sparsity of each layer.

    Args:
        one: The options.
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
    if one.scope == "layer":
        return uniform(sizes, total, one.sparsity)
    if one.sensitivity is not None:
        rows = read_rows(Path(one.sensitivity), original.digest())
        return sparsity_budget(rows, sizes, share_of(sum(sizes.values()), total, one.sparsity))
    if costs is not None:
        return by_cost(costs, LEVELS, sizes, total, one.sparsity)
    return by_magnitude(magnitudes(target), total, one.sparsity)


def _reconstruct(
    one: PruneOptions, original: Model, model: Model, target: Target, result: PassResult, progress: Progress
) -> None:
    """Choose the zeros and refit what stays, in closed form."""
    start = time.perf_counter()
    request, device = quick(one.request, model), pick_device(one.device)
    pixels = _pixels(model)
    if one.synthetic is None and 0 < pixels <= SMALL_PIXELS:
        request = replace(request, synthetic=MANY_MADE)
    inputs = gather_inputs(model, request, device=device, progress=progress)
    result.shown = inputs.shown
    context = CalibrationContext.of(model, inputs, stretched=False)
    stages = [Stage(context.images, context.twin)]
    if inputs.may_use_record:
        many = min(STARTS, BYTES // max(12 * pixels, 1))
        more = one.synthetic is None and inputs.layerwise and pixels > SMALL_PIXELS and many > FEW_MADE

        def starts() -> Tensor:
            made = gather_inputs(model, replace(request, synthetic=many), device=device, progress=progress)
            return whole_batches(model, made, context.batch)

        stages = stages_of(
            context, starts if more else None, seed=one.seed, device=device, progress=progress
        )
    made = time.perf_counter() - start
    costs = _costs(one, context, stages, target, progress)
    shares = layer_sparsities(one, original, target, costs.levels if costs else None)
    settings = Settings(
        batch=context.batch,
        seed=one.seed,
        pattern=target.pattern,
        sparsity=shares,
        rows=costs.rows if costs else {},
    )
    learned, noise = _learned(one, context, stages, settings, device, progress)
    _write(model, {name: value.numpy() for name, value in learned.items()})
    rows = _rows(target, shares, noise)
    result.layer_snr_db = {row["name"]: row["snr_db"] for row in rows if "snr_db" in row}
    result.measured |= {
        "layers": rows,
        "inputs": [
            asdict(used) for used in (*inputs.sources, *(stage.used for stage in stages if stage.used))
        ],
        "seconds": {"inputs": made, "layers": time.perf_counter() - start - made},
        "output_snr_db": output_snr(original, model, context.images),
    }


def _write(model: Model, values: Mapping[str, np.ndarray]) -> None:
    tensors = model.graph.tensors()
    for name, value in values.items():
        set_values(tensors[name], value.astype(np.float32))
    model.touch()


def _pixels(model: Model) -> int:
    """Return the pixels of an image; 0 where the network takes none."""
    shape = tensor_shapes(model).get(data_input(model).name, ())
    return math.prod(d for d in shape[1:] if isinstance(d, int) and d > 4) if len(shape) == 4 else 0


def _costs(
    one: PruneOptions, context: CalibrationContext, stages: list[Stage], target: Target, progress: Progress
) -> Costs | None:
    """Measure costs; None where neither sparsities nor rows depend on them, or no layer can be tried."""
    if target.pattern.group or one.sensitivity is not None:
        return None
    settings = Settings(batch=context.batch, seed=one.seed)
    found = Costs({}, {})
    for stage in stages:
        names = frozenset(target.layers)
        trials = Trials(
            context.model,
            context.plan,
            settings,
            stage.twin,
            start=stage.start,
            stop=stage.stop,
            names=names,
        )
        trials.pass_through(stage.inputs, "trying sparsities", progress)
        if trials.found:
            own = output_costs(trials, stage.inputs, stages[-1].inputs if stage.stop else None)
            found = Costs(found.levels | own.levels, found.rows | own.rows)
    return found if found.levels else None


def _learned(
    one: PruneOptions,
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
            context.model, context.plan, settings, stage.twin, start=stage.start, stop=stage.stop
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
                seed=one.seed,
                device=device,
                progress=progress,
            )
    return learned, noise


def _account(one: PruneOptions, model: Model, target: Target, result: PassResult) -> None:
    """Store the zeros as asked, and report how many there are and how many bytes they save."""
    weights = {name: read(model.graph.tensors()[name]) for name in target.weights}
    zeros = sum(int(w.size - np.count_nonzero(w)) for w in weights.values())
    size = {
        "dense": sum(w.nbytes for w in weights.values()),
        "deflated": sum(len(zlib.compress(w.tobytes())) for w in weights.values()),
    }
    if one.storage == "sparse":
        saved = _pack(model, target)
        size["sparse"] = size["dense"] - saved
    result.measured |= {
        "sparsity": zeros / max(target.total, 1),
        "weights": target.total,
        "zeros": zeros,
        "bytes": size,
        "speed": NO_SPEED,
    }
    text = ", ".join(f"{count / 1e6:.2f} MB {how}" for how, count in size.items())
    share = f"{zeros / max(target.total, 1):.1%} of {target.total} weights are zero"
    result.changes.append(Change(model.name, f"{share}: {text}; {NO_SPEED}"))


def _pack(model: Model, target: Target) -> int:
    """Store the weights as sparse, and return the bytes saved."""
    saved = 0
    for layer in target.weights.values():
        weight = read(layer.linear.node.inputs[layer.linear.weight_at])
        stored = packing.pack(model, layer.linear, weight)
        saved += 0 if stored is None else weight.nbytes - stored
    model.touch()
    return saved


def _rows(target: Target, shares: Mapping[str, float], noise: Mapping[str, float]) -> list[dict[str, Any]]:
    rows = []
    for name, layer in target.layers.items():
        row = {
            "name": layer.linear.label,
            "op": layer.linear.node.op,
            "weight": name,
            "sparsity": shares.get(name, 0.0),
        }
        if name in noise:
            row["snr_db"] = float(-10 * np.log10(max(noise[name], 1e-12)))
        rows.append(row)
    return rows
