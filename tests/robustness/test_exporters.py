"""What exporters leave: functions, loops, sequences, bounds as Max and Min, operators of ai.onnx.ml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.account import Change
from onnxcompress.cli.main import main
from onnxcompress.evaluation.guard import Guard
from onnxcompress.graph.bounds import fuse_bounds
from onnxcompress.graph.canonicalize import canonicalize
from onnxcompress.graph.edit import set_values
from onnxcompress.graph.shape_inference import tensor_shapes, tensor_types
from onnxcompress.model import Model, save
from onnxcompress.passes.base import Pass, run
from onnxcompress.passes.calibrate import Calibrate
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.drop_channels import DropChannels
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.quantize import Quantize
from onnxcompress.passes.quantize.figures import QuantizeFigures
from tests.helpers.folding import feeds, graph, outputs, weight
from tests.helpers.results import figures_of

FEW: dict[str, Any] = {"effort": "fast", "synthetic": 8}
FUNCTIONS = """
    <ir_version: 8, opset_import: ["" : 18, "pkg.torch" : 1]>
    net (float[N,3,8,8] x) => (float[N,5] y) {
        a = Conv<pads=[1,1,1,1]>(x, w)  b = pkg.torch.relu(a)  c = Conv(b, v)
        g = GlobalAveragePool(c)  f = Flatten(g)
        y = pkg.torch.linear(f, z)
    }
    <domain: "pkg.torch", opset_import: ["" : 18]> relu (a) => (o) { o = Relu(a) }
    <domain: "pkg.torch", opset_import: ["" : 18]> linear (a, w) => (o) {
        t = Transpose<perm=[1,0]>(w)  o = MatMul(a, t)
    }
"""


def with_functions() -> Model:
    proto = onnx.parser.parse_model(FUNCTIONS)
    arrays = {"w": weight(8, 3, 3, 3), "v": weight(8, 8, 1, 1, seed=2), "z": weight(5, 8, seed=1)}
    for name, values in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.checker.check_model(proto)
    return Model.from_proto(proto)


@pytest.mark.parametrize(
    "pass_",
    [Quantize(**FEW), Prune(sparsity=0.2, **FEW), HalfPrecision(), Calibrate(inputs="procedural", **FEW)],
    ids=lambda p: str(p.name),
)
def test_functions_of_the_file_become_their_nodes(pass_: Pass) -> None:
    model = with_functions()
    (result,) = run([pass_], model, guard=Guard())
    assert result.changes[0] == Change(model.name, "converted from 2 functions to their nodes")
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} == {""}
    assert {entry.domain for entry in proto.opset_import} == {""}
    assert {"Relu", "Conv"} <= {node.op_type for node in proto.graph.node}


def test_a_pass_that_changes_nothing_leaves_functions_in_the_file() -> None:
    model = with_functions()
    before = model.to_proto()
    run([HalfPrecision()], half := with_functions())
    (again,) = run([HalfPrecision()], half)
    assert not again.modified
    assert Quantize(**FEW).preview(model) == []
    assert model.to_proto() == before


def test_biases_are_corrected_towards_a_reference_with_functions(tmp_path: Path) -> None:
    save(with_functions(), reference := tmp_path / "reference.onnx")
    model = with_functions()
    weights = model.graph.tensors()["v"]
    set_values(weights, weights.values + np.float32(0.3))
    (result,) = run([CorrectBias(reference=str(reference), inputs="procedural")], model)
    assert any(change.what == "bias corrected" for change in result.changes)


def test_sensitivities_of_a_file_with_functions(tmp_path: Path) -> None:
    save(with_functions(), path := tmp_path / "net.onnx")
    assert (
        main(["sensitivity", str(path), "--synthetic", "4", "--weight-bits", "8", "--no-reconstruct"]) == 0
    )


def with_loop() -> Model:
    """A recurrent cell as torch scripts one: the body reads its own inputs, and captures features."""
    body = onnx.parser.parse_graph(
        """cell (int64 i, bool c, float[N,8] s) => (bool co, float[N,8] so) {
            co = Identity(c)  e = Gather<axis=2>(t, i)  m = MatMul(s, r)  q = Add(m, e)  so = Tanh(q) }"""
    )
    arrays = {"w": weight(8, 3, 3, 3), "r": weight(8, 8, seed=1) / 4, "z": weight(5, 8, seed=2)}
    arrays |= {"eight": np.array(8), "on": np.array(True), "zero": np.full(1, 0, np.float32)}
    text = """a = Conv<pads=[1,1,1,1]>(x, w)  b = Relu(a)  t = ReduceMean<axes=[2], keepdims=0>(b)
        u = ReduceMean<axes=[2], keepdims=0>(t)  s0 = Mul(u, zero)  last = Identity(s0)
        y = Gemm<transB=1>(last, z)"""
    proto = graph("(float[N,3,8,8] x) => (float[N,5] y)", text, arrays)
    at = next(i for i, node in enumerate(proto.graph.node) if node.op_type == "Identity")
    loop = onnx.helper.make_node("Loop", ["eight", "on", "s0"], ["last"], body=body)
    proto.graph.node[at].CopyFrom(loop)
    onnx.checker.check_model(proto, full_check=True)
    return Model.from_proto(proto)


def with_sequence() -> Model:
    body = """a = Conv<pads=[1,1,1,1]>(x, w)  b = Relu(a)  q = SplitToSequence<axis=1>(b, four)
        l = SequenceAt(q, zero)  r = SequenceAt(q, one)  c = Conv<pads=[1,1,1,1]>(r, v)
        j = Concat<axis=1>(l, c)  g = GlobalAveragePool(j)  f = Flatten(g)  y = Gemm<transB=1>(f, z)"""
    arrays = {"w": weight(8, 3, 3, 3), "v": weight(4, 4, 3, 3, seed=1), "z": weight(5, 8, seed=2)}
    arrays |= {"four": np.array(4), "zero": np.array(0), "one": np.array(1)}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,5] y)", body, arrays))


@pytest.mark.filterwarnings("ignore::onnxcompress.errors.CompressWarning")
@pytest.mark.parametrize("make", [with_loop, with_sequence])
@pytest.mark.parametrize(
    "pass_", [Quantize(**FEW), Prune(sparsity=0.2, **FEW), HalfPrecision()], ids=lambda p: str(p.name)
)
def test_layers_around_loops_and_sequences_are_handled(make: Any, pass_: Pass) -> None:
    model = make()
    (result,) = run([pass_], model, guard=Guard())
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert result.modified


def test_channels_behind_an_input_of_integers_are_priced_and_cut() -> None:
    body = """f = Cast<to=1>(x)  d = Div(f, scale)  t = Transpose<perm=[0,3,1,2]>(d)
        a = Conv<pads=[1,1,1,1]>(t, w)  b = Relu(a)  c = Conv<pads=[1,1,1,1]>(b, v)  r = Relu(c)
        g = GlobalAveragePool(r)  l = Flatten(g)  y = Gemm<transB=1>(l, z)"""
    arrays = {"w": weight(8, 3, 3, 3), "v": weight(8, 8, 3, 3, seed=1), "z": weight(5, 8, seed=2)}
    arrays["scale"] = np.array(255, np.float32)
    model = Model.from_proto(graph("(uint8[N,8,8,3] x) => (float[N,5] y)", body, arrays))
    (result,) = run([DropChannels(macs_reduction=20, steps=0, synthetic=32)], model)
    assert result.modified
    tensors = model.graph.tensors()
    assert tensors["w"].shape[0] + tensors["v"].shape[0] < 16


# --- bounds ---


def bounded(body: str, arrays: dict[str, Any] | None = None, *, opset: int = 17) -> Model:
    given = {
        "w": weight(4, 3, 1, 1),
        "zero": np.float32(0),
        "six": np.full(1, 6, np.float32),
        **(arrays or {}),
    }
    used = {name: np.asarray(values) for name, values in given.items() if f"{name}" in body}
    return Model.from_proto(graph("(float[N,3,4,4] x) => (float[N,4,4,4] y)", body, used, opset=opset))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("a = Conv(x, w) y = Max(a, zero)", ["Conv", "Relu"]),
        ("a = Conv(x, w) m = Max(zero, a) y = Min(m, six)", ["Conv", "Clip"]),
        ("a = Conv(x, w) m = Min(six, a) y = Max(m, zero)", ["Conv", "Clip"]),
        ("a = Conv(x, w) m = Max(a, zero) n = Min(m, six) y = Add(n, m)", ["Conv", "Relu", "Min", "Add"]),
        ("a = Conv(x, w) y = Max(a, six)", ["Conv", "Max"]),
        ("a = Conv(x, w) m = Max(a, six) y = Min(m, zero)", ["Conv", "Max", "Min"]),
        ("a = Conv(x, w) y = Max(a, a, zero)", ["Conv", "Max"]),
        ("a = Conv(x, w) y = Max(a, many)", ["Conv", "Max"]),
    ],
)
def test_bounds_become_relu_and_clip_where_they_are_that(body: str, expected: list[str]) -> None:
    model = bounded(body, {"many": np.zeros((4, 1, 1), np.float32)})
    before = model.to_proto()
    assert bool(fuse_bounds(model)) == (expected != [node.op_type for node in before.graph.node])
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert [node.op_type for node in after.graph.node] == expected
    given = feeds(before)
    given["x"] *= 8
    for one, other in zip(outputs(before, given), outputs(after, given), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not fuse_bounds(model)


def test_a_written_out_hard_swish_with_max_and_min_is_found() -> None:
    body = "a = Conv(x, w) s = Add(a, three) m = Max(s, zero) n = Min(m, six) p = Mul(a, n) y = Div(p, six)"
    model = bounded(body, {"three": np.float32(3)})
    canonicalize(model)
    assert [node.op for node in model.graph.nodes] == ["Conv", "HardSigmoid", "Mul"]


# --- operators of other domains ---


def test_shapes_behind_a_scaler_are_known_and_its_layers_are_quantized() -> None:
    offset, scale = ", ".join(["0.5"] * 12), ", ".join(["2.0"] * 12)
    proto = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 15, "ai.onnx.ml" : 1]>
        mlp (int64[N,12] x) => (float[N,4] y) {{
            s = ai.onnx.ml.Scaler<offset=[{offset}], scale=[{scale}]>(x)
            m = MatMul(s, w)  a = Add(m, b)  r = Relu(a)  y = MatMul(r, v)
        }}""")
    arrays = {"w": weight(12, 16), "b": weight(1, 16, seed=1), "v": weight(16, 4, seed=2)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in arrays.items())
    model = Model.from_proto(proto)
    assert tensor_shapes(model)["s"] == ("N", 12)
    assert tensor_types(model)["s"] == onnx.TensorProto.FLOAT
    (result,) = run([Quantize(**FEW)], model, guard=Guard())
    assert len(figures_of(result, QuantizeFigures).layers) == 2
