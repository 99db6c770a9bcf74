"""The steps that `tests.graphs` draws from: each adds a few nodes behind a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper

from tests.graphs import BATCH, Graph, Tensor

LARGEST = 400
"""Elements of one image of a tensor."""


@dataclass(frozen=True)
class Step:
    """What can come behind a tensor."""

    add: Callable[[Graph, Tensor], None]
    fits: Callable[[Graph, Tensor], bool]


def _always(graph: Graph, source: Tensor) -> bool:
    return True


def _image(graph: Graph, source: Tensor) -> bool:
    return bool(source.size)


def _flat(graph: Graph, source: Tensor) -> bool:
    return not source.size


# Layers ---------------------------------------------------------------------------------------------------


def _windows(graph: Graph, source: Tensor, transposed: bool) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Attributes of a convolution and the image size it gives."""
    axes = len(source.size)
    kernel = [graph.pick([1, 3, 2])] * axes if graph.maybe() else [graph.pick([1, 3, 2]) for _ in range(axes)]
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


def _fit(channels: int, size: tuple[int, ...]) -> bool:
    return min(size) > 0 and channels * math.prod(size) <= LARGEST


def convolution(graph: Graph, source: Tensor) -> None:
    transposed = graph.pick([False, False, True])
    groups = graph.pick([g for g in (1, 2, 3, source.channels) if source.channels % g == 0])
    outputs = graph.pick([source.channels, source.channels, 4 * groups, groups, 2 * groups])
    attributes, size = _windows(graph, source, transposed)
    kernel = attributes["kernel_shape"]
    if not _fit(outputs, size):
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
    data, attributes = source.name, {}
    if graph.pick([False, False, True]):
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
    attributes = {"epsilon": 1e-3} if graph.maybe() else {}
    graph.made(graph.node("BatchNormalization", inputs, **attributes), n, source.size)


# Between --------------------------------------------------------------------------------------------------


UNARY = ("Relu", "LeakyRelu", "Identity", "Neg", "Abs", "Sigmoid", "Tanh", "Elu", "Softplus", "Dropout")


def unary(graph: Graph, source: Tensor) -> None:
    graph.made(graph.node(graph.pick(UNARY), [source.name]), source.channels, source.size)


def prelu(graph: Graph, source: Tensor) -> None:
    shape = graph.pick([(source.channels, *[1] * len(source.size)), (1,)])
    slope = graph.constant(np.abs(graph.values(*shape)), "p")
    graph.made(graph.node("PRelu", [source.name, slope]), source.channels, source.size)


def clip(graph: Graph, source: Tensor) -> None:
    low, high = graph.pick([(0.0, 6.0), (0.0, None), (None, 1.0), (-1.0, 1.0)])
    if graph.opset < 11:
        bounds = {k: v for k, v in (("min", low), ("max", high)) if v is not None}
        made = graph.node("Clip", [source.name], **bounds)
    else:
        inputs = ["" if v is None else graph.constant(v, "c") for v in (low, high)]
        made = graph.node("Clip", [source.name, *(inputs[:1] if high is None else inputs)])
    graph.made(made, source.channels, source.size)


def with_constant(graph: Graph, source: Tensor) -> None:
    op, n, ones = graph.pick(["Add", "Mul", "Sub", "Div"]), source.channels, [1] * len(source.size)
    shape = graph.pick([(n, *ones), (), (1, n, *ones), (1, *source.shape[1:]), (1, 1, *source.size)])
    values = np.abs(graph.values(*shape)) + 0.5 if op == "Div" else graph.values(*shape)
    inputs = [source.name, graph.constant(values)]
    turned = op != "Div" and graph.maybe()
    graph.made(graph.node(op, inputs[::-1] if turned else inputs), n, source.size)


def with_tensor(graph: Graph, source: Tensor) -> None:
    same = [t for t in graph.tensors[::-1] if t.shape == source.shape]
    op = graph.pick(["Add", "Mul", "Sub"] + (["Max", "Min"] if graph.opset >= 8 else []))
    graph.made(graph.node(op, [source.name, graph.pick(same).name]), source.channels, source.size)


def concat(graph: Graph, source: Tensor) -> None:
    other = graph.pick([t for t in graph.tensors[::-1] if t.size == source.size])
    channels = source.channels + other.channels
    if channels * math.prod(source.size) <= LARGEST:
        graph.made(graph.node("Concat", [source.name, other.name], axis=1), channels, source.size)


def pool(graph: Graph, source: Tensor) -> None:
    op, axes = graph.pick(["MaxPool", "AveragePool"]), len(source.size)
    kernel = [graph.pick([1, 2, 3]) for _ in range(axes)]
    pads = [graph.pick([0, 1]) % k for k in kernel * 2]
    attributes: dict[str, Any] = {"kernel_shape": kernel, "pads": pads}
    if op == "AveragePool":
        attributes["count_include_pad"] = graph.pick([0, 1])
    size = tuple(n + pads[a] + pads[a + axes] - kernel[a] + 1 for a, n in enumerate(source.size))
    if _fit(source.channels, size):
        graph.made(graph.node(op, [source.name], **attributes), source.channels, size)


def global_pool(graph: Graph, source: Tensor) -> None:
    op = graph.pick(["GlobalAveragePool", "GlobalMaxPool"])
    graph.made(graph.node(op, [source.name]), source.channels, tuple(1 for _ in source.size))


def pad(graph: Graph, source: Tensor) -> None:
    axes, mode = len(source.size), graph.pick(["constant", "constant", "reflect", "edge"])
    value = graph.pick([0.0, 1.0]) if mode == "constant" else 0.0
    most = min(min(source.size) - 1, 2)
    ends = [min(graph.pick([0, 1, 2]), most) for _ in range(2 * axes)]
    pads = [0, 0, *ends[:axes], 0, 0, *ends[axes:]]
    if graph.opset < 11:
        made = graph.node("Pad", [source.name], pads=pads, mode=mode, value=value)
    else:
        extra = [graph.constant(np.float64(value), "c")] if value or graph.maybe() else []
        inputs = [source.name, graph.constant(np.array(pads, np.int64), plain=True), *extra]
        made = graph.node("Pad", inputs, mode=mode)
    size = tuple(n + ends[a] + ends[a + axes] for a, n in enumerate(source.size))
    if _fit(source.channels, size):
        graph.made(made, source.channels, size)


def turned(graph: Graph, source: Tensor) -> None:
    """An activation with the channels last."""
    rank = len(source.size) + 2
    last = graph.node("Transpose", [source.name], perm=[0, *range(2, rank), 1])
    inner = graph.node(graph.pick(["Relu", "Sigmoid", "Neg"]), [last])
    back = graph.node("Transpose", [inner], perm=[0, rank - 1, *range(1, rank - 1)])
    graph.made(back, source.channels, source.size)


def shuffle(graph: Graph, source: Tensor) -> None:
    half, size = source.channels // 2, list(source.size)
    split, joined = np.array([0, 2, half, *size]), np.array([0, source.channels, *size])
    parts = graph.node("Reshape", [source.name, graph.constant(split, plain=True)])
    perm = [0, 2, 1, *range(3, 3 + len(size))]
    back = [graph.node("Transpose", [parts], perm=perm), graph.constant(joined, plain=True)]
    graph.made(graph.node("Reshape", back), source.channels, source.size)


def flatten(graph: Graph, source: Tensor) -> None:
    channels = source.channels * math.prod(source.size)
    if graph.maybe():
        made = graph.node("Flatten", [source.name])
    else:
        shape = graph.constant(np.array([graph.pick([0, BATCH]), channels]), plain=True)
        made = graph.node("Reshape", [source.name, shape])
    graph.made(made, channels, ())


def branches(graph: Graph, source: Tensor) -> None:
    """An If whose bodies capture the tensor, and perhaps hold a BatchNormalization or share a weight."""
    graph.with_if = True
    kind = helper.np_dtype_to_tensor_dtype(graph.dtype)
    bodies = {}
    for key, op in (("then_branch", "Relu"), ("else_branch", graph.pick(["Neg", "norm", "Conv"]))):
        made = graph.name("i")
        inputs = [source.name]
        if op == "norm":
            n, op = source.channels, "BatchNormalization"
            values = np.ones(n), graph.values(n), graph.values(n), np.ones(n)
            inputs += [graph.constant(v, plain=True) for v in values]
        elif op == "Conv":
            op = "Conv" if source.size else "Abs"
            inputs += [graph.weight(source.channels, source.channels, *[1] * len(source.size))] * bool(source.size)
        node = helper.make_node(op, inputs, [made])
        out = helper.make_tensor_value_info(made, kind, (None, *source.shape[1:]))
        bodies[key] = helper.make_graph([node], key, [], [out])
    graph.made(graph.node("If", ["flag"], **bodies), source.channels, source.size)


LAYERS = (
    Step(convolution, _image),
    Step(gemm, _flat),
    Step(convolution, _image),
    Step(gemm, _flat),
    Step(matmul, lambda _, t: len(t.size) < 2),
    Step(norm, _always),
)
BETWEEN = (
    Step(unary, _always),
    Step(with_constant, _always),
    Step(with_tensor, _always),
    Step(clip, lambda g, _: g.opset >= 11 or g.kind == "float"),
    Step(concat, _always),
    Step(prelu, _always),
    Step(pool, _image),
    Step(global_pool, _image),
    Step(pad, lambda g, t: bool(t.size) and min(t.size) > 1),
    Step(turned, _always),
    Step(shuffle, lambda _, t: t.channels % 2 == 0),
    Step(flatten, lambda _, t: bool(t.size) and t.channels * math.prod(t.size) <= 64),
    Step(branches, _always),
)
