"""Which damping of the layers' targets is kept: that of the least error on inputs kept aside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from onnxcompress.model import Model
from onnxcompress.optimize.reconstruction.context import CalibrationContext
from onnxcompress.optimize.reconstruction.damping_choice import DAMPINGS, least_error_fit
from onnxcompress.optimize.reconstruction.quantize import QuantizationResults, Quantizer, Settings
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.quantization.qdq_plan import Bits, make_plan
from tests.helpers.folding import graph, weight

X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BODY = "a = Conv(x, w1, b1) r = Relu(a) c = Conv(r, w2, b2) s = Relu(c) y = Conv(s, w3, b3)"


def network() -> Model:
    arrays = {"w1": weight(8, 3, 3, 3), "b1": weight(8, seed=1), "w2": weight(8, 8, 3, 3, seed=2)}
    arrays |= {"b2": weight(8, seed=3), "w3": weight(4, 8, 1, 1, seed=4), "b3": weight(4, seed=5)}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,4,4] y)", BODY, arrays))


def fits() -> tuple[CalibrationContext, QuantizationResults]:
    model = network()
    plan = make_plan(model, Bits(4, 4, 8))
    context = CalibrationContext(model, plan, X, StatisticsAlignment(), 8)
    return context, Quantizer(model, plan, Settings(batch=8)).run(X)


@pytest.mark.parametrize(
    ("off", "tried", "kept"), [([3, 1, 2], 3, 1), ([1, 2, 0], 2, 0), ([3, 2, 1], 3, 2)]
)
def test_the_first_least_error_is_kept(off: list[int], tried: int, kept: int) -> None:
    """Biases that are off by 1, 2, 3 in one order or another; behind a worse one nothing is tried."""
    context, results = fits()
    made: list[QuantizationResults] = []

    def fit(damping: float) -> QuantizationResults:
        assert damping == DAMPINGS[len(made)]
        wrong = {key: bias + off[len(made)] for key, bias in results.biases.items()}
        made.append(replace(results, biases=wrong))
        return made[-1]

    found = least_error_fit(context, fit, X[:8])
    assert len(made) == tried
    assert found is made[kept]


def test_damping_keeps_a_layer_nearer_to_its_own_weight() -> None:
    """Without room for rounding: with 8 bits the second layer's weight shows its target."""
    model = network()
    plan = make_plan(model, Bits(8, 2, None))

    def change(damping: float) -> float:
        settings = Settings(batch=8, damping=damping)
        results = Quantizer(model, plan, settings).run(X)
        (own,) = [layer for layer in plan.layers.values() if layer.linear.weight_name == "w2"]
        fitted = results.weights[id(own.linear.node)].weight
        plain = torch.from_numpy(own.linear.weight).reshape(fitted.shape)
        return float((fitted - plain).norm() / plain.norm())

    assert change(1e6) < 0.02 < change(4.0) < change(1.0)
