"""Find the parts of a network that can be replaced by the identity, from the graph alone.

A *block* is a region with one entry tensor and one exit tensor of the same shape, no inner tensor of which
is used outside. Dropping it lets every reader of the exit read the entry. There are three kinds:

residual    exit = Add(branch(entry), entry): a residual branch and its Add (arXiv 2202.07861 §3.1).
unit        a region of the trunk that splits and ends in a Concat (ShuffleNetV2, Inception).
run         a shape-preserving convolution of the trunk with its BatchNorm and activation (VGG).

The *trunk* is the sequence of tensors through which every path from input to output goes. Units and runs
are offered on the trunk only: elsewhere a region of equal shapes is part of something larger (a dense
layer, a gate), and replacing it changes what is merged later. Legality, an allow-list:

  R1  the shapes of entry and exit are known and equal; where sizes of the input are only assumed, at
      others, too: a block must be one at any size
  R2  the region depends on nothing but its entry and constants
  R3  no inner tensor is read outside or is a graph output; the exit is not a graph output, and no body of
      an If, Loop or Scan reads it
  R4  it has at least one layer with weights (Conv, ConvTranspose, Gemm, MatMul)
  R5  a run's convolution mixes channels (group = 1) and lies before the feature tensor

Does not handle: regions inside If, Loop or Scan bodies; blocks that change the shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.errors import ModelError
from onnxcompress.graph.macs import node_macs, parameters_of
from onnxcompress.graph.query import consumers, input_at, is_op, is_output, producer
from onnxcompress.graph.shape_inference import infer, tensor_shapes
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model, Shape

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
ACTIVATIONS = (
    "Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Elu", "Selu",
    "Celu", "Gelu", "Mish", "Softplus", "Tanh", "ThresholdedRelu",
)  # fmt: skip
STEP = 32
"""By which sizes differ where blocks are looked for at a second one, times the axis."""
Kind = Literal["residual", "unit", "run"]


@dataclass(frozen=True)
class Block:
    """A part of the graph that can be replaced by the identity."""

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


@dataclass(frozen=True)
class _Region:
    kind: Kind
    entry: gs.Tensor
    exit: gs.Tensor
    nodes: tuple[gs.Node, ...]


class _Illegal(Exception):
    """The rule that a candidate breaks, and what would mend that."""

    def __init__(self, rule: str, remedy: str = "") -> None:
        super().__init__(rule)
        self.refusal = (rule, remedy)


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
    elsewhere = _at_another_size(model)
    regions: list[_Region] = []
    misses: list[Refusal] = []
    for node in topology.order:
        if is_op(node, "Add", "Sum") and len(node.inputs) == 2:
            try:
                regions.append(_residual(model, topology, node, elsewhere))
            except _Illegal as miss:
                if miss.refusal[0]:
                    misses.append(Refusal(node.name or node.outputs[0].name, *miss.refusal))
    covered = {id(n) for region in regions for n in region.nodes}
    for candidate in _trunk_candidates(topology):
        if any(id(n) in covered for n in candidate.nodes):
            continue
        try:
            _check(model, topology, candidate, elsewhere)
        except _Illegal as miss:
            misses.append(Refusal(_label(candidate), *miss.refusal))
        else:
            regions.append(candidate)
    regions.sort(key=lambda r: topology.index[id(producer(r.exit))])
    return Discovery(_describe(model, topology, regions), tuple(misses))


def _residual(model: Model, topology: Topology, add: gs.Node, elsewhere: Mapping[str, Shape]) -> _Region:
    first, second = add.inputs
    if id(first) not in topology.data or id(second) not in topology.data or first is second:
        raise _Illegal("")  # a bias or a doubling: no residual at all
    problem = _Illegal("")
    for branch, shortcut in ((first, second), (second, first)):
        entry = _through_identity(shortcut)
        if topology.position(entry) > topology.position(branch):
            continue
        try:
            nodes = _branch(topology, branch, entry)
            region = _Region("residual", entry, add.outputs[0], (*nodes, add))
            _check(model, topology, region, elsewhere)
            return region
        except _Illegal as miss:
            problem = miss
    raise problem


def _through_identity(tensor: gs.Tensor) -> gs.Tensor:
    while is_op(node := producer(tensor), "Identity", "Dropout"):
        assert node is not None
        tensor = node.inputs[0]
    return tensor


def _branch(topology: Topology, branch: gs.Tensor, entry: gs.Tensor) -> list[gs.Node]:
    """Nodes between entry and branch in topological order. Raises _Illegal where R2 fails."""
    floor = topology.position(entry)
    found: dict[int, gs.Node] = {}
    pending = [branch]
    while pending:
        tensor = pending.pop()
        if tensor is entry or id(tensor) not in topology.dynamic:
            continue
        node = producer(tensor)
        if node is None or topology.index[id(node)] <= floor:
            raise _Illegal(
                "neither side of the Add is what goes into the other: the shortcut is a projection"
            )
        if id(node) not in found:
            found[id(node)] = node
            pending.extend(t for t in node.inputs if not t.is_empty())
    return sorted(found.values(), key=lambda n: topology.index[id(n)])


def _trunk_candidates(topology: Topology) -> Iterator[_Region]:
    """Runs and units between neighbouring tensors of the trunk, before the feature tensor (R5)."""
    trunk = topology.trunk()
    limit = topology.feature()
    at = 0
    while at + 1 < len(trunk) and trunk[at] is not limit:
        entry, exit = trunk[at], trunk[at + 1]
        nodes = topology.between(entry, exit)
        last = producer(exit)
        at += 1
        if is_op(last, "Concat") and any(is_op(n, "Conv") for n in nodes):
            yield _Region("unit", entry, exit, nodes)
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
                yield _Region("run", entry, trunk[at], tuple(run))


def _check(model: Model, topology: Topology, region: _Region, elsewhere: Mapping[str, Shape]) -> None:
    inside = {id(node) for node in region.nodes}
    before, after = topology.shape(region.entry), topology.shape(region.exit)
    remedy = "give the sizes of the network's input with --input-shape, or run shape inference"
    if before is None or after is None or not all(isinstance(d, int) for d in before[1:]):
        raise _Illegal("the shape is unknown", remedy)
    if len(before) != len(after) or before[1:] != after[1:]:
        raise _Illegal(f"input {_dims(before)} and output {_dims(after)} differ in shape")
    if _differ(region, elsewhere):
        raise _Illegal("its input and output have the same shape at some sizes of the network's input only")
    if not any(_has_weight(topology, node) for node in region.nodes):
        raise _Illegal("it has no layer with weights")
    if region.kind == "run" and any(n.attrs.get("group", 1) != 1 for n in region.nodes if n.op == "Conv"):
        raise _Illegal("a depthwise or grouped convolution on the trunk is half of a separable one")
    if is_output(model, region.exit):
        raise _Illegal("its output is an output of the graph")
    if any(id(reader) not in topology.index for reader in consumers(region.exit)):
        raise _Illegal("its output is read inside the body of an If, Loop or Scan")
    try:
        _macs(model, region)
    except ModelError as error:
        raise _Illegal(str(error), remedy) from error
    for node in region.nodes:
        for tensor in node.outputs:
            if tensor is region.exit:
                continue
            if is_output(model, tensor):
                raise _Illegal(f"tensor {tensor.name!r} inside is an output of the graph")
            for reader in consumers(tensor):
                if id(reader) not in inside:
                    raise _Illegal(
                        f"tensor {tensor.name!r} inside is also read by {reader.op} {reader.name!r}"
                    )


def _differ(region: _Region, shapes: Mapping[str, Shape]) -> bool:
    """Whether entry and exit are not known to have one shape."""
    before, after = shapes.get(region.entry.name), shapes.get(region.exit.name)
    return before is None or after is None or before[1:] != after[1:]


def _at_another_size(model: Model) -> Mapping[str, Shape]:
    """Shapes of all tensors with other sizes in place of the assumed ones; empty where that cannot be.

    The steps are multiples of what networks are built for, and differ, so that no two axes stay alike.
    """
    if not model.assumed:
        return tensor_shapes(model)
    files = {t.name: t.shape for t in model.graph.inputs}
    other = {
        name: tuple(
            size + STEP * axis if isinstance(size, int) and not isinstance(open_size, int) else size
            for axis, (size, open_size) in enumerate(zip(shape, files[name], strict=True))
        )
        for name, shape in model.assumed.items()
    }
    try:
        return infer(model, other).shapes
    except ModelError:
        return {}


def _has_weight(topology: Topology, node: gs.Node) -> bool:
    if not is_op(node, *LINEAR):
        return False
    return any((t := input_at(node, i)) is not None and id(t) not in topology.data for i in (0, 1))


def _dims(shape: Shape) -> str:
    return "×".join("?" if d is None else str(d) for d in shape)


def _label(region: _Region) -> str:
    last = next((n for n in region.nodes if n.op == "Conv"), region.nodes[-1])
    return str(last.name or last.outputs[0].name)


def _describe(model: Model, topology: Topology, regions: list[_Region]) -> tuple[Block, ...]:
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
                macs=_macs(model, region),
                signature=_signature(region, shapes),
            )
        )
    return tuple(blocks)


def _macs(model: Model, region: _Region) -> int:
    return sum(node_macs(node, tensor_shapes(model)) for node in region.nodes)


def _with_constants(topology: Topology, region: _Region) -> list[gs.Node]:
    """The region's nodes and those that compute its constants, such as a MatMul's transposed weight."""
    found = {id(node): node for node in region.nodes}
    pending = list(region.nodes)
    while pending:
        for tensor in pending.pop().inputs:
            node = None if id(tensor) in topology.dynamic else producer(tensor)
            if node is not None and id(node) not in found:
                found[id(node)] = node
                pending.append(node)
    return list(found.values())


def _signature(region: _Region, shapes: dict[str, Shape]) -> str:
    parts = []
    for node in region.nodes:
        attrs = {k: v for k, v in node.attrs.items() if not isinstance(v, gs.Tensor | gs.Graph)}
        inputs = [shapes.get(t.name) for t in node.inputs]
        parts.append(f"{node.op}{sorted(attrs.items())}{inputs}")
    return ";".join(parts)


def _name(region: _Region) -> str:
    """The module path common to all names in the region: torch's node names, or else names of weights."""
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
