"""A prepared network, what it runs on, and which tensors a pass over its nodes holds at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs
import torch
from torch import Tensor

from onnxcompress.errors import InputError
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model, Shape
from onnxcompress.optimize.calibration import Inputs
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.open_batch import file_batch, images_at_once
from onnxcompress.optimize.reconstruction.range_equalization import stretch
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment, standardize
from onnxcompress.quantization.qdq_plan import Bits, Plan, make_plan

BATCH = 32
"""Inputs that run at once where the file leaves it open."""


@dataclass
class CalibrationContext:
    """A prepared network and what it is measured on."""

    model: Model
    plan: Plan
    images: Tensor
    """(N, …) at the network's one input, N a multiple of the batch."""
    twin: StatisticsAlignment
    batch: int
    real: int = 0
    """The first of the images, so many, are real ones."""
    plain: dict[str, Tensor] = field(default_factory=dict)
    """Weights whose magnitudes decide what is pruned, where they are not the model's."""

    @staticmethod
    def of(model: Model, inputs: Inputs, *, stretched: bool) -> CalibrationContext:
        """Scales the model's channels in place with `stretched`. Raises InputError for too few images."""
        x = whole_batches(model, inputs, fixed_batch(model))
        twin = twin_of(model, x) if inputs.layerwise else StatisticsAlignment()
        bits = Bits(8, None, None)
        plan = make_plan(model, bits)
        batch = images_at_once(model, x) or BATCH
        plain = {
            one.linear.weight_name: torch.from_numpy(one.linear.weight) for one in plan.layers.values()
        }
        if stretched and stretch(model, plan, x, twin, batch):
            plan = make_plan(model, bits)
        return CalibrationContext(model, plan, x, twin, batch, min(inputs.real_count, len(x)), plain)


def fixed_batch(model: Model) -> int:
    """The batch that the file fixes; 1 where it is open."""
    return file_batch(model) or 1


def whole_batches(model: Model, inputs: Inputs, batch: int) -> Tensor:
    """The inputs but for the rest of the last batch. Raises InputError where none is full."""
    x = torch.from_numpy(inputs.images.array())
    x = x[: len(x) // batch * batch]
    if not len(x):
        raise InputError(
            f"{model.name}: the file fixes a batch of {batch}, there are {len(inputs.images)} images"
        )
    return x


def twin_of(model: Model, x: Tensor) -> StatisticsAlignment:
    """The maps that give the network its recorded statistics on these inputs."""
    topology = Topology(model)
    last = topology.feature() or topology.trunk()[-1]
    batch = images_at_once(model, x) or BATCH
    return standardize(model, Executor.from_model(model), x, last.name, batch=batch)


def nodes_between(topology: Topology, start: str | None, stop: str | None) -> list[gs.Node]:
    """Nodes that make data behind one tensor of the trunk, up to another; None: the graph's ends."""
    places = {t.name: topology.position(t) for t in topology.trunk()}
    first = 0 if start is None else places[start] + 1
    end = len(topology.order) if stop is None else places[stop] + 1
    return [n for n in topology.order[first:end] if any(id(t) in topology.data for t in n.outputs)]


def live_floats(model: Model, nodes: Sequence[gs.Node], last: Mapping[str, int], source: str) -> int:
    """Numbers of one image that are needed at a time, at most.

    last: tensor -> place of its last reader. source: the tensor that is fed.
    """
    shapes = tensor_shapes(model)
    live: set[str] = {source}
    most = 1
    for place, node in enumerate(nodes):
        live |= {t.name for t in node.outputs}
        most = max(most, sum(floats(shapes.get(n)) for n in live))
        live = {name for name in live if last.get(name, -1) > place}
    return most


def floats(shape: Shape | None) -> int:
    """Numbers of one image in a tensor, as far as its sizes are known."""
    return math.prod(d for d in (shape or ())[1:] if isinstance(d, int)) if shape else 0


def needs(node: gs.Node, topology: Topology) -> list[str]:
    """Tensors with data that the node reads, itself or through computations of shapes."""
    found: dict[str, None] = {}
    pending, seen = list(node.inputs), set()
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen or id(tensor) not in topology.dynamic:
            continue
        seen.add(id(tensor))
        if id(tensor) in topology.data:
            found[tensor.name] = None
        else:
            pending += [t for maker in tensor.inputs for t in maker.inputs]
    return list(found)
