"""Layers that gain no time by being quantized and cost accuracy stay floats; all others are quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onnxcompress.errors import OptionError
from onnxcompress.graph.query import is_op, producer
from onnxcompress.model import Model
from onnxcompress.passes import PassResult, run
from onnxcompress.passes.quantize import Quantize
from onnxcompress.passes.quantize.figures import QuantizeFigures
from onnxcompress.passes.quantize.unprofitable_layers import KINDS
from onnxcompress.runtime.inference import run as run_model
from onnxcompress.runtime.latency import Timing
from tests.helpers.folding import Arrays, feeds, graph, weight
from tests.helpers.results import figures_of

BODY = """a = Conv<pads=[1,1,1,1]>(x, wa, ba) r = Relu(a) b = Conv<pads=[1,1,1,1]>(r, wb, bb) s = Relu(b)
    c = Conv<pads=[1,1,1,1]>(s, wc, bc) q = Relu(c) d = Conv<pads=[1,1,1,1]>(q, wd, bd) t = Relu(d)
    p = GlobalAveragePool(t) f = Flatten(p) y = Gemm<transB=1>(f, wg)"""
LAYERS = ("a", "b", "c", "d", "y")
QUICK = Quantize(inputs="procedural", synthetic=8, effort="fast", only_faster=True, provider="cpu")
Cost = Callable[[frozenset[str]], float]


def network() -> Model:
    """Four convolutions, `b` and `c` of one kind, and a classifier."""
    arrays: Arrays = {"wa": weight(8, 3, 3, 3), "ba": weight(8, seed=1)}
    arrays |= {"wb": weight(8, 8, 3, 3, seed=2) / 8, "bb": weight(8, seed=3)}
    arrays |= {"wc": weight(8, 8, 3, 3, seed=4) / 8, "bc": weight(8, seed=5)}
    arrays |= {"wd": weight(6, 8, 3, 3, seed=6) / 8, "bd": weight(6, seed=7), "wg": weight(5, 6, seed=8)}
    return Model.from_proto(graph("(float[N,3,16,16] x) => (float[N,5] y)", BODY, arrays))


def float_layers(model: Model) -> frozenset[str]:
    """Find the layers whose weight is no DequantizeLinear's."""
    made = {node.outputs[0].name: node for node in model.graph.nodes}
    return frozenset(
        name for name in LAYERS if not is_op(producer(made[name].inputs[1]), "DequantizeLinear")
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cost], list[int]]:
    """Replace the clock by a latency that depends on which layers compute in floats."""

    def set_to(cost: Cost, noise: float = 0.0001) -> list[int]:
        counts: list[int] = []

        def benchmark(models: Mapping[str, Model], **how: Any) -> dict[str, Timing]:
            counts.append(len(models))
            rng = np.random.default_rng(0)
            found = {}
            for name, model in models.items():
                samples = cost(float_layers(model)) * (1 + noise * rng.standard_normal(30))
                values = (float(np.median(samples)),) * 5
                times = tuple(samples.tolist())
                found[name] = Timing(name, *values, 30, 1, 1.0, how["provider"].name, times)
            return found

        monkeypatch.setattr("onnxcompress.runtime.stopwatch.benchmark", benchmark)
        return counts

    return set_to


def quantized(model: Model, **options: Any) -> PassResult[QuantizeFigures | None]:
    (result,) = run([replace(QUICK, **options)], model)
    return result  # type: ignore[return-value]


def slower_by(**milliseconds: float) -> Cost:
    """Make a latency of 100 ms, and some more for each layer that computes in floats."""
    return lambda floats: 100 + sum(milliseconds.get(name, 10.0) for name in floats)


def test_a_layer_that_gains_no_time_stays_a_float_layer(clock: Callable[[Cost], list[int]]) -> None:
    clock(slower_by(d=0.0))
    before, model = network(), network()
    result = quantized(model)
    assert float_layers(model) == {"d"}
    figures = figures_of(result, QuantizeFigures)
    assert figures.float_layers is not None
    (row,) = figures.float_layers.layers
    assert (row.name, row.of_its_kind) == ("d", 1)
    assert row.low <= row.gain <= row.high
    assert abs(row.gain) < 0.001
    assert 0 < figures.float_layers.noise < figures.float_layers.noise_before
    assert {layer.name for layer in figures.layers} == {"a", "b", "c", "y"}
    assert {change.node for change in result.changes} >= {"a", "b", "c", "y"}
    assert "d" not in {change.node for change in result.changes}
    (refusal,) = [refusal for refusal in result.refusals if refusal.node == "d"]
    assert "stays a float layer" in refusal.rule
    assert "on cpu" in refusal.rule
    tensors, floats = model.graph.tensors(), before.graph.tensors()
    made = {node.outputs[0].name: node for node in model.graph.nodes}
    assert np.array_equal(made["d"].inputs[1].values, floats["wd"].values)
    assert np.array_equal(made["d"].inputs[2].values, floats["bd"].values)
    assert made["d"].inputs[0] is tensors["q"]


def test_layers_that_gain_time_are_quantized_whatever_they_cost(
    clock: Callable[[Cost], list[int]],
) -> None:
    counts, model, plain = clock(slower_by()), network(), network()
    result = quantized(model)
    assert float_layers(model) == frozenset()
    assert figures_of(result, QuantizeFigures).float_layers is None
    assert len(counts) == 1  # nothing to confirm
    quantized(plain, only_faster=False)
    feed = feeds(plain.to_proto())
    assert np.array_equal(run_model(plain, feed)["y"], run_model(model, feed)["y"])


def test_a_layer_that_even_loses_time_by_it_goes_with_those_that_gain_none(
    clock: Callable[[Cost], list[int]],
) -> None:
    clock(slower_by(a=-3.0, d=0.0))
    model = network()
    figures = figures_of(quantized(model), QuantizeFigures)
    assert float_layers(model) == {"a", "d"}
    assert figures.float_layers is not None
    assert {row.name: round(100 * row.gain) for row in figures.float_layers.layers} == {"a": -3, "d": 0}
    assert figures.float_layers.latency.ratio == pytest.approx(0.97, abs=0.001)


def test_layers_of_one_kind_go_together(clock: Callable[[Cost], list[int]]) -> None:
    clock(slower_by(b=0.0, c=0.0))
    model = network()
    figures = figures_of(quantized(model), QuantizeFigures)
    assert float_layers(model) == {"b", "c"}
    assert figures.float_layers is not None
    assert [row.of_its_kind for row in figures.float_layers.layers] == [2, 2]


def test_what_is_slower_as_a_whole_goes_back(clock: Callable[[Cost], list[int]]) -> None:
    """Each alone costs nothing, both together a conversion."""
    single = slower_by(a=-1.0, d=0.0)
    counts = clock(lambda floats: single(floats) + 8 * ({"a", "d"} <= floats))
    model = network()
    assert figures_of(quantized(model), QuantizeFigures).float_layers is not None
    assert len(float_layers(model)) == 1
    assert counts[1:] == [2, 2]


def test_where_no_layer_gains_time_the_network_stays_as_it_was(
    clock: Callable[[Cost], list[int]],
) -> None:
    clock(lambda floats: 100 - 5.0 * len(floats))
    before, model = network(), network()
    result = quantized(model)
    assert not result.modified
    assert result.measured is None
    assert {refusal.node for refusal in result.refusals} == set(LAYERS)
    feed = feeds(before.to_proto())
    assert np.array_equal(run_model(before, feed)["y"], run_model(model, feed)["y"])


def test_a_result_that_a_disturbed_clock_chose_is_not_kept(clock: Callable[[Cost], list[int]]) -> None:
    clock(slower_by(d=0.0))
    figures = figures_of(quantized(network()), QuantizeFigures)
    assert figures.float_layers is not None
    assert QUICK.is_repeatable(figures)
    latency = replace(figures.float_layers.latency, clock="processor")
    disturbed = replace(figures, float_layers=replace(figures.float_layers, latency=latency))
    assert not QUICK.is_repeatable(disturbed)


def test_where_there_are_many_kinds_those_that_cost_least_are_timed_as_one(
    clock: Callable[[Cost], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxcompress.passes.quantize.unprofitable_layers.KINDS", 2)
    counts, model = clock(lambda floats: 100 - 5.0 * len(floats)), network()
    assert not quantized(model).modified
    assert counts[0] == 3


def test_few_measurements_are_made(clock: Callable[[Cost], list[int]]) -> None:
    """One of all kinds and one to confirm, however many layers there are."""
    counts = clock(slower_by(a=0.0, d=0.0))
    quantized(network())
    assert len(counts) == 2
    assert counts[0] <= KINDS + 1


@pytest.mark.parametrize("options", [{"activation_bits": 4}, {"for_runtime": "cuda"}])
def test_it_needs_activations_that_have_kernels(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="--only-faster"):
        replace(QUICK, **options).check()
