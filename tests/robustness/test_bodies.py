"""Nodes without a kernel of ours, recurrent layers and bodies of If: passes do what is around them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from onnxcompress.errors import CompressError, CompressWarning
from onnxcompress.evaluation.guard import Guard
from onnxcompress.model import Model
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.executor import UnsupportedOp
from onnxcompress.passes.base import Pass, PassResult, run
from onnxcompress.passes.calibrate import Calibrate
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.quantize import Quantize
from tests.helpers.folding import graph, outputs, weight

FEW: dict[str, Any] = {"effort": "fast", "synthetic": 8}


def with_if() -> Model:
    """A convolution inside a body, which captures an activation and a weight; a shape is the condition."""
    body = """
        a0 = Conv<pads=[1,1,1,1]>(x, w)  a = Relu(a0)
        s = Shape(a)  rank = Size(s)  four = Constant<value_int=4>()  c = Equal(rank, four)
        i = If(c) <
            then_branch = t () => (float[N,8,8,8] ti) { t1 = Conv<pads=[1,1,1,1]>(a, v) ti = Relu(t1) },
            else_branch = e () => (float[N,8,8,8] ei) { ei = Identity(a) }
        >
        d = Conv<pads=[1,1,1,1]>(i, u)  r = Relu(d)  p = Add(r, a)
        g = GlobalAveragePool(p)  f = Flatten(g)  y = Gemm<transB=1>(f, z)
    """
    arrays = {
        "w": weight(8, 3, 3, 3),
        "v": weight(8, 8, 3, 3, seed=1),
        "u": weight(8, 8, 3, 3, seed=2),
        "z": weight(5, 8, seed=3),
    }
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,5] y)", body, arrays))


def with_lstm() -> Model:
    body = """
        a0 = Conv<pads=[1,1,1,1]>(x, w)  a = Relu(a0)
        b0 = Conv<pads=[1,1,1,1]>(a, v)  b = Relu(b0)  m = ReduceMean<axes=[2], keepdims=0>(b)
        t = Transpose<perm=[2,0,1]>(m)
        h, hn, cn = LSTM<hidden_size=6>(t, lw, lr, lb)
        l = Squeeze(hn, zero)  y = Gemm<transB=1>(l, z)
    """
    arrays = {
        "w": weight(8, 3, 3, 3),
        "v": weight(10, 8, 3, 3, seed=1),
        "lw": weight(1, 24, 10, seed=2),
        "lr": weight(1, 24, 6, seed=3),
        "lb": weight(1, 48, seed=4),
        "zero": np.array([0]),
        "z": weight(5, 6, seed=5),
    }
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,5] y)", body, arrays))


def applied(pass_: Pass, model: Model) -> PassResult[Any]:
    """The result of a pass that the guard takes."""
    (result,) = run([pass_], model, guard=Guard())
    onnx.checker.check_model(model.to_proto(), full_check=True)
    return result


@pytest.mark.parametrize("make", [with_if, with_lstm])
def test_the_executor_has_onnxruntime_run_what_it_has_no_kernel_for(make: Any) -> None:
    model, x = make(), np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    (expected,) = outputs(model.to_proto(), {"x": x})
    net = Executor.from_model(model)
    with torch.no_grad():
        found = net.run({"x": torch.from_numpy(x)}, ["y"])["y"]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedOp, match="no gradient"):
        net.run({"x": torch.from_numpy(x).requires_grad_()}, ["y"])


def test_a_value_inside_a_node_is_that_of_a_replaced_parameter() -> None:
    model = with_lstm()
    net, x = Executor.from_model(model), torch.ones(2, 3, 8, 8)
    with torch.no_grad():
        zeros = {"lw": torch.zeros(1, 24, 10), "lr": torch.zeros(1, 24, 6), "lb": torch.zeros(1, 48)}
        found = net.run({"x": x}, ["hn"], zeros)["hn"]
    assert not found.any()


@pytest.mark.parametrize(
    "pass_", [Quantize(**FEW), Prune(sparsity=0.3, **FEW), HalfPrecision()], ids=lambda p: str(p.name)
)
def test_bodies_stay_as_they_are_and_the_rest_is_done(pass_: Pass) -> None:
    model = with_if()
    (before,) = (n.SerializeToString() for n in model.to_proto().graph.node if n.op_type == "If")
    if pass_.name == "prune":  # the first convolution's output reaches the network's through the body
        with pytest.warns(CompressWarning, match="no gradient"):
            result = applied(pass_, model)
    else:
        result = applied(pass_, model)
    (after,) = (n for n in model.to_proto().graph.node if n.op_type == "If")
    after.input[0] = "c"
    assert after.SerializeToString() == before
    assert any("bodies" in refusal.rule for refusal in result.refusals)
    changed = {change.node for change in result.changes}
    assert changed >= {"a0", "d"} if pass_.name != "prune" else result.measured.sparsity > 0.29


@pytest.mark.filterwarnings("ignore::onnxcompress.errors.CompressWarning")
@pytest.mark.parametrize(
    "pass_",
    [Quantize(**FEW), Prune(sparsity=0.3, **FEW), HalfPrecision(), Calibrate(inputs="procedural", **FEW)],
    ids=lambda p: str(p.name),
)
def test_layers_before_and_behind_a_recurrent_one_are_handled(pass_: Pass) -> None:
    assert applied(pass_, with_lstm()).modified


CAPTURED = {
    "a weight": ("", "t = Conv<pads=[1,1,1,1]>(r, w)"),
    "a padded image": ("p = Pad(r, pads)", "t = Conv(p, w)"),
    "the inside of a hard sigmoid": (
        "h = Add(r, three)  k = Clip(h, zero, six)",
        "t = Div(k, six)",
    ),
    "a weight stored as float16": ("f = Cast<to=1>(half)", "t = Conv<pads=[1,1,1,1]>(r, f)"),
    "integers of a bias": ("f = DequantizeLinear(whole, step)", "t = Conv<pads=[1,1,1,1]>(r, w, f)"),
    "a name that passes give": ("", "r_q = Neg(r)  t = Neg(r_q)"),
}
"""What the main graph computes, and what a body makes of it."""


@pytest.mark.filterwarnings("ignore::onnxcompress.errors.CompressWarning")
@pytest.mark.parametrize("case", CAPTURED)
@pytest.mark.parametrize(
    "pass_",
    [
        Quantize(**FEW, inputs="procedural", copy_shared=True),
        Prune(sparsity=0.3, reconstruct=False, copy_shared=True),
        HalfPrecision(),
        FoldBatchNorm(),
        Equalize(),
    ],
    ids=lambda p: str(p.name),
)
def test_what_a_body_reads_is_what_it_was(pass_: Pass, case: str) -> None:
    """Its nodes are not edited: what they read keeps its name, and its values but for a pass's loss."""
    before, inside = CAPTURED[case]
    body = f"""
        a = Conv<pads=[1,1,1,1]>(x, v)  r = Relu(a)  {before}
        i = If(c) <
            then_branch = g1 () => (float[N,4,8,8] t) {{ {inside} }},
            else_branch = g2 () => (float[N,4,8,8] e) {{ e = Identity(r) }}
        >
        d = Conv<pads=[1,1,1,1]>(i, w)  m = GlobalAveragePool(d)  y = Flatten(m)
    """
    arrays = {
        "v": weight(4, 3, 3, 3), "w": weight(4, 4, 3, 3, seed=1), "pads": np.array([0, 0, 1, 1] * 2),
        "three": np.float32(3), "zero": np.float32(0), "six": np.float32(6),
        "half": weight(4, 4, 3, 3, seed=2, dtype=np.float16), "whole": np.array([3, 2, 1, 4], np.int32),
        "step": np.float32(0.1), "c": np.array(True),
    }  # fmt: skip
    used = {k: a for k, a in arrays.items() if re.search(rf"\b{k}\b", body)}
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4] y)", body, used))
    x = np.random.default_rng(0).uniform(-1, 1, (3, 3, 8, 8)).astype(np.float32)
    (was,) = outputs(model.to_proto(), {"x": x})
    run([pass_], model, guard=Guard(force=True))
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    (now,) = outputs(after, {"x": x})
    assert np.abs(now - was).max() < (0.8 if pass_.name == "prune" else 0.1) * np.abs(was).max()
    (kept,) = (n for n in after.graph.node if n.op_type == "If")
    read = {name for branch in kept.attribute for node in branch.g.node for name in node.input}
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in after.graph.initializer}
    assert all(np.array_equal(stored[name], used[name]) for name in read & used.keys())


def test_an_output_that_a_body_reads_stays_float32() -> None:
    """A body reads the network's output under its name: it stays float32 there."""
    model = with_if()
    proto = model.to_proto()
    proto.graph.output.append(onnx.helper.make_tensor_value_info("a", 1, ["N", 8, 8, 8]))
    both = Model.from_proto(proto)
    applied(HalfPrecision(float16_io=True), both)
    assert {o.name: o.type.tensor_type.elem_type for o in both.to_proto().graph.output}["a"] == 1


def test_a_reader_of_the_type_alone_is_no_reason_to_quantize() -> None:
    """Only a body reads the values of `a`; a CastLike outside takes its type."""
    body = """
        a = Conv<pads=[1,1,1,1]>(x, w)  one = Constant<value_int=1>()  o = CastLike(one, a)
        s = Shape(a)  rank = Size(s)  four = Constant<value_int=4>()  c = Equal(rank, four)
        i = If(c) <
            then_branch = t () => (float[N,8,8,8] ti) { ti = Add(a, o) },
            else_branch = e () => (float[N,8,8,8] ei) { ei = Sub(a, o) }
        >
        y = Conv(i, v)
    """
    arrays = {"w": weight(8, 3, 3, 3), "v": weight(8, 8, 1, 1, seed=1)}
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,8,8,8] y)", body, arrays))
    assert applied(Quantize(**FEW), model).modified


RANDOM_BODY = """If(d) <
    then_branch = t () => (float[N,8,8,8] ti) { ti = RandomUniformLike(a) },
    else_branch = e () => (float[N,8,8,8] ei) { ei = Identity(a) }
>"""


@pytest.mark.parametrize("op", ["RandomNormalLike(a)", "Bernoulli(h)", RANDOM_BODY])
def test_random_numbers_are_refused(op: str) -> None:
    """onnxruntime draws others in each process: the same seed would give another file."""
    body = f"""a = Conv<pads=[1,1,1,1]>(x, w) h = Sigmoid(a) c = Constant<value_int=1>() d = Cast<to=9>(c)
        n = {op} b = Add(a, n) y = Conv<pads=[1,1,1,1]>(b, v)"""
    arrays = {"w": weight(8, 3, 3, 3), "v": weight(4, 8, 3, 3, seed=1)}
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", body, arrays))
    with pytest.raises(CompressError, match="it draws random numbers"):
        run([Quantize(**FEW)], model)
