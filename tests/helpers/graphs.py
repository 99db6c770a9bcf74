"""Small valid graphs for every pass, by hypothesis: layers, norms and whatever lies between them.

    graphs()    element type x operator set x IR version x how constants are stored (initializer, Constant,
                Identity, Cast, Transpose, shared with another node, listed as an input) x steps of
                `graph_layers` (groups, bias, padding, transposes; norms) and `graph_steps` (activations,
                pools, sums, concats, reshapes, bodies of If) x which tensors are outputs

Structure is drawn, and shrinks; numbers come from a seeded generator. A tensor may get any number of
readers: each step takes its source from all tensors made so far.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper, numpy_helper

T = TypeVar("T")
BATCH = 2
TYPES = {"float": np.float32, "float16": np.float16, "double": np.float64}
TOLERANCE = {"float": 2e-5, "float16": 5e-2, "double": 1e-12}
"""Largest difference of an output, relative to its largest magnitude."""
OPSETS = (7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21, 22, 24, onnx.defs.onnx_opset_version())
IR_VERSIONS = (3, 4, 7, 8, 10, 13)
WAYS = [*["initializer"] * 4, "Constant", "Identity", "Cast", "Transpose"]
DOUBLE_OPSET = 14
"""The least: onnxruntime has no double convolution, onnx's reference trains older BatchNormalizations."""


@dataclass(frozen=True)
class Tensor:
    """(batch, channels, *size), size empty: a matrix."""

    name: str
    channels: int
    size: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (BATCH, self.channels, *self.size)


class Graph:
    """A graph that is being made."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw
        kinds = ["float", "float", "float", "float16", "double"]
        self.kind: str = self.pick(kinds)
        self.dtype = np.dtype(TYPES[self.kind])
        self.opset: int = self.pick([o for o in OPSETS if self.kind != "double" or o >= DOUBLE_OPSET])
        self.ir: int = self.pick(IR_VERSIONS)
        self.rng = np.random.default_rng(draw(st.integers(0, 99)))
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.shared: dict[tuple[int, ...], list[str]] = {}
        self._number = itertools.count()
        size = self.pick([(7, 6), (6,), (), (5, 4, 3)])
        self.tensors = [Tensor("x", self.pick([4, 6, 1]), size)]
        self.with_if = False

    def pick(self, options: Sequence[T]) -> T:
        """One of the options; the first is what hypothesis shrinks to."""
        picked: T = self._draw(st.sampled_from(options))
        return picked

    def maybe(self) -> bool:
        return bool(self._draw(st.booleans()))

    def seldom(self) -> bool:
        """True once in three times."""
        return self.pick([False, False, True])

    def name(self, base: str) -> str:
        return f"{base}{next(self._number)}"

    def node(self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> str:
        """Add a node; the name of its first output, which others count on from: t7, t7_1, …"""
        first = self.name("t")
        names = [first, *(f"{first}_{at}" for at in range(1, outputs))]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return first

    def made(self, name: str, channels: int, size: tuple[int, ...]) -> None:
        self.tensors.append(Tensor(name, channels, size))

    def values(self, *shape: int, spread: float = 0.0) -> np.ndarray:
        """Normal numbers; with `spread` rows and columns have ranges of their own."""
        found = self.rng.normal(size=shape)
        for axis in range(min(len(shape), 2)):
            along = [n if a == axis else 1 for a, n in enumerate(shape)]
            found *= np.exp(spread * self.rng.normal(size=along))
        return np.asarray(found)

    def constant(self, values: Any, base: str = "k", *, plain: bool = False) -> str:
        """The name of a tensor with these values, stored in one of many ways; `plain`: an initializer."""
        array = np.asarray(values)
        array = array.astype(self.dtype) if array.dtype.kind == "f" else array
        name = self.name(base)
        way = "initializer" if plain else self.pick(WAYS)
        if way == "Constant":
            node = helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))
            self.nodes.append(node)
        elif way == "Transpose" and array.ndim > 1:
            perm = [1, 0, *range(2, array.ndim)]
            self._behind(name, array.transpose(perm), "Transpose", perm=perm)
        elif way == "Cast" and array.dtype.kind == "f":
            wide = np.float32 if self.kind == "float16" else np.float64
            self._behind(name, array.astype(wide), "Cast", to=helper.np_dtype_to_tensor_dtype(array.dtype))
        elif way == "Identity":
            self._behind(name, array, "Identity")
        else:
            self.arrays[name] = array
        return name

    def _behind(self, name: str, array: np.ndarray, op: str, **attributes: Any) -> None:
        self.arrays[f"{name}_of"] = np.ascontiguousarray(array)
        self.nodes.append(helper.make_node(op, [f"{name}_of"], [name], **attributes))

    def weight(self, *shape: int, base: str = "w") -> str:
        """A weight or bias, perhaps one that another node has already."""
        before = self.shared.setdefault(shape, [])
        if before and not self.seldom():
            return self.pick(before)
        before.append(self.constant(self.values(*shape, spread=1.0 if len(shape) > 1 else 0.0), base))
        return before[-1]

    def model(self, outputs: Sequence[Tensor]) -> onnx.ModelProto:
        """The finished model. IR 3 lists initializers as inputs, later ones may."""
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        batch: int | str = BATCH if self.maybe() else "N"
        x = self.tensors[0]
        inputs = [helper.make_tensor_value_info("x", kind, (batch, *x.shape[1:]))]
        if self.with_if:
            inputs.append(helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, ()))
        stored = [numpy_helper.from_array(array, name) for name, array in self.arrays.items()]
        if self.ir < 4 or self.seldom():
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in stored]
        made = [helper.make_tensor_value_info(t.name, kind, (batch, *t.shape[1:])) for t in outputs]
        graph = helper.make_graph(self.nodes, "drawn", inputs, made, stored)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=self.ir)


@st.composite
def graphs(draw: Callable[[st.SearchStrategy[Any]], Any]) -> onnx.ModelProto:
    """Valid models of 2 to 7 steps, one to three outputs, inputs `x` and, of those with an If, `flag`."""
    from tests.helpers.graph_layers import norm
    from tests.helpers.graph_steps import BETWEEN, LAYERS

    graph = Graph(draw)
    for _ in range(draw(st.integers(2, 8))):
        recent = graph.tensors[::-1]
        source = graph.pick(recent) if graph.seldom() else recent[0]
        steps = LAYERS if graph.maybe() else BETWEEN
        fitting = [step for step in steps if step.fits(graph, source)]
        graph.pick(fitting).add(graph, source)
        if steps is LAYERS and graph.maybe():
            norm(graph, graph.tensors[-1])
    if len(graph.tensors) == 1:  # nothing that was drawn fits
        graph.made(graph.node("Relu", ["x"]), graph.tensors[0].channels, graph.tensors[0].size)
    last, *others = graph.tensors[:0:-1]
    outputs = [last, *(t for t in others[:3] if graph.seldom())] if graph.seldom() else [last]
    return graph.model(outputs[::-1] if graph.maybe() else outputs)
