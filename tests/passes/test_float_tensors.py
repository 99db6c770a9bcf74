"""Where 8 bits cost an output too much, the tensors that cost most stay floats, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from onnxcompress.errors import ResultRefused
from onnxcompress.evaluation.guard import Guard
from onnxcompress.graph.query import is_op, producer, sigmoid_outputs
from onnxcompress.model import Model
from onnxcompress.passes import PassResult, run
from onnxcompress.passes.quantize import Quantize
from onnxcompress.passes.quantize.figures import QuantizeFigures
from onnxcompress.passes.quantize.float_tensors import FLOOR, Judge, Runs, _Trials, leave_floats
from onnxcompress.runtime.inference import run as run_model
from tests.helpers.folding import Arrays, feeds, graph, weight
from tests.helpers.results import figures_of

BODY = """a = Conv<pads=[1,1,1,1]>(x, wa, ba) r = Relu(a) b = Conv<pads=[1,1,1,1]>(r, wb, bb) s = Relu(b)
    c = Conv<pads=[1,1,1,1]>(s, wc, bc) q = Relu(c) p = GlobalAveragePool(q) f = Flatten(p)
    y = Gemm<transB=1>(f, wg)"""
QUICK = Quantize(inputs="procedural", synthetic=8, effort="fast", ranges="minmax")


def network(largest: float = 1.0) -> Model:
    """Three convolutions and a classifier; one channel of `s` has values so large that others get no step.

    The large channel hardly changes what the network gives: its weights behind are as small.
    """
    arrays: Arrays = {"wa": weight(8, 3, 3, 3), "ba": weight(8, seed=1)}
    arrays |= {"wb": weight(8, 8, 3, 3, seed=2) / 8, "bb": weight(8, seed=3)}
    arrays |= {"wc": weight(8, 8, 3, 3, seed=4) / 8, "bc": weight(8, seed=5), "wg": weight(5, 8, seed=6)}
    arrays["wb"][0] *= largest
    arrays["wc"][:, 0] /= largest**2
    return Model.from_proto(graph("(float[N,3,16,16] x) => (float[N,5] y)", BODY, arrays))


def quantized(model: Model, **options: bool) -> PassResult[QuantizeFigures | None]:
    (result,) = run([replace(QUICK, **options)], model)  # type: ignore[arg-type]
    return result  # type: ignore[return-value]


def test_the_tensor_that_costs_most_stays_floats_and_the_rest_is_quantized() -> None:
    model, plain = network(3000.0), network(3000.0)
    judge = Judge(network(3000.0), QUICK.request)
    found = quantized(model)
    quantized(plain, float_tensors=False)
    figures = figures_of(found, QuantizeFigures)
    assert figures.float_tensors is not None
    assert max(figures.float_tensors.items(), key=lambda item: item[1])[0] == "s"
    assert figures.float_tensors.keys().isdisjoint({"x", "r"})
    assert judge.kept_db(plain) < FLOOR < judge.kept_db(model)
    rows = {row.name: row for row in figures.layers}
    assert (rows["a"].input_bits, rows["b"].input_bits, rows["c"].input_bits) == (8, 8, 0)
    assert rows["c"].input_scale is None
    assert rows["c"].input_range is None
    (reader,) = (node for node in model.graph.nodes if node.outputs[0].name == "c")
    assert reader.inputs[0].name == "s"
    assert is_op(producer(reader.inputs[1]), "DequantizeLinear")
    assert {refusal.node for refusal in found.refusals} == figures.float_tensors.keys()
    assert all("stays floats" in refusal.rule for refusal in found.refusals)
    assert figures.output_snr_db is not None
    assert figures.output_snr_db["y"] > FLOOR


def test_where_enough_is_kept_nothing_stays_floats() -> None:
    model, plain = network(), network()
    found = quantized(model)
    quantized(plain, float_tensors=False)
    assert figures_of(found, QuantizeFigures).float_tensors is None
    assert model.to_proto().graph == plain.to_proto().graph


def test_fewer_bits_than_eight_are_kept_as_they_were_asked_for() -> None:
    model = network(3000.0)
    (found,) = run([replace(QUICK, activation_bits=4)], model)
    assert figures_of(found, QuantizeFigures).float_tensors is None


def test_the_guard_refuses_without_floats_and_writes_with_them() -> None:
    with pytest.raises(ResultRefused):
        run([replace(QUICK, float_tensors=False)], network(3000.0), guard=Guard())
    (found,) = run([QUICK], network(3000.0), guard=Guard())
    assert found.modified


def test_without_quantizers_the_network_gives_what_its_integer_weights_give() -> None:
    """With all of them taken out, only weights are quantized: the goal is then what these allow."""
    model = network(3000.0)
    quantized(model, float_tensors=False)
    judge = Judge(network(3000.0), QUICK.request)
    gone = leave_floats(model, judge, judge.kept_db(model))
    assert gone
    again = leave_floats(model, judge, judge.kept_db(model))
    assert {one.name for one in again}.isdisjoint({one.name for one in gone})
    proto = model.to_proto()
    assert all(np.isfinite(run_model(proto, feeds(proto))["y"]).ravel())


def test_a_batch_that_is_open_in_name_only_is_judged_image_by_image() -> None:
    """Its Reshape has a literal batch of 1: four images at once do not run."""
    arrays: Arrays = {"w": weight(6, 3, 3, 3), "k": np.array([1, 6]), "wg": weight(5, 6)}
    body = """a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a) q = GlobalAveragePool(r) f = Reshape(q, k)
        y = Gemm<transB=1>(f, wg)"""
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[M,5] y)", body, arrays))
    (found,) = run([QUICK], model, guard=Guard())
    assert found.modified
    assert found.guard is not None
    assert not found.guard.skipped
    assert found.guard.count == 16
    assert found.guard.fidelity is not None


def test_an_output_whose_length_depends_on_the_values_is_not_compared() -> None:
    arrays: Arrays = {"w": weight(6, 3, 3, 3), "wg": weight(5, 6)}
    body = """a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a) q = GlobalAveragePool(r) f = Flatten(q)
        y = Gemm<transB=1>(f, wg) p = Greater(y, zero) z = NonZero(p)"""
    signature = "(float[N,3,8,8] x) => (float[N,5] y, int64[2,K] z)"
    arrays["zero"] = np.zeros((), np.float32)
    model = Model.from_proto(graph(signature, body, arrays))
    (found,) = run([QUICK], model, guard=Guard())
    assert figures_of(found, QuantizeFigures).output_snr_db is not None
    assert set(figures_of(found, QuantizeFigures).output_snr_db or {}) == {"y"}


@pytest.mark.parametrize(
    ("body", "answers"),
    [
        ("y = Sigmoid(c)", True),
        ("s = Sigmoid(c) y = Concat<axis=1>(c, s)", True),
        ("s = Sigmoid(c) t = Transpose<perm=[0,2,3,1]>(s) u = Identity(t) y = Concat<axis=3>(u, u)", True),
        ("s = Sigmoid(c) y = Mul(c, s)", False),
        ("y = Relu(c)", False),
        ("y = Softmax<axis=1>(c)", False),
    ],
)
def test_outputs_that_hold_what_a_sigmoid_gives_are_found(body: str, answers: bool) -> None:
    arrays: Arrays = {"w": weight(4, 3, 1, 1)}
    model = Model.from_proto(
        graph("(float[N,3,8,8] x) => (float[N,A,B,C] y)", f"c = Conv(x, w) {body}", arrays)
    )
    assert sigmoid_outputs(model) == (frozenset({"y"}) if answers else frozenset())


@pytest.mark.parametrize(("sets", "alone"), [(1, 0), (2, 2), (2, 8)])
def test_a_network_of_many_tensors_is_tried_by_so_many_runs_at_most(
    monkeypatch: pytest.MonkeyPatch, sets: int, alone: int
) -> None:
    """The result keeps enough all the same: of tensors that were tried together, all stay floats."""
    module = "onnxcompress.passes.quantize.float_tensors"
    monkeypatch.setattr(f"{module}.SETS", sets)
    monkeypatch.setattr(f"{module}.ALONE", alone)
    monkeypatch.setattr(f"{module}.TOGETHER", 1)
    runs, outputs = list[bool](), _Trials.outputs

    def counted(trials: _Trials, active: Sequence[int], whole: bool = False) -> Runs:
        runs.append(whole)
        return outputs(trials, active, whole)

    monkeypatch.setattr(_Trials, "outputs", counted)
    model = network(3000.0)
    judge = Judge(network(3000.0), QUICK.request)
    found = quantized(model)
    assert figures_of(found, QuantizeFigures).float_tensors
    assert judge.kept_db(model) > FLOOR
    assert runs.count(False) <= 1 + sets + alone  # on few inputs; the others choose
