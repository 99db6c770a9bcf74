"""The course of `quantize`: from a prepared model and options to the quantized one and its account."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onnxcompress.errors import InputError
from onnxcompress.inputs.source import InputRequest, best_kind, gather_inputs
from onnxcompress.model import Model
from onnxcompress.optimize.channel_ranges import stretch
from onnxcompress.optimize.device import pick_device
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.quantizer import Learned, Quantizer, Settings
from onnxcompress.optimize.standardize import Twin, standardize
from onnxcompress.passing import Change, PassResult, Progress
from onnxcompress.quantization.emit import emit
from onnxcompress.quantization.fused import fused_counts
from onnxcompress.quantization.grid import Grid, weight_limits
from onnxcompress.quantization.plan import Bits, Layer, Plan, make_plan
from onnxcompress.topology import Topology

if TYPE_CHECKING:
    from onnxcompress.passes.quantize import Quantize

BATCH = 32
"""Images that go through at once where the file leaves it open."""
SHOWN = 32
"""Images on which the outputs of both networks are compared."""


def quantize(
    one: Quantize, original: Model, model: Model, changes: list[Change], progress: Progress
) -> PassResult:
    """Quantize the prepared model in place."""
    bits = Bits(one.weight_bits, one.activation_bits or None, one.first_last or None)
    plan = make_plan(model, bits)
    result = PassResult(changes, plan.refusals)
    if not plan.layers:
        return result
    start = time.perf_counter()
    inputs = gather_inputs(model, _request(one, model), device=pick_device(one.device), progress=progress)
    made = time.perf_counter() - start
    batch = _fixed_batch(model)
    x = torch.from_numpy(inputs.images.array())
    x = x[: len(x) // batch * batch]
    if not len(x):
        raise InputError(
            f"{model.name}: the file fixes a batch of {batch}, there are {len(inputs.images)} images"
        )
    settings = Settings(
        per_channel=one.per_channel,
        storage=one.activation_type,
        symmetric=one.symmetric,
        reconstruct=one.reconstruct,
        small_types=one.small_types,
        safe=one.safe,
        minmax=one.ranges == "minmax",
        batch=batch if batch > 1 else BATCH,
        seed=one.seed,
    )
    twin = Twin()
    if inputs.layerwise:
        topology = Topology(model)
        last = topology.feature() or topology.trunk()[-1]
        twin = standardize(model, Executor.from_model(model), x, last.name)
    stretched = 0
    if one.stretch:
        stretched = stretch(model, plan, x, twin, settings.batch)
        plan = make_plan(model, bits)
    worker = Quantizer(model, plan, settings, twin)
    learned = worker.run(x, progress)
    learn = time.perf_counter() - start - made
    weights = {id(layer.node): _integers(layer, learned, one) for layer in plan.layers.values()}
    biases = {i: b.numpy() for i, b in learned.biases.items()}
    rows = [_row(layer, learned, weights[id(layer.node)][1], plan) for layer in plan.layers.values()]
    emit(model, plan, learned.grids, weights, biases)
    result.changes += [
        Change(row["name"], f"weight {row['weight_bits']} bits, input {row['input_bits']}") for row in rows
    ]
    result.measured = {
        "layers": rows,
        "channel_ranges": stretched,
        "inputs": [asdict(u) for u in inputs.sources],
        "seconds": {"inputs": made, "layers": learn},
        "runtime": fused_counts(model),
        "output_snr_db": _snr(original, model, x[: max(batch, SHOWN // batch * batch)].numpy(), batch),
    }
    return result


def _integers(layer: Layer, learned: Learned, one: Quantize) -> tuple[np.ndarray, Grid]:
    """The weight's integers in the initializer's layout, and their grid."""
    found = learned.weights[id(layer.node)]
    low, high = weight_limits(layer.weight_bits, safe=one.safe)
    integers = np.empty(layer.linear.weight.shape, np.int32)
    view = layer.linear.view(integers)
    view[...] = found.integers.numpy().reshape(view.shape)
    scale = found.scale.numpy().reshape(-1).astype(np.float32)
    scale = scale if one.per_channel else scale[0].reshape(())
    if one.small_types and layer.weight_bits <= 4:
        return integers, Grid(scale, 0, low, high, "int4")
    shift = 128 if one.weight_type == "uint8" else 0
    return integers, Grid(scale, shift, low + shift, high + shift, one.weight_type)


def _request(one: Quantize, model: Model) -> InputRequest:
    """What `auto` means here: no distilled images, which take longer than all the rest."""
    request = one.request
    if request.inputs == "auto" and request.images is None and best_kind(model)[0] == "distilled":
        return replace(request, inputs="layerwise")
    return request


def _row(layer: Layer, learned: Learned, grid: Grid, plan: Plan) -> dict[str, Any]:
    data = None if layer.input is None else learned.grids[plan.root(layer.input)]
    noise = learned.noise[id(layer.node)]
    return {
        "name": layer.label,
        "op": layer.node.op,
        "weight_bits": layer.weight_bits,
        "input_bits": 0 if layer.input is None else layer.input[1],
        "weight_scale": [float(grid.scale.min()), float(grid.scale.max())],
        "input_scale": None if data is None else float(data.scale),
        "input_range": None if data is None else list(data.bounds),
        "snr_db": float(-10 * np.log10(max(noise, 1e-12))),
    }


def _fixed_batch(model: Model) -> int:
    """The batch that the file fixes; 1 where it is open."""
    shape = model.graph.inputs[0].shape
    return int(shape[0]) if shape and isinstance(shape[0], int) else 1


def _snr(original: Model, model: Model, x: np.ndarray, batch: int) -> dict[str, float]:
    """Signal to noise of each output on some of the inputs, in decibels, as onnxruntime computes it."""
    from onnxcompress.runtime import session

    name = model.graph.inputs[0].name
    outputs: list[list[list[np.ndarray]]] = []
    for one in (original, model):
        opened = session(one, provider="cpu")
        outputs.append([opened.run(None, {name: x[i : i + batch]}) for i in range(0, len(x), batch)])
    found = {}
    for index, tensor in enumerate(model.graph.outputs):
        a, b = (np.concatenate([run[index] for run in runs]).astype(np.float64) for runs in outputs)
        found[tensor.name] = float(10 * np.log10(a.var() / max(float(np.square(a - b).mean()), 1e-30)))
    return found
