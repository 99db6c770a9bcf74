"""Tune a network of few bits as a whole: integers of weights, biases and scales, by gradient.

    student:  x ─ FakeQuantize ─> layer (FakeQuantize(w), b) ─> …         teacher: the float network

Layers were fitted one by one (`quantize`). Only this step sees what errors of several layers do together,
and what activations cut off. The student computes with the rounded values, and rounding passes gradients on
(a straight-through estimator); scales learn with the gradient of Esser et al., Learned Step Size
Quantization (ICLR 2020). Its outputs and its trunk are brought to the teacher's by `finetune`: the result
is never worse than the fitted layers on inputs that neither saw.

A weight is tuned in units of its scale, so that one rate fits all rows. Weights and activations of 8 bits
or more keep their grids: their weights keep what saturation allows.

Does not handle: networks with several outputs or none that the input reaches alone; aligned statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnxcompress.data.image_set import ImageSet
from onnxcompress.graph.edit import set_values
from onnxcompress.graph.query import data_input, is_op, producer
from onnxcompress.graph.reshape_targets import batch_free_targets
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import Inputs
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.open_batch import images_at_once
from onnxcompress.optimize.executor.ops import OWN_DOMAIN
from onnxcompress.optimize.reconstruction.context import CalibrationContext
from onnxcompress.optimize.reconstruction.feature_loss import Matched
from onnxcompress.optimize.reconstruction.finetune import Schedule, finetune
from onnxcompress.optimize.reconstruction.held_out import HeldOut, keep_aside
from onnxcompress.optimize.reconstruction.patches import matrix, stored
from onnxcompress.optimize.reconstruction.quantize import QuantizationResults
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome
from onnxcompress.progress import Progress, silent
from onnxcompress.quantization.affine_grid import SMALLEST, weight_limits
from onnxcompress.quantization.qdq_plan import STREAM_BITS, Key, Plan, QuantizedLayer
from onnxcompress.quantization.qdq_writer import channel_axis

BATCH, LEARNING_RATE = 16, 3e-3
"""Images in a step; peak rate, relative to a parameter's root mean square."""


@dataclass(frozen=True)
class TuningData:
    """Inputs to tune on, and those that decide what is kept."""

    aside: Tensor
    """Inputs that nothing learned from, (N, …)."""
    shares: Tensor | None = None
    """How often each of the others is drawn, relative to each other; None: equally often."""
    nhwc: bool = False
    """Whether channels are the last axis."""


@dataclass(frozen=True)
class FakeQuantized:
    """A network that computes with rounded values, and the names of what was put into its graph."""

    executor: Executor
    scales: dict[Key, str]
    """Quantizer that owns a grid -> initializer of its scale."""
    factors: dict[str, str]
    """Weight -> initializer by which its scales are multiplied; the weight is in units of its scales."""
    frozen: frozenset[str]
    """Initializers that are not to be tuned."""


def is_tunable(model: Model, inputs: Inputs) -> bool:
    """Tell whether a network can be tuned as a whole.

    Args:
        model: The network, with one input.
        inputs: What it learns from.

    Returns:
        False where it has several outputs, or none that depends on the input; where it takes a fixed number
        of images; where the inputs go with aligned statistics.
    """
    data, outputs = model.analysis(Topology).data, model.graph.outputs
    if inputs.layerwise or len(outputs) != 1 or id(outputs[0]) not in data:
        return False
    return images_at_once(model, torch.from_numpy(inputs.images.array())) is None


def tuning_data(model: Model, inputs: Inputs, values: Tensor, seed: int) -> tuple[Tensor, TuningData]:
    """Divide inputs into those to learn from and those to judge by.

    Args:
        model: The network.
        inputs: The inputs.
        values: Their values, as the network takes them, (N, …).
        seed: Random seed of inputs that are made to judge by, where there are too few.

    Returns:
        The values to learn from, and what tuning needs besides.
    """
    nhwc = isinstance(inputs.images, ImageSet) and inputs.images.preprocess.layout == "nhwc"
    learned, aside, shares = keep_aside(model, inputs, values, seed)
    return learned, TuningData(aside, shares, nhwc)


def tune_quantized(
    context: CalibrationContext,
    results: QuantizationResults,
    data: TuningData,
    *,
    steps: int,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> tuple[QuantizationResults, TuningOutcome]:
    """Tune the fitted layers together.

    Sources: Esser et al., LSQ (ICLR 2020); targets within the network: Li et al., BRECQ (ICLR 2021).

    Args:
        context: The float network, the plan, and the inputs to tune on.
        results: The fitted layers.
        data: The inputs kept aside.
        steps: Steps of Adam.
        seed: Random seed.
        device: Where torch computes.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The tuned layers, and what tuning gave on the inputs kept aside; where no step was better there, the
        fitted ones.
    """
    student = fake_quantized(context.model, context.plan, results, device)
    teacher = Executor.from_model(context.model, device=device)
    source, output = str(data_input(context.model).name), str(context.model.graph.outputs[0].name)
    matched = Matched(source, (output, output), tuple((name, name) for name in levels_of(context.model)))
    tuned = finetune(
        student.executor,
        teacher,
        matched,
        context.images,
        Schedule(
            steps=steps, batch=BATCH, learning_rate=LEARNING_RATE, seed=seed, whole=True, orthogonal=False
        ),
        HeldOut(teacher, data.aside, source, output, batch=context.batch),
        frozen=student.frozen,
        shares=data.shares,
        nhwc=data.nhwc,
        progress=progress,
    )
    if tuned.outcome.discarded:
        return results, tuned.outcome
    values = {name: value.detach().cpu() for name, value in tuned.values.items()}
    return with_values(results, context.plan, student, values), tuned.outcome


def levels_of(model: Model) -> list[str]:
    """List the tensors of the trunk that are matched: what layers and sums give.

    Args:
        model: The network.

    Returns:
        Names, first to last, without outputs of the network.
    """
    outputs = {tensor.name for tensor in model.graph.outputs}
    trunk = model.analysis(Topology).trunk()
    return [str(t.name) for t in trunk if is_op(producer(t), "Conv", "Add") and t.name not in outputs]


def fake_quantized(
    model: Model, plan: Plan, results: QuantizationResults, device: str = "cpu"
) -> FakeQuantized:
    """Build the network that computes with the rounded values of fitted layers.

    Args:
        model: The float network; it stays as it is.
        plan: What is quantized.
        results: The fitted layers.
        device: Where torch computes.

    Returns:
        The network, whose tensors have the names of the float network's.
    """
    own = model.copy()
    twins = {node.outputs[0].name: node for node in own.graph.nodes}
    nodes = {id(node): twins[node.outputs[0].name] for node in model.graph.nodes}
    added: list[gs.Node] = []
    scales = _quantize_activations(own, nodes, plan, results, added)
    factors, frozen = {}, set[str]()
    for key, layer in plan.layers.items():
        rounded, bias = results.weights[key], layer.linear.bias_name
        if key in results.biases and bias is not None:
            tensor = own.graph.tensors()[bias]
            set_values(tensor, results.biases[key].cpu().numpy().reshape(tensor.shape).astype(np.float32))
        name, shape = layer.linear.weight_name, torch.Size(layer.linear.view(layer.linear.weight).shape)
        tuned = layer.weight_bits < STREAM_BITS
        value = rounded.integers.float() if tuned else rounded.weight
        set_values(own.graph.tensors()[name], stored(layer, value.cpu(), shape).numpy())
        if tuned:
            factors[name] = f"{OWN_DOMAIN}.{name}.factor"
            _quantize_weight(nodes[key], layer, rounded.scale, factors[name], added)
            frozen.add(f"{OWN_DOMAIN}.{name}.unit")
        else:
            frozen.add(name)
    frozen |= {name for key, name in scales.items() if key[1] >= STREAM_BITS}
    own.graph.nodes.extend(added)
    targets = {id(nodes[key]): value for key, value in batch_free_targets(model).items()}
    executor = Executor(own.graph, device=device, opset=model.opset, targets=targets)
    return FakeQuantized(executor, scales, factors, frozenset(frozen))


def _quantize_activations(
    own: Model,
    nodes: Mapping[int, gs.Node],
    plan: Plan,
    results: QuantizationResults,
    added: list[gs.Node],
) -> dict[Key, str]:
    """Put a FakeQuantize in front of each edge of the plan; return the initializers of the scales."""
    tensors, made = own.graph.tensors(), dict[Key, gs.Variable]()
    scales: dict[Key, gs.Constant] = {}
    for (place, index), key in plan.edges.items():
        root = plan.root(key)
        grid = results.grids[root]
        if root not in scales:
            name = f"{OWN_DOMAIN}.{root[0]}.{root[1]}.scale"
            scales[root] = gs.Constant(name, np.asarray(grid.scale, np.float32).reshape(1))
        if key not in made:
            made[key] = gs.Variable(f"{OWN_DOMAIN}.{key[0]}.{key[1]}", np.float32)
            ends = {"low": grid.low - grid.zero_point, "high": grid.high - grid.zero_point}
            added.append(_node(made[key], [tensors[key[0]], scales[root]], **ends))
        nodes[place].inputs[index] = made[key]
    return {root: str(scale.name) for root, scale in scales.items()}


def _quantize_weight(
    node: gs.Node, layer: QuantizedLayer, scale: Tensor, factor: str, added: list[gs.Node]
) -> None:
    """Put a FakeQuantize between a node and its weight, which is in units of its scales."""
    weight, units = node.inputs[layer.linear.weight_at], scale.cpu().numpy().reshape(-1)
    low, high = weight_limits(layer.weight_bits)
    attributes = {"low": low, "high": high}
    if (units == units[0]).all():
        units = units[:1]
    else:
        attributes["axis"] = channel_axis(layer)
    constants = [
        gs.Constant(factor, np.ones(units.shape, np.float32)),
        gs.Constant(f"{OWN_DOMAIN}.{weight.name}.unit", units.astype(np.float32)),
    ]
    output = gs.Variable(f"{OWN_DOMAIN}.{weight.name}", np.float32)
    added.append(_node(output, [weight, *constants], **attributes))
    node.inputs[layer.linear.weight_at] = output


def _node(output: gs.Variable, inputs: list[gs.Tensor], **attributes: int) -> gs.Node:
    return gs.Node("FakeQuantize", output.name, attributes, inputs, [output], domain=OWN_DOMAIN)


def with_values(
    results: QuantizationResults, plan: Plan, student: FakeQuantized, values: Mapping[str, Tensor]
) -> QuantizationResults:
    """Put tuned values in place of fitted ones.

    Args:
        results: The fitted layers.
        plan: What is quantized.
        student: The network that was tuned.
        values: Initializer -> tuned value, on the CPU.

    Returns:
        The results with the tuned grids, weights and biases.
    """
    grids = {
        key: replace(grid, scale=_scale(values[student.scales[key]]))
        if student.scales.get(key) in values
        else grid
        for key, grid in results.grids.items()
    }
    weights, biases = dict(results.weights), dict(results.biases)
    for key, layer in plan.layers.items():
        name, bias = layer.linear.weight_name, layer.linear.bias_name
        if bias is not None and bias in values and key in biases:
            biases[key] = values[bias].reshape(-1)
        if student.factors.get(name) not in values:
            continue
        fitted = weights[key]
        factor = values[student.factors[name]].abs().clamp_min(SMALLEST)
        factor = factor.expand(fitted.scale.numel()).reshape(fitted.scale.shape)
        units, _ = matrix(layer, values[name].contiguous())
        integers = torch.round(units / factor).clamp(*weight_limits(layer.weight_bits))
        weights[key] = replace(fitted, integers=integers, scale=fitted.scale * factor)
    return replace(results, grids=grids, weights=weights, biases=biases)


def _scale(value: Tensor) -> np.ndarray:
    return np.asarray(max(abs(float(value)), SMALLEST), np.float32)
