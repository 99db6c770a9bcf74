"""Write a plan into the graph as QDQ, with standard QuantizeLinear and DequantizeLinear only.

    weight   int8 initializer -> DequantizeLinear(scale, axis) -> layer
    bias     int32 initializer -> DequantizeLinear(s_x s_w) -> layer      where the layer reads integers;
             a float where that has 16 bits and the bias would overflow
    tensor   [-> Clip(low, high)] -> QuantizeLinear -> DequantizeLinear -> its readers

The Clip is added where the grid has fewer integers than its type, so that every runtime computes the same.
All readers of a quantizer share its DequantizeLinear.
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.graph.edit import set_input, unique_name
from onnxcompress.graph.linear_layer import BIAS_AT
from onnxcompress.graph.query import is_op
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.quantization.affine_grid import Grid
from onnxcompress.quantization.qdq_plan import STREAM_BITS, Key, Plan, QuantizedLayer

_TYPES = {
    "int8": np.int8, "uint8": np.uint8, "int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4,
    "int16": np.int16, "uint16": np.uint16,
}  # fmt: skip
LARGEST_BIAS = 2**31 - 1
BIAS_ROOM = 1.001
"""Room above a bias, so that rounding of scales cannot bring it beyond int32."""


class Emitter:
    """Creates the nodes and constants of a QDQ model under names that are free."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.taken = set(model.names)
        self.added: list[gs.Node] = []

    def constant(self, base: str, values: np.ndarray) -> gs.Constant:
        """Create an initializer.

        Args:
            base: Its name, if that is free.
            values: Its values.

        Returns:
            The initializer.
        """
        return gs.Constant(self.name(base), np.asarray(values))  # a product of 0-d arrays is a scalar

    def name(self, base: str) -> str:
        """Choose a free name, and reserve it.

        Args:
            base: The name to use if it is free.

        Returns:
            The name.
        """
        found = base if base not in self.taken else unique_name(self.model, base)
        while found in self.taken:
            found += "_"
        self.taken.add(found)
        return found

    def node(self, op: str, inputs: list[gs.Tensor], base: str, **attrs: int) -> gs.Tensor:
        """Add a node with one float32 output.

        Args:
            op: The operator.
            inputs: Its inputs.
            base: Name of its output, if that is free.
            **attrs: Its attributes.

        Returns:
            The output.
        """
        output = gs.Variable(self.name(base), np.float32)
        self.added.append(gs.Node(op, self.name(f"{base}_node"), attrs, inputs, [output]))
        return output


def emit(
    model: Model,
    plan: Plan,
    grids: dict[Key, Grid],
    weights: dict[int, tuple[np.ndarray, Grid]],
    biases: dict[int, np.ndarray],
    integer_bias: bool = True,
) -> None:
    """Turn the float model into the quantized one, in place.

    Args:
        model: The model.
        plan: What is quantized.
        grids: Grids of the plan's root quantizers.
        weights: Integers in the initializer's layout, and their grid, by id of the node.
        biases: Float biases of shape (outputs,), by id of the node.
        integer_bias: Whether a bias is stored as int32 where its layer reads integers.
    """
    emitter = Emitter(model)
    for layer in plan.layers.values():
        grid = None if layer.input is None else grids[plan.root(layer.input)]
        integers, own = weights[id(layer.linear.node)]
        bias, data = biases.get(id(layer.linear.node)), grid if integer_bias else None
        if bias is not None and data is not None and data.bits <= STREAM_BITS and own.scale.ndim:
            integers, own = _room_for_bias(integers, own, bias, data, channel_axis(layer))
        _weight(emitter, layer, integers, own)
        if bias is not None:
            _bias(emitter, layer, bias, own, data)
    _activations(emitter, plan, grids)
    model.graph.nodes.extend(emitter.added)
    model.touch()
    order = Topology(model).order
    model.graph.nodes[:] = order
    model.touch()


def channel_axis(layer: QuantizedLayer) -> int:
    """Find the axis of the stored weight along which the output channels lie.

    Args:
        layer: The layer.

    Returns:
        0 or 1.
    """
    node, linear = layer.linear.node, layer.linear
    if is_op(node, "Conv") or (is_op(node, "Gemm") and node.attrs.get("transB", 0)):
        return 0
    return 0 if is_op(node, "MatMul") and linear.weight_at == 0 else 1


def _weight(emitter: Emitter, layer: QuantizedLayer, integers: np.ndarray, grid: Grid) -> None:
    base, kind = layer.linear.weight_name, _TYPES[grid.storage]
    zero = np.full(grid.scale.shape, grid.zero_point).astype(kind)
    inputs = [
        emitter.constant(f"{base}_quantized", (integers + grid.zero_point).astype(np.int32).astype(kind)),
        emitter.constant(f"{base}_scale", grid.scale),
        emitter.constant(f"{base}_zero_point", zero),
    ]
    attrs = {"axis": channel_axis(layer)} if grid.scale.ndim else {}
    set_input(
        layer.linear.node,
        layer.linear.weight_at,
        emitter.node("DequantizeLinear", inputs, f"{base}_dq", **attrs),
    )


def _bias(
    emitter: Emitter, layer: QuantizedLayer, bias: np.ndarray, weight: Grid, data: Grid | None
) -> None:
    base = layer.linear.bias_name or f"{layer.linear.output_name}_bias"
    scale = None if data is None else (data.scale * weight.scale).astype(np.float32)
    if data is None or scale is None or _overflows(bias, scale):
        set_input(
            layer.linear.node, BIAS_AT, emitter.constant(f"{base}_corrected", bias.astype(np.float32))
        )
        return
    integers = np.clip(np.rint(bias.astype(np.float64) / scale), -LARGEST_BIAS, LARGEST_BIAS).astype(
        np.int32
    )
    inputs = [
        emitter.constant(f"{base}_quantized", integers),
        emitter.constant(f"{base}_scale", scale),
        emitter.constant(f"{base}_zero_point", np.zeros(scale.shape, np.int32)),
    ]
    attrs = {"axis": 0} if scale.ndim else {}
    set_input(layer.linear.node, BIAS_AT, emitter.node("DequantizeLinear", inputs, f"{base}_dq", **attrs))


def _room_for_bias(
    integers: np.ndarray, weight: Grid, bias: np.ndarray, data: Grid, axis: int
) -> tuple[np.ndarray, Grid]:
    """Coarsen the grids of channels whose bias is beyond int32: their weights are nothing beside it.

    A weight then moves by half a step at most, |b| / (2³² s), which times an input, 255 s, is less than
    |b| / 2²⁴: what float32 loses of the bias.
    """
    needed = BIAS_ROOM * np.abs(bias.astype(np.float64)) / (LARGEST_BIAS * float(data.scale))
    scale = np.maximum(weight.scale, needed).astype(np.float32)
    shape = [-1 if at == axis else 1 for at in range(integers.ndim)]
    moved = np.rint(integers * (weight.scale / scale).reshape(shape)).astype(integers.dtype)
    return moved, replace(weight, scale=scale)


def _overflows(bias: np.ndarray, scale: np.ndarray) -> bool:
    """Return whether a bias is beyond int32: with 16 bits of data its scale is 256 times as fine."""
    return bool((np.abs(bias.astype(np.float64)) > LARGEST_BIAS * scale.astype(np.float64)).any())


def _activations(emitter: Emitter, plan: Plan, grids: dict[Key, Grid]) -> None:
    nodes = {id(node): node for node in emitter.model.graph.nodes}
    tensors = emitter.model.graph.tensors()
    done: dict[Key, gs.Tensor] = {}
    shared: dict[Key, list[gs.Tensor]] = {}
    for (place, index), key in plan.edges.items():
        if key not in done:
            grid = grids[plan.root(key)]
            done[key] = _quantized(emitter, tensors[key[0]], key, grid, shared, plan.root(key))
        nodes[place].inputs[index] = done[key]


def _quantized(
    emitter: Emitter, tensor: gs.Tensor, key: Key, grid: Grid, shared: dict[Key, list[gs.Tensor]], root: Key
) -> gs.Tensor:
    """Lead the tensor through [Clip,] QuantizeLinear and DequantizeLinear."""
    base = tensor.name if key[1] == 8 else f"{tensor.name}_{key[1]}bit"
    if root not in shared:
        zero = np.asarray(grid.zero_point, _TYPES[grid.storage])
        shared[root] = [
            emitter.constant(f"{base}_scale", grid.scale),
            emitter.constant(f"{base}_zero_point", zero),
        ]
    source = tensor
    if grid.narrow:
        ends = [np.asarray(end, np.float32) for end in grid.bounds]
        low, high = (emitter.constant(f"{base}_{n}", e) for n, e in zip(("low", "high"), ends, strict=True))
        source = emitter.node("Clip", [source, low, high], f"{base}_clipped")
    quantized = emitter.node("QuantizeLinear", [source, *shared[root]], f"{base}_q")
    quantized.dtype = _TYPES[grid.storage]
    return emitter.node("DequantizeLinear", [quantized, *shared[root]], f"{base}_dq")
