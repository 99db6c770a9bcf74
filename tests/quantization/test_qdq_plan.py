"""What is quantized with how many bits, input by input, and that the written model computes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxcompress.model import Model
from onnxcompress.quantization.affine_grid import Grid, activation_grid
from onnxcompress.quantization.qdq_plan import Bits, Plan, make_plan
from onnxcompress.quantization.qdq_writer import emit
from onnxcompress.quantization.runtimes import RULES, Runtime
from onnxcompress.runtime.inference import run as outputs
from tests.helpers.folding import graph, weight

BODY = """a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    b = Conv<group=8, pads=[1,1,1,1]>(m, d) s = Relu(b) c = Conv(s, u) t = Add(m, c) q = Relu(t)
    g = Conv(q, v) p = GlobalAveragePool(g) f = Flatten(p) y = Gemm<transB=1>(f, e)"""


def network() -> Model:
    """A depthwise convolution in a residual block, a pool in front and a matrix product at the end."""
    arrays = {"w": weight(8, 3, 3, 3), "d": weight(8, 1, 3, 3), "u": weight(8, 8, 1, 1)}
    arrays |= {"v": weight(8, 8, 1, 1, seed=1), "e": weight(4, 8)}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4] y)", BODY, arrays))


def planned(bits: Bits, **chosen: int) -> tuple[dict[str, int], dict[str, str], Plan]:
    """Bits of each layer's weight, and what each input reads with how many bits."""
    model = network()
    plan = make_plan(model, bits, chosen)
    names = {id(node): str(node.outputs[0].name) for node in model.graph.nodes}
    weights = {names[key]: layer.weight_bits for key, layer in plan.layers.items()}
    reads = {f"{names[node]}{at}": f"{name} {bits}" for (node, at), (name, bits) in plan.edges.items()}
    return weights, reads, plan


@pytest.mark.parametrize(
    ("bits", "chosen", "expected"),
    [
        (Bits(4, None, None), {}, [4, 4, 4, 4, 4]),
        (Bits(4, None, 8), {}, [8, 4, 4, 4, 8]),
        (Bits(4, 4, 8), {}, [8, 4, 4, 4, 8]),
        (Bits(8, 8, 4), {}, [8, 8, 8, 8, 8]),  # at least so many
        (Bits(4, None, None, depthwise=8), {}, [4, 8, 4, 4, 4]),
        (Bits(4, 8, None, depthwise=8), {}, [4, 4, 4, 4, 4]),  # where weights alone are quantized
        (Bits(4, None, 8), {"u": 6, "w": 2}, [2, 4, 6, 4, 8]),
    ],
)
def test_each_weight_has_its_bits(bits: Bits, chosen: dict[str, int], expected: list[int]) -> None:
    weights, reads, _ = planned(bits, **chosen)
    assert weights == dict(zip("abcgy", expected, strict=True))
    assert bool(reads) == (bits.activation is not None)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (Bits(8, 8, None), "x 8, m 8, s 8, q 8, f 8, r 8, m 8, c 8, g 8, p 8"),
        (Bits(4, 4, 8), "x 8, m 4, s 4, q 4, f 8, r 8, m 8, c 8, g 8, p 8"),
        (Bits(4, 4, None), "x 4, m 4, s 4, q 4, f 4, r 8, m 8, c 8, g 8"),
    ],
)
def test_layers_read_their_bits_and_sums_and_pools_eight(bits: Bits, expected: str) -> None:
    _, reads, plan = planned(bits)
    inputs = ["a0", "b0", "c0", "g0", "y0", "m0", "t0", "t1", "p0", "f0"]
    assert reads == dict(zip(inputs, expected.split(", "), strict=False))
    shared = {("m", 8): ("r", 8)} | ({("f", 8): ("p", 8)} if "f0" in reads else {})
    assert plan.like == shared  # what only moves numbers has one grid on both sides
    assert plan.root(("m", 8)) == ("r", 8)


def test_of_a_sum_that_is_fused_the_other_branch_alone_is_quantized() -> None:
    _, reads, _ = planned(Bits(8, 8, None, placement=RULES["tensorrt"].placement))
    assert (reads["t0"], reads.get("t1")) == ("m 8", None)


@pytest.mark.parametrize(
    ("bits", "runtime", "expected"),
    [
        (8, "cpu", {"a": "x 8", "s": "a 8", "b": "s 8"}),  # its kernel writes integers
        (4, "cpu", {"a": "x 4", "b": "s 4"}),
        (8, "tensorrt", {"a": "x 8", "b": "s 8"}),
    ],
)
def test_what_a_layer_gives_is_quantized_for_all_readers(
    bits: int, runtime: Runtime, expected: dict[str, str]
) -> None:
    arrays = {"w": weight(8, 3, 3, 3), "v": weight(4, 8, 1, 1)}
    body = "a = Conv(x, w) s = Softplus(a) b = Conv(s, v) y = Softplus(b)"
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,6,6] y)", body, arrays))
    plan = make_plan(model, Bits(bits, bits, None, placement=RULES[runtime].placement))
    names = {id(node): str(node.outputs[0].name) for node in model.graph.nodes}
    last = {"y": f"b {bits}"} if "s" in expected else {}
    assert {names[node]: f"{t} {n}" for (node, _), (t, n) in plan.edges.items()} == expected | last


def test_a_scale_for_each_channel_where_it_is_wanted_and_possible() -> None:
    arrays = {"w": weight(6, 4, 3, 3), "u": weight(6, 2, 2, 2), "t": weight(4, 3, 2, 2), "e": weight(5, 3)}
    body = """a = Conv(x, w) b = ConvTranspose<group = 2>(a, u) c = ConvTranspose(b, t)
        p = GlobalAveragePool(c) f = Flatten(p) y = Gemm<transB = 1>(f, e)"""
    model = Model.from_proto(graph("(float[N,4,8,8] x) => (float[N,5] y)", body, arrays))
    for runtime, expected in (("cpu", [True, False, True, True]), ("qnn", [True, False, True, False])):
        plan = make_plan(model, Bits(8, 8, None, placement=RULES[runtime].placement))  # type: ignore[index]
        assert [layer.per_channel(wanted=True) for layer in plan.layers.values()] == expected
        assert not any(layer.per_channel(wanted=False) for layer in plan.layers.values())


def test_rules_of_runtimes() -> None:
    """As their documentations have it: see the module's docstring for each."""
    by_channel = {name: rules.placement.by_channel for name, rules in RULES.items()}
    everywhere = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    assert by_channel == dict.fromkeys(RULES, everywhere) | {"qnn": ("Conv", "ConvTranspose")}
    tensorrt = RULES["tensorrt"]
    assert (tensorrt.symmetric, tensorrt.activation_type) == (True, "int8")
    others = [rules for name, rules in RULES.items() if name != "tensorrt"]
    assert all(not r.symmetric and r.activation_type == "uint8" and r.mixed_operands for r in others)
    assert [name for name, r in RULES.items() if not r.placement.integer_bias] == ["tensorrt"]
    assert [name for name, r in RULES.items() if not r.activations] == ["cuda"]


SCALES = np.array([0.02, 0.01, 0.04], np.float32)
BIAS = np.array([0.3, -0.7, 0.011], np.float32)
INTEGERS = np.random.default_rng(0).integers(-127, 128, (3, 2, 1, 1))


def written(
    grid: Grid, *, storage: str = "int8", zero: int = 0, bias: np.ndarray = BIAS, **options: Any
) -> Model:
    """A convolution of one pixel with these integers for weights."""
    arrays = {"w": weight(3, 2, 1, 1), "b": bias}
    model = Model.from_proto(graph("(float[N,2,4,4] x) => (float[N,3,4,4] y)", "y = Conv(x, w, b)", arrays))
    plan = make_plan(model, Bits(8, grid.bits, None))
    (node,) = plan.layers
    own = Grid(SCALES, zero, -127 + zero, 127 + zero, storage)
    ends = {plan.root(key): grid for key in plan.quantizers}
    emit(model, plan, ends, {node: (INTEGERS, own)}, {node: bias}, **options)
    return model


def expected_of(x: np.ndarray, grid: Grid, bias: np.ndarray) -> np.ndarray:
    """By the formulas: x̂ = (clip(round(x / s) + z) − z) s, and the same of weights."""
    scale = float(grid.scale)
    seen = (np.clip(np.rint(x / scale) + grid.zero_point, grid.low, grid.high) - grid.zero_point) * scale
    weights = INTEGERS[:, :, 0, 0] * SCALES[:, None].astype(np.float64)
    return np.asarray(np.einsum("oc,nchw->nohw", weights, seen) + bias[:, None, None])


@pytest.mark.parametrize(("storage", "zero"), [("int8", 0), ("uint8", 128)])
@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("integer_bias", [True, False])
def test_what_is_written_computes_the_formulas(
    storage: str, zero: int, bits: int, integer_bias: bool
) -> None:
    """Values beyond the range are clipped; an integer bias has steps of s_x s_w."""
    grid = activation_grid(-1.0, 2.0, bits)
    x = np.random.default_rng(1).uniform(-2, 3, (2, 2, 4, 4)).astype(np.float32)
    model = written(grid, storage=storage, zero=zero, integer_bias=integer_bias)
    steps = float(grid.scale) * SCALES.astype(np.float64)
    bias = np.rint(BIAS / steps) * steps if integer_bias else BIAS
    np.testing.assert_allclose(outputs(model, {"x": x})["y"], expected_of(x, grid, bias), atol=2e-5)
    biases = [t.dtype for t in model.graph.nodes[-1].inputs[2].inputs[0].inputs[:1]] if integer_bias else []
    assert biases == [np.int32] * integer_bias


def test_a_bias_that_integers_cannot_hold_stays_a_float() -> None:
    """With 16 bits the steps are so fine that 10 000 of them in a row are beyond int32."""
    grid = activation_grid(-0.001, 0.002, 16, storage="uint16")
    fits, beyond = (written(grid, bias=BIAS * factor) for factor in (1.0, 1e4))
    kinds = [model.graph.nodes[-1].inputs[2] for model in (fits, beyond)]
    assert [bool(tensor.inputs) for tensor in kinds] == [True, False]
    np.testing.assert_allclose(kinds[1].values, BIAS * 1e4, rtol=1e-6)
