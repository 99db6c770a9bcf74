"""What is quantized where: the layers, the tensors with quantizers, and which inputs read them.

    tensor --quantizer (bits)--> edge into a node

An edge is (node, input index); all edges that read a tensor with the same bits share one quantizer. They
are placed where onnxruntime's integer kernels need them (QLinearConv, QLinearAdd, …): on each input of a
linear layer and of an element-wise or pooling operator, and behind the activation (Relu, Clip) that only
such a layer feeds, never before it. Operators that only move numbers (Reshape, MaxPool, Slice, …) have the
same grid on both sides.

With activations of 8 bits (or 16) everything has these, and the output of a quantized node is quantized
for all of its readers. With fewer, linear layers read that many bits; residual sums, pools and the like
read 8: no integer kernel with fewer exists there, and a residual stream needs more precision than a layer.

Legality of a layer (refused with the reason otherwise):
 1. a Conv, ConvTranspose, Gemm or MatMul on data, with a constant float32 weight (rules 6 and 7 of
    `graph.linear_layer`);
 2. nothing else reads that weight; the bias is constant, one number for each channel;
 3. of a Gemm: not transposed input, alpha 1.
Does not handle: recurrent and attention operators, layers in bodies of If, Loop and Scan: they stay floats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.formatting import counted
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.linear_layer import BIAS_AT, LINEAR_OPS, Linear, as_linear
from onnxcompress.graph.node_selection import EVERY_NODE, NodeSelection
from onnxcompress.graph.order import node_reads
from onnxcompress.graph.query import (
    attribute,
    input_at,
    is_op,
    is_output,
    node_label,
    only_consumer,
    producer,
    value_readers,
)
from onnxcompress.graph.shape_inference import tensor_shapes, tensor_types
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.quantization.moving_ops import moves
from onnxcompress.quantization.runtimes import RULES, Placement

STREAM_BITS = 8
"""Bits, at least, of what sums, pools and the like read."""
FUSED = ("Relu", "Clip")

Key = tuple[str, int]
"""A quantizer: name of the tensor, and bits."""
Edge = tuple[int, int]
"""An input of a node: id of the node, and position."""


@dataclass(frozen=True)
class QuantizedLayer:
    """A linear layer whose weight is quantized."""

    linear: Linear
    weight_bits: int
    input: Key | None
    """Quantizer of the input; None: it reads floats."""
    by_channel: bool = True
    """Whether the runtime takes a scale for each output channel of this operator."""

    def per_channel(self, wanted: bool) -> bool:
        """Return whether each output channel gets a scale of its own.

        A grouped ConvTranspose cannot have that: the axis of its output channels covers one group only.

        Args:
            wanted: Whether the user asks for it.

        Returns:
            False where the layer gets one scale.
        """
        return (
            wanted
            and self.by_channel
            and not (self.linear.node.op == "ConvTranspose" and self.linear.groups > 1)
        )


@dataclass
class Plan:
    """Everything that is to be quantized."""

    layers: dict[int, QuantizedLayer] = field(default_factory=dict)
    """Layers by id of the node."""
    edges: dict[Edge, Key] = field(default_factory=dict)
    like: dict[Key, Key] = field(default_factory=dict)
    """Quantizers that share another one's grid -> the other one."""
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def quantizers(self) -> list[Key]:
        """All quantizers, each once."""
        return list(dict.fromkeys(self.edges.values()))

    def root(self, key: Key) -> Key:
        """Find the quantizer whose grid another one shares.

        Args:
            key: A quantizer.

        Returns:
            The quantizer that owns the grid.
        """
        while key in self.like:
            key = self.like[key]
        return key


@dataclass(frozen=True)
class Bits:
    """The bits of weights and activations that the user chose."""

    weight: int
    activation: int | None
    """None: only weights are quantized."""
    ends: int | None
    """Bits, at least, of weight and input in the first and the last layers; None: as in the others."""
    depthwise: int = 0
    """Bits, at least, of depthwise convolutions' weights where only weights are quantized."""
    selection: NodeSelection = EVERY_NODE
    """The nodes that may be quantized; others compute in floats (sums and pools also read floats)."""

    placement: Placement = RULES["cpu"].placement
    """Where quantizers stand besides the inputs of layers."""

    @property
    def stream(self) -> int:
        """Bits of what sums, products and pools read: as many as layers read, and STREAM_BITS at least."""
        return max(self.activation or 0, STREAM_BITS)


def make_plan(
    model: Model,
    bits: Bits,
    chosen: Mapping[str, int] | None = None,
    *,
    types: Sequence[str] = ("float32",),
) -> Plan:
    """Plan the quantization of a canonicalized model.

    Args:
        model: The model; see `graph.canonicalize`.
        bits: Bits of weights and activations.
        chosen: Bits of single layers' weights, by name of the weight; they override `bits`.
        types: Types of weights that are planned; QuantizeLinear takes float32 alone.

    Returns:
        Everything that can be quantized, and refusals of what cannot.

    Raises:
        ModelError: The graph has a cycle, or its shapes contradict each other.
    """
    topology = Topology(model)
    plan = Plan()
    linears = _linears(model, topology, plan, types)
    first, last = _ends(linears, topology) if bits.ends else (set(), set())
    for node, linear in linears:
        if rule := bits.selection.refusal(linear.label, node.op):
            plan.refusals.append(Refusal(linear.label, rule))
            continue
        own = id(node) in first | last
        weight = max(bits.ends or 0, bits.weight) if own else bits.weight
        key = None
        if bits.activation is not None:
            amount = max(bits.ends or 0, bits.activation) if own else bits.activation
            key = (linear.input_name, amount)
            plan.edges[id(node), linear.data_at] = key
        layer = QuantizedLayer(linear, weight, key, node.op in bits.placement.by_channel)
        if linear.depthwise and key is None:
            layer = replace(layer, weight_bits=max(weight, bits.depthwise))
        own_bits = (chosen or {}).get(linear.weight_name)
        plan.layers[id(node)] = layer if own_bits is None else replace(layer, weight_bits=own_bits)
    if bits.activation is not None and plan.layers:
        nodes = [node for node in topology.order if bits.selection.takes(node)]
        _streams(model, nodes, topology, plan, bits)
        if bits.activation == bits.stream and bits.placement.outputs:
            _outputs(model, nodes, plan, topology, bits)
        _moves(nodes, topology, plan, bits.stream)
    return plan


def _linears(
    model: Model, topology: Topology, plan: Plan, types: Sequence[str]
) -> list[tuple[gs.Node, Linear]]:
    ranks = {name: len(shape) for name, shape in tensor_shapes(model).items()}
    found = []
    for node in topology.order:
        if count := _layers_inside(node):
            rule = f"its bodies stay as they are, with {counted(count, 'layer')}"
            plan.refusals.append(Refusal(node_label(node), rule))
        if not is_op(node, *LINEAR_OPS) or id(node.outputs[0]) not in topology.data:
            continue
        linear = as_linear(model, node, lambda t: ranks.get(t.name))
        refusal = linear if isinstance(linear, Refusal) else _check(model, linear, types)
        if refusal is not None:
            plan.refusals.append(refusal)
        elif isinstance(linear, Linear):
            found.append((node, linear))
    return found


def _layers_inside(node: gs.Node) -> int:
    """Count the layers in the bodies of a node, which are left alone."""
    return sum(is_op(n, *LINEAR_OPS) for body in node.subgraphs(recursive=True) for n in body.nodes)


def _check(model: Model, linear: Linear, types: Sequence[str]) -> Refusal | None:
    """Check rules 1 to 3."""
    node, label = linear.node, linear.label
    if linear.weight.dtype.name not in types:
        return Refusal(label, f"its weight is {linear.weight.dtype}", "convert the model to float32")
    weight = node.inputs[linear.weight_at]
    if len(value_readers(weight)) > 1 or is_output(model, weight):
        return Refusal(label, f"the weight {weight.name!r} is shared", "--copy-shared gives it a copy")
    bias = input_at(node, BIAS_AT) if linear.takes_bias else None
    value = None if bias is None else constant_value(model, bias)
    if value is not None and node.op != "Gemm":
        value = linear.spread(value)
    if bias is not None and (value is None or not linear.is_per_channel(value)):
        return Refusal(label, "its bias is not one constant for each channel", "make it an initializer")
    if node.op == "Gemm" and (attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0):
        return Refusal(label, "it is a Gemm with transA or alpha", "export it with transA 0, alpha 1")
    return None


def _ends(linears: list[tuple[gs.Node, Linear]], topology: Topology) -> tuple[set[int], set[int]]:
    """Find the layers that no other layer feeds, and those that feed no other."""
    below: dict[int, bool] = {}
    linear = {id(node) for node, _ in linears}
    feeds: set[int] = set()
    sources: dict[int, set[int]] = {}
    for node in topology.order:
        behind: set[int] = set()
        for tensor in node_reads(node):
            behind |= sources.get(id(tensor), set()) if id(tensor) in topology.data else set()
        if id(node) in linear:
            below[id(node)] = bool(behind)
            feeds |= behind
            behind = {id(node)}
        for tensor in node.outputs:
            sources[id(tensor)] = behind
    return {n for n, fed in below.items() if not fed}, linear - feeds


def _streams(model: Model, nodes: list[gs.Node], topology: Topology, plan: Plan, bits: Bits) -> None:
    """Let sums, products and pools of data read the stream's bits."""
    for node in nodes:
        data = [t for t in node.inputs if not t.is_empty()]
        known = all(id(t) in topology.data and _is_float(model, t) for t in data)
        if not is_op(node, *bits.placement.operators) or not known:
            continue
        indices = list(range(len(node.inputs)))
        if is_op(node, "Add") and bits.placement.residual_alone:
            behind = [i for i in indices if _is_fused(model, node.inputs[i], plan)]
            indices = [i for i in indices if i != behind[-1]] if behind else []
        for index in indices:
            plan.edges[id(node), index] = (node.inputs[index].name, bits.stream)


def _is_fused(model: Model, tensor: gs.Tensor, plan: Plan) -> bool:
    """Return whether a layer gives the tensor to one node alone, which can then be fused into the layer."""
    source = producer(tensor)
    return source is not None and id(source) in plan.layers and only_consumer(model, tensor) is not None


def _outputs(model: Model, nodes: list[gs.Node], plan: Plan, topology: Topology, bits: Bits) -> None:
    """Quantize the outputs of quantized nodes for all readers: their kernels then write integers.

    Operators that have no such kernel, as HardSwish, compute in floats, and what they give stays float.
    What is not among `nodes` computes in floats; a layer's float weight ensures that, and other operators
    read floats, too: between two quantized tensors they would be fused all the same.
    """
    chosen, operators = {id(node) for node in nodes}, bits.placement.operators
    for node in nodes:
        computes = id(node) in plan.layers or is_op(node, *operators, *FUSED)
        if not computes and not moves(model, node):
            continue
        if not any((id(node), index) in plan.edges for index in range(len(node.inputs))):
            continue
        for tensor in (behind_activation(model, t) for t in node.outputs):
            readers = value_readers(tensor) if id(tensor) in topology.data else ()
            for reader in (one for one in readers if _reads_data(one, topology)):
                for index, read in enumerate(reader.inputs):
                    quantizable = read is tensor and _is_float(model, tensor)  # no mask, no index
                    floating = is_op(reader, *operators) and id(reader) not in chosen
                    if quantizable and not floating and not moves(model, reader):
                        plan.edges.setdefault((id(reader), index), (tensor.name, bits.stream))


def _reads_data(node: gs.Node, topology: Topology) -> bool:
    """Return whether a node is one of the main graph, and makes data of what it reads; bodies stay."""
    return id(node) in topology.index and any(id(t) in topology.data for t in node.outputs)


def _moves(nodes: list[gs.Node], topology: Topology, plan: Plan, bits: int) -> None:
    """Quantize the inputs of operators that move numbers, with the grid of their readers."""
    for node in reversed(nodes):
        if not moves(topology.model, node) or id(node.inputs[0]) not in topology.data:
            continue
        read = {
            plan.edges[id(reader), index]
            for tensor in node.outputs
            for reader in value_readers(tensor)
            for index, one in enumerate(reader.inputs)
            if one is tensor and (id(reader), index) in plan.edges
        }
        wide = [key for key in read if key[1] == bits]
        if wide:
            source = (node.inputs[0].name, bits)
            plan.edges[id(node), 0] = source
            plan.like.update(dict.fromkeys(wide, source))


def _is_float(model: Model, tensor: gs.Tensor) -> bool:
    """Return whether the tensor is known to hold what QuantizeLinear reads: float32."""
    return tensor_types(model).get(tensor.name) == onnx.TensorProto.FLOAT


def behind_activation(model: Model, tensor: gs.Tensor) -> gs.Tensor:
    """Follow a tensor through the Relu or Clip that alone reads it.

    Args:
        model: The model.
        tensor: The tensor.

    Returns:
        The activation's output; the tensor itself where there is no such activation.
    """
    node = only_consumer(model, tensor)
    if not is_op(node, *FUSED):
        return tensor
    bounded = all(constant_value(model, t) is not None for t in node.inputs[1:] if not t.is_empty())
    return node.outputs[0] if bounded else tensor
