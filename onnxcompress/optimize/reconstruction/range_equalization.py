"""A range for each channel of an activation, folded into the layers beside it.

A quantizer has one scale for a tensor; its channels differ in range, and those with a small one get few
steps. Between a layer A and the layers B that alone read it, with an activation φ (Relu, Clip, none),

    B φ(A x) = B' φ(A' x)      A' row c = s_c A row c      B' column c = B column c / s_c      s_c = R / r_c

gives all channels the range R (r_c: the largest magnitude of channel c on the inputs, times MARGIN; with
few bits, which cut off rare large values, the range of the grid of its own with the least squared error). A
row's factor goes into its weight scale, B' keeps its precision where it is depthwise or rounded to its
inputs' moments. Exact for Relu and no activation. For a Clip to [0, R] (ReLU6) the Clip stays as it is:
what channel c has beyond r_c is cut off, as a quantizer with that range for the channel would do.
Sources: the scales of Xiao et al., SmoothQuant (ICML 2023), eq. 4 with all of the range moved; Nagel et
al., Data-Free Quantization (ICCV 2019), §4.1.

A self-gated activation (HardSwish, SiLU) lets no factor pass from A. Where its channels are so unlike that
the average one loses DISPARITY or more, as in front of depthwise convolutions, a Mul by s behind it makes
them alike: B φ(A x) = B' (s φ(A x)).

All writers and readers of a residual stream (joined by Add) have the same factors, exactly.
The record follows. Does not handle: groups that anything else writes or reads (pools, Slice, Concat).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.edit import replace_uses, set_values, unique_name
from onnxcompress.graph.query import data_input, is_op, is_output, producer, read, value_readers
from onnxcompress.graph.self_gated import is_gated
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction.activation_range import least_error_reaches
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.quantization.qdq_plan import Plan, QuantizedLayer
from onnxcompress.statistics.record import ChannelStatistics, read_record, write_record

MARGIN = 1.5
"""Largest values of other inputs are larger."""
VALUES = 4096
"""Values of a channel, about, by which its reach is chosen where quantizers have few bits."""
GOLDEN = (5**0.5 - 1) / 2
SHARED = 0.5
"""Exponent of the factors with few bits, in front of layers that add channels up: what makes ranges alike
makes columns of a weight unlike, which has one scale for a row. Chosen on images of MobileNetV2 (W4A4) that
nothing was fitted on."""
RECORDED = 4.0
"""Recorded standard deviations that a channel reaches at least."""
LARGEST = 64.0
"""Factor, at most: beyond it a channel is dead, unless it is that of a gate."""


DISPARITY = 64.0
"""Least noise of the channels without factors over that with factors, by which a Mul is worth its time.
PP-LCNet (W8A8, `tests/benchmarks/field_accuracy.py`): in front of pointwise convolutions 4 to 54, where
nothing is gained, in front of depthwise ones 140 to 880."""


@dataclass
class ChannelGroup:
    """Tensors whose channels must have the same factors, and who writes and reads them."""

    tensors: list[str] = field(default_factory=list)
    writers: list[QuantizedLayer] = field(default_factory=list)
    gated: list[gs.Tensor] = field(default_factory=list)
    """Outputs of self-gated activations: these get a Mul."""
    readers: list[QuantizedLayer] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    """Those of the tensors that layers read."""
    tops: set[float] = field(default_factory=set)
    """Upper ends of its Clips."""

    @property
    def all_depthwise(self) -> bool:
        """Whether no reader adds channels up."""
        return all(layer.linear.depthwise for layer in self.readers)

    @property
    def top(self) -> float | None:
        """The lowest upper end of its Clips; None: it has none."""
        return min(self.tops, default=None)


def find_channel_groups(model: Model, plan: Plan) -> list[ChannelGroup]:
    """Find the tensors between layers of a plan whose channels can be scaled.

    Args:
        model: The network.
        plan: Its layers.

    Returns:
        Groups of tensors, in the order of the plan.
    """
    found, seen = [], set[str]()
    tensors = model.graph.tensors()
    gated = (name for name, _ in plan.edges.values() if is_gated(tensors[name]))
    for name in (*(writer.linear.output_name for writer in plan.layers.values()), *gated):
        if name not in seen:
            group = _group_of(model, plan, tensors[name], seen)
            if group is not None and group.readers and len(group.tops) < 2:
                found.append(group)
    return found


def _group_of(model: Model, plan: Plan, start: gs.Tensor, seen: set[str]) -> ChannelGroup | None:
    """Return the group of a tensor; None where something else writes or reads it."""
    group, whole = ChannelGroup(), True
    pending = [start]
    shapes = tensor_shapes(model)
    while pending:
        tensor = pending.pop()
        if tensor.name in seen:
            continue
        seen.add(tensor.name)
        group.tensors.append(tensor.name)
        whole &= (
            not is_output(model, tensor)
            and shapes.get(tensor.name, ())[1:2] == shapes.get(start.name, ())[1:2]
        )
        gated = is_gated(tensor)
        if gated:
            group.gated.append(tensor)
        for node in [*([] if gated else tensor.inputs), *value_readers(tensor)] or [None]:
            layer = None if node is None else plan.layers.get(id(node))
            if layer is not None and node is producer(tensor):
                group.writers.append(layer)
                whole &= layer.linear.bias_name is not None
            elif layer is not None:
                group.readers.append(layer)
                group.read.add(tensor.name)
                whole &= node.inputs[layer.linear.data_at] is tensor
            elif is_op(node, "Add", "Relu", "Clip"):
                pending += node.inputs[: 2 if is_op(node, "Add") else 1] + node.outputs
                whole &= _scalable(model, node, group)
            else:
                whole = False
        whole &= bool(tensor.inputs)
    return group if whole else None


def _scalable(model: Model, node: gs.Node, group: ChannelGroup) -> bool:
    """Return whether factors pass the node; note the end of a Clip."""
    if is_op(node, "Add"):
        shapes = [tensor_shapes(model).get(t.name) for t in node.inputs]
        return shapes[0] is not None and shapes[0] == shapes[1]
    if is_op(node, "Clip"):
        ends = [None if t.is_empty() else constant_value(model, t) for t in node.inputs[1:]]
        ends += [None] * (2 - len(ends))
        if ends[1] is not None:
            group.tops.add(float(ends[1].item()))
        return ends[0] is not None and float(ends[0].item()) == 0
    return True


def stretch(
    model: Model,
    plan: Plan,
    images: Tensor,
    alignment: StatisticsAlignment,
    batch: int = 16,
    power: float = 1.0,
    few_bits: int | None = None,
) -> int:
    """Bring the channels of groups of tensors to equal ranges, in place.

    The alignment's maps and the record follow. Layers of the plan must be made anew afterwards.

    Args:
        model: The network.
        plan: Its layers.
        images: Inputs by which ranges are measured, (N, …).
        alignment: The alignment with which they run.
        batch: Images that run at once.
        power: Exponent of the factors (the α of SmoothQuant, Xiao et al., arXiv 2211.10438). Below 1
            channels stay nearer to what they were, as made images and weights with one scale want it, and
            none is taken to reach less far than RECORDED deviations.
        few_bits: Bits of the quantizers, where these have so few steps that they cut off rare large values:
            a channel then reaches as far as a grid of its own with the least squared error.

    Returns:
        The number of groups that were scaled.
    """
    places = find_channel_groups(model, plan)
    if not places:
        return 0
    reaches = _reaches(model, places, images, alignment, batch, few_bits)
    record = read_record(model)
    scaled = 0
    for one in places:
        each = torch.stack([reaches[name] for name in sorted(one.read)]).double().numpy()
        farthest = MARGIN * each.max(0) if few_bits is None else _middle(each)
        for known in (record[name] for name in one.tensors if power < 1 and name in record):
            farthest = np.maximum(farthest, np.abs(known.mean) + RECORDED * known.std)
        scale = _scales(farthest, one.top, np.inf if one.gated else LARGEST)
        own = power if few_bits is None or one.all_depthwise else SHARED * power
        scale = scale if one.gated else scale**own
        if one.gated and not (one.all_depthwise and np.square(scale).mean() >= DISPARITY):
            continue
        scaled += 1
        _apply(model, one, scale, alignment, record)
    write_record(model, record)
    model.touch()
    return scaled


def _reaches(
    model: Model,
    groups: list[ChannelGroup],
    images: Tensor,
    alignment: StatisticsAlignment,
    batch: int,
    few_bits: int | None,
) -> dict[str, Tensor]:
    """Measure how far each channel of each tensor that layers read is to reach: name -> (C,)."""
    executor = Executor.from_model(model)
    gated = {tensor.name for one in groups for tensor in one.gated}
    places = max(1, VALUES // len(images))

    def measure(made: dict[str, Tensor]) -> dict[str, Tensor]:
        if few_bits is None:
            return {name: _reach(made.pop(name), name in gated)[:, None] for name in [*made]}
        return {name: _samples(made.pop(name), places) for name in [*made]}

    parts = list(
        executor.map_batches(
            {data_input(model).name: images},
            [name for one in groups for name in sorted(one.read)],
            measure,
            count=len(images),
            batch=batch,
            parameters={name: alignment.align(name, executor.parameters[name]) for name in alignment.names},
        )
    )
    whole = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    if few_bits is None:
        return {name: x.amax(1) for name, x in whole.items()}
    return {name: least_error_reaches(x, few_bits) for name, x in whole.items()}


def _reach(x: Tensor, gated: bool) -> Tensor:
    """Return the largest magnitude of each channel, (C,).

    Self-gated activations give little below 0: where that counts twice, the grid has half as many steps
    below as above, and no channel uses fewer than half of all.
    """
    rows = x.movedim(1, 0).flatten(1)
    return torch.maximum(rows.amax(1), -(2 if gated else 1) * rows.amin(1))


def _samples(x: Tensor, places: int) -> Tensor:
    """Return the values of each channel at so many places of each image, or at all, (C, n).

    Places are multiples of the golden ratio: evenly spread, over rows and over columns.
    """
    rows = x.flatten(2) if x.ndim > 2 else x[:, :, None]
    count = rows.shape[2]
    if count > places:
        rows = rows[:, :, (torch.arange(places, dtype=torch.float64) * GOLDEN % 1 * count).long()]
    return rows.movedim(1, 0).flatten(1)


def _middle(reaches: np.ndarray) -> np.ndarray:
    """Return the geometric mean of the tensors' reaches, (C,); where a channel is dead counts little."""
    middle: np.ndarray = np.exp(np.log(np.maximum(reaches, reaches.max(0) / LARGEST)).mean(0))
    return middle


def _scales(largest: np.ndarray, top: float | None, alive: float) -> np.ndarray:
    reach = largest if top is None else np.minimum(largest, top)
    goal = float(reach.max(initial=0.0)) if top is None else top
    scale = goal / np.maximum(reach, 1e-30)
    return np.where(scale <= alive, np.minimum(scale, LARGEST), 1.0)


def _apply(
    model: Model,
    one: ChannelGroup,
    scale: np.ndarray,
    alignment: StatisticsAlignment,
    record: dict[str, ChannelStatistics],
) -> None:
    tensors = model.graph.tensors()
    for writer in one.writers:
        _rescale(writer, tensors[writer.linear.weight_name], outputs=scale)
        assert writer.linear.bias_name is not None
        bias = tensors[writer.linear.bias_name]
        set_values(bias, (read(bias).astype(np.float64) * scale).astype(np.float32))
        if writer.linear.bias_name in alignment.biases:
            factor, shift = alignment.biases[writer.linear.bias_name]
            alignment.biases[writer.linear.bias_name] = factor, shift * torch.from_numpy(scale).to(shift)
    for tensor in one.gated:
        _multiply(model, tensor, scale)
    for reader in one.readers:
        _rescale(reader, tensors[reader.linear.weight_name], inputs=1 / scale)
    for name in record.keys() & set(one.tensors) - {tensor.name for tensor in one.gated}:
        record[name] = record[name].scaled(scale)


def _multiply(model: Model, tensor: gs.Tensor, scale: np.ndarray) -> None:
    """Put a Mul by factors of the channels behind a tensor."""
    rank = len(tensor_shapes(model)[tensor.name])
    factors = gs.Constant(
        unique_name(model, f"{tensor.name}_factors"),
        scale.astype(np.float32).reshape(-1, *[1] * (rank - 2)),
    )
    scaled = gs.Variable(unique_name(model, f"{tensor.name}_scaled"), tensor.dtype, tensor.shape)
    replace_uses(model, tensor, scaled)
    model.graph.nodes.append(gs.Node("Mul", f"{scaled.name}_node", {}, [tensor, factors], [scaled]))


def _rescale(layer: QuantizedLayer, weight: gs.Constant, **factors: np.ndarray) -> None:
    values = np.ascontiguousarray(read(weight)).copy()
    groups = layer.linear.groups
    view = layer.linear.view(values)
    for side, factor in factors.items():
        view *= factor.reshape((groups, -1, 1, 1) if side == "outputs" else (groups, 1, -1, 1))
    set_values(weight, values)
