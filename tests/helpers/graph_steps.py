"""The steps that `tests.helpers.graphs` draws from: each adds a few nodes behind a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper

from tests.helpers.graph_layers import LARGEST, again, convolution, fits, gemm, matmul, norm
from tests.helpers.graphs import BATCH, Graph, Tensor


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
        bounds: dict[str, Any] = {k: v for k, v in (("min", low), ("max", high)) if v is not None}
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
    if fits(source.channels, size):
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
    if fits(source.channels, size):
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
    """An If whose bodies capture the tensor, and perhaps hold a BatchNormalization or share a weight.

    No Neg: its sum with the tensor would be 0 but for where onnxruntime rounds to half precision.
    """
    graph.with_if = True
    kind = helper.np_dtype_to_tensor_dtype(graph.dtype)
    bodies: dict[str, Any] = {}
    for key, op in (("then_branch", "Relu"), ("else_branch", graph.pick(["Abs", "norm", "Conv"]))):
        made = graph.name("i")
        inputs = [source.name]
        if op == "norm":
            n, op = source.channels, "BatchNormalization"
            values = np.ones(n), graph.values(n), graph.values(n), np.ones(n)
            inputs += [graph.constant(v, plain=True) for v in values]
        elif op == "Conv" and source.size:
            inputs.append(graph.weight(source.channels, source.channels, *[1] * len(source.size)))
        elif op == "Conv":
            op = "Abs"
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
    Step(again, _always),
    Step(norm, _always),
)
BETWEEN = (
    Step(unary, _always),
    Step(branches, _always),
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
