"""fp16: whatever form constants, outputs and foreign nodes have, the file computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.model import Model
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.fp16.candidates import HALF, element_types
from onnxcompress.passes.fp16.error_search import worst_error
from onnxcompress.passes.fp16.figures import HalfPrecisionFigures
from onnxcompress.runtime.inference import random_feeds
from onnxcompress.runtime.inference import run as outputs
from tests.helpers.results import figures_of

CONV = "c = Conv<pads = [1,1,1,1]>(x, w)"
FILES = {
    "value_float": ("float[N,4,6,6] y", f"{CONV} a = Constant<value_float = 0.0>() y = Max(c, a)"),
    "clip of value_float": (
        "float[N,4,6,6] y",
        f"{CONV} a = Constant<value_float = 0.0>() b = Constant<value_float = 6.0>() y = Clip(c, a, b)",
    ),
    "value_floats": ("float[N,4,6,6] y", f"{CONV} a = Constant<value_floats = [2.0]>() y = Mul(c, a)"),
    "value": ("float[N,4,6,6] y", f"{CONV} a = Constant<value = float[1] {{2.0}}>() y = Mul(c, a)"),
    "value_ints": ("float[N,144] y", f"{CONV} a = Constant<value_ints = [0, 144]>() y = Reshape(c, a)"),
    "value_int": ("float[N,6,6] y", f"{CONV} a = Constant<value_int = 2>() y = Gather<axis = 1>(c, a)"),
    "value_string": (
        "float[N,4,6,6] y, string[A] s",
        f'{CONV} y = Relu(c) s = Constant<value_strings = ["cat", "dog"]>()',
    ),
    "constant of a shape": (
        "float[N,4,6,6] y",
        f"{CONV} s = Shape(c) o = ConstantOfShape(s) y = Add(c, o)",
    ),
    "cast": ("float[N,4,6,6] y", f"{CONV} i = Cast<to = 7>(c) f = Cast<to = 1>(i) y = Add(c, f)"),
    "cast like": ("float[N,4,6,6] y", f"{CONV} i = Cast<to = 7>(c) f = CastLike(i, c) y = Add(c, f)"),
    "where": (
        "float[N,4,6,6] y",
        f"{CONV} z = Constant<value_float = 0.0>() p = Greater(c, z) y = Where(p, c, z)",
    ),
    "initializer as output": ("float[N,4,6,6] y, float[4,3,3,3] w", f"{CONV} y = Relu(c)"),
    "constant as output": (
        "float[N,4,6,6] y, float[1] a",
        f"{CONV} a = Constant<value_floats = [2.0]>() y = Mul(c, a)",
    ),
    "input as output": ("float[N,4,6,6] y, float[N,3,6,6] x", f"{CONV} y = Relu(c)"),
    "output that is read": ("float[N,4,6,6] c, float[N,4,6,6] y", f"{CONV} y = Relu(c)"),
    "batch second": ("float[4,N] y", f"{CONV} g = GlobalAveragePool(c) f = Flatten(g) y = Transpose(f)"),
    "scalar": ("float y", f"{CONV} y = ReduceMean<keepdims = 0>(c)"),
    "varying length": ("int64[4,M] y, float[N,4,6,6] c", f"{CONV} r = Relu(c) y = NonZero(r)"),
    "varying floats": (
        "float[M] v",
        f"{CONV} z = Constant<value_float = 0.0>() r = Reshape(c, m) p = Greater(r, z) v = Compress(r, p)",
    ),
    "classes only": ("int64[N,6,6] y", f"{CONV} y = ArgMax<axis = 1, keepdims = 0>(c)"),
    "names of dimensions": ("float[N,4,H,W] y", f"{CONV} y = Relu(c)"),
    "window": (
        "float[N,4,6,6] y",
        f"{CONV} n = Constant<value_int = 6>() h = HannWindow<output_datatype = 1>(n) y = Mul(c, h)",
    ),
    "dequantized to a type": (
        "float[N,4,6,6] y",
        f"{CONV} k = DequantizeLinear<axis = 0, output_dtype = 1>(q, s) y = Conv(c, k)",
    ),
    "foreign node": ("float[N,4,6,6] y", f"{CONV} g = com.microsoft.Gelu(c) r = Relu(g) y = Conv(r, v)"),
    "foreign node at the end": ("float[N,4,6,6] y", f"{CONV} r = Relu(c) y = com.microsoft.Gelu(r)"),
}  # fmt: skip


NEWER = {"dequantized to a type": 23}
"""Operator sets other than 17."""


def parse(which: str) -> onnx.ModelProto:
    results, body = FILES[which]
    proto: onnx.ModelProto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : {NEWER.get(which, 17)}, "com.microsoft" : 1]>
        net (float[N,3,6,6] x) => ({results}) {{ {body} }}
    """)
    rng = np.random.default_rng(0)
    known: dict[str, Any] = {"w": rng.normal(0, 0.3, (4, 3, 3, 3)), "v": rng.normal(0, 0.3, (4, 4, 1, 1))}
    read = {name for node in proto.graph.node for name in node.input}
    for name in known.keys() & read:
        tensor = onnx.numpy_helper.from_array(known[name].astype(np.float32), name)
        proto.graph.initializer.append(tensor)
    if "q" in read:
        integers = rng.integers(-128, 128, (4, 4, 1, 1)).astype(np.int8)
        scale = np.full(4, 0.01, np.float32)
        for name, values in (("q", integers), ("s", scale)):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    if "m" in read:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "m"))
    return proto


@pytest.mark.parametrize("float16_io", [False, True], ids=["", "float16-io"])
@pytest.mark.parametrize("which", FILES)
def test_each_form_of_file(which: str, float16_io: bool) -> None:
    proto = parse(which)
    model = Model.from_proto(proto)
    result = HalfPrecision(provider="cpu", threads=1, float16_io=float16_io).apply(model)
    made = model.to_proto()
    onnx.checker.check_model(made)
    assert result.measured is not None
    assert result.measured.runtime is not None or "varying floats" in which
    for old, new in zip(proto.graph.output, made.graph.output, strict=True):
        assert new.name == old.name
        assert new.type.tensor_type.shape == old.type.tensor_type.shape
        assert float16_io or new.type == old.type
    if float16_io or which in ("value_string", "varying floats"):
        return
    feeds = random_feeds(model, batch=4)
    exact, found = ([v for v in outputs(p, feeds).values() if v.dtype == np.float32] for p in (proto, made))
    assert worst_error([exact], [found]) < 5e-3


def test_layers_beside_a_foreign_node_are_converted() -> None:
    proto = parse("foreign node at the end")
    model = Model.from_proto(proto)
    HalfPrecision(provider="cpu", threads=1).apply(model)
    types = element_types(model.to_proto())
    assert (types["c"], types["r"]) == (HALF, HALF)
    (refusal,) = HalfPrecision(provider="cpu").apply(Model.from_proto(proto)).refusals
    assert "com.microsoft" in refusal.rule


def test_what_decides_integers_is_measured() -> None:
    """No output is float32: the scores under the ArgMax are what float16 may move."""
    model = Model.from_proto(parse("classes only"))
    result = HalfPrecision(provider="cpu", threads=1).apply(model)
    assert 0 < figures_of(result, HalfPrecisionFigures).error < 0.01


def test_outputs_of_another_length_are_no_small_error() -> None:
    exact, found = [[np.zeros(3)]], [[np.zeros(4)]]
    assert worst_error(exact, found) == float("inf")
    assert worst_error([[np.ones(3)], [np.arange(2.0)]], [[np.ones(3)], [np.arange(2.0)]]) == 0


@pytest.mark.parametrize(("perm", "stays"), [((1, 0, 2), True), ((1, 2, 0), True), ((0, 2, 1), False)])
def test_transposes_that_onnxruntime_would_join_to_a_product_over_batches_stay_float32(
    perm: tuple[int, ...], stays: bool
) -> None:
    """The joint node ends the process on the CPU: heads of recurrent layers and of attention have it."""
    body = f"t = Transpose<perm={list(perm)}>(x)  c = Cast<to=1>(t)  y = MatMul(c, w)"
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[6,6,6] x) => (float[6,6,4] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    values = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    model = Model.from_proto(proto)
    HalfPrecision().apply(model)
    types = element_types(model.to_proto())
    assert (types["t"] != HALF) == stays
