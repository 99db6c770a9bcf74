"""Layers and norms that `tests.helpers.graphs` draws from."""

from __future__ import annotations

import math
from typing import Any

import onnx

from tests.helpers.graphs import BATCH, Graph, Tensor

LARGEST = 400
"""Elements of one image of a tensor."""


def _windows(graph: Graph, source: Tensor, transposed: bool) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Attributes of a convolution and the image size it gives."""
    axes = len(source.size)
    same = graph.maybe()
    kernel = [graph.pick([1, 3, 2]) for _ in range(1 if same else axes)] * (axes if same else 1)
    strides = [graph.pick([1, 1, 2]) for _ in range(axes)]
    dilations = [graph.pick([1, 1, 2]) for _ in range(axes)]
    found: dict[str, Any] = {"kernel_shape": kernel, "strides": strides}
    how = graph.pick(["", "pads", "VALID", "SAME_UPPER", "SAME_LOWER"])
    if transposed and how.startswith("SAME"):  # else its output size depends on the operator set
        found["strides"] = strides = [min(s, k) for s, k in zip(strides, kernel, strict=True)]
    pads = [0] * 2 * axes
    if how == "pads":
        pads = [graph.pick([0, 1, 2]) % k for k in kernel * 2]
        found["pads"] = pads
    elif how:
        found["auto_pad"] = how
    if how.startswith("SAME"):
        size = [s * n if transposed else -(-n // s) for n, s in zip(source.size, strides, strict=True)]
        return found, tuple(size)
    found["dilations"] = dilations
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    both = [pads[a] + pads[a + axes] for a in range(axes)]
    if not transposed:
        size = [(n + p - r) // s + 1 for n, p, r, s in zip(source.size, both, reach, strides, strict=True)]
        return found, tuple(size)
    extra = [graph.pick([0, 1]) % s for s in strides]
    if any(extra):
        found["output_padding"] = extra
    parts = zip(source.size, both, reach, strides, extra, strict=True)
    return found, tuple(s * (n - 1) + e + r - p for n, p, r, s, e in parts)


def fits(channels: int, size: tuple[int, ...]) -> bool:
    return min(size) > 0 and channels * math.prod(size) <= LARGEST


def convolution(graph: Graph, source: Tensor) -> None:
    transposed = graph.pick([False, False, True])
    groups = graph.pick([g for g in (1, 2, 3, source.channels) if source.channels % g == 0])
    outputs = graph.pick([source.channels, source.channels, 4 * groups, groups, 2 * groups])
    attributes, size = _windows(graph, source, transposed)
    kernel = attributes["kernel_shape"]
    if not fits(outputs, size):
        return
    inside = source.channels // groups
    shape = (source.channels, outputs // groups) if transposed else (outputs, inside)
    inputs = [source.name, graph.weight(*shape, *kernel)]
    if graph.maybe():
        inputs.append(graph.weight(outputs, base="b"))
    if groups > 1 or graph.maybe():
        attributes["group"] = groups
    op = "ConvTranspose" if transposed else "Conv"
    graph.made(graph.node(op, inputs, **attributes), outputs, size)


def gemm(graph: Graph, source: Tensor) -> None:
    outputs = graph.pick([4, 3, 2, 6])
    data = source.name
    attributes: dict[str, Any] = {}
    if graph.maybe():
        data, attributes["transA"] = graph.node("Transpose", [data], perm=[1, 0]), 1
    across = graph.maybe()
    weight = graph.weight(*((outputs, source.channels) if across else (source.channels, outputs)))
    if across:
        attributes["transB"] = 1
    for key in ("alpha", "beta"):
        scale = graph.pick([1.0, 0.5, -2.0, 0.0 if key == "beta" else 3.0])
        attributes |= {} if scale == 1.0 else {key: scale}
    inputs = [data, weight]
    if graph.opset < 11 or graph.maybe():
        shape = graph.pick([(outputs,), (1, outputs), (), (1,), (BATCH, 1), (BATCH, outputs)])
        inputs.append(graph.weight(*shape, base="b"))
    graph.made(graph.node("Gemm", inputs, **attributes), outputs, ())


def matmul(graph: Graph, source: Tensor) -> None:
    outputs = graph.pick([4, 3, 6])
    left = len(source.size) == 1
    shape = (outputs, source.channels) if left else (source.channels, outputs)
    weight = graph.weight(*shape)
    made = graph.node("MatMul", [weight, source.name] if left else [source.name, weight])
    if graph.maybe():
        bias = graph.weight(*((outputs, 1) if left else (outputs,)), base="b")
        made = graph.node("Add", [made, bias] if graph.maybe() else [bias, made])
    graph.made(made, outputs, source.size)


def norm(graph: Graph, source: Tensor) -> None:
    n, rng = source.channels, graph.rng
    gamma = rng.normal(size=n)
    gamma[rng.random(n) < 0.1] = 0.0
    values = gamma, rng.normal(size=n), rng.normal(size=n), rng.uniform(0.2, 2.0, n)
    inputs = [source.name, *(graph.constant(v, k) for k, v in zip("gsmv", values, strict=True))]
    attributes: dict[str, Any] = {"epsilon": 1e-3} if graph.maybe() else {}
    graph.made(graph.node("BatchNormalization", inputs, **attributes), n, source.size)


def again(graph: Graph, source: Tensor) -> None:
    """A layer that is there already, on another tensor: both share weight and bias."""
    made = {t.name: t for t in graph.tensors}
    same = [
        node
        for node in graph.nodes
        if node.op_type in ("Conv", "ConvTranspose", "Gemm")
        and {node.input[0], node.output[0]} <= made.keys()  # not behind the Transpose of a transA
        and made[node.input[0]].shape == source.shape
    ]
    if same:
        node = graph.pick(same)
        output = made[node.output[0]]
        twin = onnx.NodeProto.FromString(node.SerializeToString())
        twin.input[0], twin.output[0] = source.name, graph.name("t")
        graph.nodes.append(twin)
        graph.made(twin.output[0], output.channels, output.size)
