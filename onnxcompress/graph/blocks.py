"""Find the parts of a network that can be dropped, from the graph alone.

A *block* is a region with one entry tensor and one exit tensor of the same shape, no inner tensor of which
is used outside. Dropping it lets every reader of the exit read the entry. There are four kinds:

residual    exit = Add(branch(entry), entry): a residual branch and its Add (arXiv 2202.07861 §3.1).
projection  exit = Add(branch(fork), entry), entry = projection(fork): the first block of a stage, whose
            shortcut strides or widens. The projection, at most one layer, stays; the branch goes.
unit        a region of the trunk that splits and ends in a Concat (ShuffleNetV2, Inception).
run         a shape-preserving convolution of the trunk with its BatchNorm and activation (VGG).

The *trunk* is the sequence of tensors through which every path from input to output goes. Projections,
units and runs are offered on the trunk only: elsewhere such a region is part of something larger (a dense
layer, a gate), and replacing it changes what is merged later. A region must also keep the rules R1 to R5 of
`block_rules`.

Does not handle: regions inside If, Loop or Scan bodies; blocks that change the shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.graph.block_rules import (
    IllegalRegion,
    Kind,
    Region,
    check_legal,
    region_macs,
    shapes_at_another_size,
)
from onnxcompress.graph.linear_layer import LINEAR_OPS
from onnxcompress.graph.macs import parameters_of
from onnxcompress.graph.query import is_op, producer
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model, Shape

ACTIVATIONS = (
    "Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Elu", "Selu",
    "Celu", "Gelu", "Mish", "Softplus", "Tanh", "ThresholdedRelu",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A part of the graph that can be dropped."""

    name: str
    """Name of the module where the exporter kept it, else of the exit tensor."""
    kind: Kind
    entry: str
    """Name of the input tensor."""
    exit: str
    """Name of the output tensor; when the block is dropped, its readers read `entry`."""
    shape: Shape
    """Shape of entry and exit, (N, C, H, W) in a CNN."""
    inner: tuple[str, ...]
    """First output of each node inside, in topological order; the last one is `exit`."""
    parameters: int
    macs: int
    """Multiply-accumulates for one image."""
    signature: str
    """Equal for blocks with the same operators and shapes, whose latency is therefore equal."""


@dataclass(frozen=True)
class Discovery:
    """The blocks of a graph in topological order, and the near misses with the rule that each breaks."""

    blocks: tuple[Block, ...]
    near_misses: tuple[Refusal, ...]

    def __getitem__(self, name: str) -> Block:
        """Look up a block by its name or exit tensor; raises KeyError where there is none."""
        for block in self.blocks:
            if name in (block.name, block.exit):
                return block
        raise KeyError(name)


def outermost(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Leave out the blocks that lie inside others, so that shares add up.

    Args:
        blocks: Blocks.

    Returns:
        Those that do not lie inside another, in the same order.
    """
    inside = {tensor for block in blocks for tensor in block.inner[:-1]}
    return tuple(block for block in blocks if block.exit not in inside)


def find_blocks(model: Model) -> Discovery:
    """Find all blocks of the main graph that can be dropped.

    Args:
        model: The model.

    Returns:
        The blocks, and near misses with their reasons.

    Raises:
        ModelError: The graph has a cycle, or its shapes contradict each other.
    """
    topology = model.analysis(Topology)
    elsewhere = shapes_at_another_size(model)
    regions: list[Region] = []
    misses: list[Refusal] = []
    for node in topology.order:
        if is_op(node, "Add", "Sum") and len(node.inputs) == 2:
            try:
                regions.append(_residual(model, topology, node, elsewhere))
            except IllegalRegion as miss:
                if miss.refusal[0]:
                    misses.append(Refusal(node.name or node.outputs[0].name, *miss.refusal))
    covered = {id(n) for region in regions for n in region.nodes}
    for candidate in _trunk_candidates(topology):
        if any(id(n) in covered for n in candidate.nodes):
            continue
        try:
            check_legal(model, topology, candidate, elsewhere)
        except IllegalRegion as miss:
            misses.append(Refusal(_label(candidate), *miss.refusal))
        else:
            regions.append(candidate)
    regions.sort(key=lambda r: topology.index[id(producer(r.exit))])
    return Discovery(_describe(model, topology, regions), tuple(misses))


def _residual(model: Model, topology: Topology, add: gs.Node, elsewhere: Mapping[str, Shape]) -> Region:
    """Find the residual block that ends in an Add. Raises IllegalRegion where there is none."""
    first, second = add.inputs
    if id(first) not in topology.data or id(second) not in topology.data or first is second:
        raise IllegalRegion("")  # it adds a bias, or a tensor to itself: this is no residual connection
    problem = IllegalRegion("")
    for branch, shortcut in ((first, second), (second, first)):
        entry = _through_identity(shortcut)
        if topology.position(entry) > topology.position(branch):
            continue
        try:
            nodes = _branch(topology, branch, entry)
            region = Region("residual", entry, add.outputs[0], (*nodes, add))
            check_legal(model, topology, region, elsewhere)
            return region
        except IllegalRegion as miss:
            problem = miss
    try:
        region = _projection(topology, add)
        check_legal(model, topology, region, elsewhere)
    except IllegalRegion as miss:
        raise problem from miss
    return region


def _projection(topology: Topology, add: gs.Node) -> Region:
    """Find the block of the trunk whose shortcut is a projection, which stays when its branch goes."""
    trunk = [id(tensor) for tensor in topology.trunk()]
    exit = add.outputs[0]
    if id(exit) not in trunk[1:]:
        raise IllegalRegion("its output is not on the trunk")
    fork = topology.trunk()[trunk.index(id(exit)) - 1]
    sides = [_branch(topology, tensor, fork) for tensor in add.inputs]
    layers = [sum(is_op(node, *LINEAR_OPS) for node in side) for side in sides]
    kept = layers.index(min(layers))
    branch = sides[1 - kept]
    if layers[kept] > 1 or layers[1 - kept] < 2 or {*map(id, branch)} & {*map(id, sides[kept])}:
        raise IllegalRegion("neither side of the Add is a projection")
    return Region("projection", add.inputs[kept], exit, (*branch, add))


def _through_identity(tensor: gs.Tensor) -> gs.Tensor:
    while is_op(node := producer(tensor), "Identity", "Dropout"):
        assert node is not None
        tensor = node.inputs[0]
    return tensor


def _branch(topology: Topology, branch: gs.Tensor, entry: gs.Tensor) -> list[gs.Node]:
    """Collect the nodes between entry and branch in topological order. Raises IllegalRegion by rule R2."""
    floor = topology.position(entry)
    found: dict[int, gs.Node] = {}
    pending = [branch]
    while pending:
        tensor = pending.pop()
        if tensor is entry or id(tensor) not in topology.dynamic:
            continue
        node = producer(tensor)
        if node is None or topology.index[id(node)] <= floor:
            raise IllegalRegion(
                "neither input of the Add is the input of the other's branch: the shortcut is a projection"
            )
        if id(node) not in found:
            found[id(node)] = node
            pending.extend(t for t in node.inputs if not t.is_empty())
    return sorted(found.values(), key=lambda n: topology.index[id(n)])


def _trunk_candidates(topology: Topology) -> Iterator[Region]:
    """Yield runs and units between neighbouring tensors of the trunk, before the feature tensor (R5)."""
    trunk = topology.trunk()
    limit = topology.feature()
    at = 0
    while at + 1 < len(trunk) and trunk[at] is not limit:
        entry, exit = trunk[at], trunk[at + 1]
        nodes = topology.between(entry, exit)
        last = producer(exit)
        at += 1
        if is_op(last, "Concat") and any(is_op(n, "Conv") for n in nodes):
            yield Region("unit", entry, exit, nodes)
        elif is_op(last, "Conv"):
            run = list(nodes)
            while at + 1 < len(trunk) and trunk[at] is not limit:
                tail = topology.between(trunk[at], trunk[at + 1])
                gate = len(tail) == 2 and is_op(tail[0], "Sigmoid", "HardSigmoid") and is_op(tail[1], "Mul")
                if not gate and not (len(tail) == 1 and is_op(tail[0], "BatchNormalization", *ACTIVATIONS)):
                    break
                run += tail
                at += 1
            assert last is not None
            if topology.shape(last.inputs[0]) == topology.shape(last.outputs[0]):
                yield Region("run", entry, trunk[at], tuple(run))


def _label(region: Region) -> str:
    last = next((n for n in region.nodes if n.op == "Conv"), region.nodes[-1])
    return str(last.name or last.outputs[0].name)


def _describe(model: Model, topology: Topology, regions: list[Region]) -> tuple[Block, ...]:
    shapes = tensor_shapes(model)
    names = [_name(region) for region in regions]
    blocks = []
    for region, name in zip(regions, names, strict=True):
        unique = name and names.count(name) == 1
        blocks.append(
            Block(
                name=name if unique else region.exit.name,
                kind=region.kind,
                entry=region.entry.name,
                exit=region.exit.name,
                shape=shapes[region.exit.name],
                inner=tuple(n.outputs[0].name for n in region.nodes),
                parameters=parameters_of(_with_constants(topology, region)),
                macs=region_macs(model, region),
                signature=_signature(region, shapes),
            )
        )
    return tuple(blocks)


def _with_constants(topology: Topology, region: Region) -> list[gs.Node]:
    """Add the nodes that compute the region's constants, such as a MatMul's transposed weight."""
    found = {id(node): node for node in region.nodes}
    pending = list(region.nodes)
    while pending:
        for tensor in pending.pop().inputs:
            node = None if id(tensor) in topology.dynamic else producer(tensor)
            if node is not None and id(node) not in found:
                found[id(node)] = node
                pending.append(node)
    return list(found.values())


def _signature(region: Region, shapes: dict[str, Shape]) -> str:
    parts = []
    for node in region.nodes:
        attrs = {k: v for k, v in node.attrs.items() if not isinstance(v, gs.Tensor | gs.Graph)}
        inputs = [shapes.get(t.name) for t in node.inputs]
        parts.append(f"{node.op}{sorted(attrs.items())}{inputs}")
    return ";".join(parts)


def _name(region: Region) -> str:
    """Return the module path that all node names of the region share, else that of its weights."""
    for separator, names in (
        ("/", [n.name for n in region.nodes if n.name]),
        (".", [t.name for n in region.nodes for t in n.inputs if isinstance(t, gs.Constant)]),
    ):
        named = [n.strip(separator).split(separator) for n in names if separator in n]
        shared: list[str] = []
        for parts in zip(*named, strict=False):
            if len(set(parts)) > 1:
                break
            shared.append(parts[0])
        if shared and region.kind != "run":
            return shared[-1] if separator == "/" else ".".join(shared)
    return "" if region.kind != "run" else _label(region)
