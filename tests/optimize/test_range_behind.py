"""Ranges by the error behind the readers, headroom, and channels that a Mul behind a gate makes alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from onnxcompress.graph.self_gated import gated_output, is_gated
from onnxcompress.model import Model
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction.activation_range import fake, least_squares
from onnxcompress.optimize.reconstruction.quantize import Quantizer, Settings
from onnxcompress.optimize.reconstruction.range_behind import (
    SHARES,
    ends_behind,
    fit_ends,
    headroom,
    reaches_sigmoid,
)
from onnxcompress.optimize.reconstruction.range_equalization import stretch
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.quantization.affine_grid import Grid, activation_grid
from onnxcompress.quantization.qdq_plan import Bits, make_plan
from tests.helpers.folding import Arrays, graph, weight

GATES = {
    "HardSwish": "g = HardSwish(c)",
    "SiLU": "s = Sigmoid(c) g = Mul(c, s)",
    "SiLU, the gate first": "s = Sigmoid(c) g = Mul(s, c)",
}
EIGHT = Bits(8, 8, 8)
DEPTHWISE = "Conv<group=8>(g, wd, bd)"


def network(gate: str, reader: str = DEPTHWISE, spread: float = 1.0) -> Model:
    """A gate between a convolution, whose channels differ in range, and a reader."""
    scale = np.geomspace(1, spread, 8, dtype=np.float32).reshape(-1, 1, 1, 1)
    shape = (8, 1, 1, 1) if "group" in reader else (8, 8, 1, 1)
    arrays = {"wc": 5 * scale * weight(8, 3, 3, 3), "bc": weight(8, seed=5)}
    arrays |= {"wd": weight(*shape, seed=1), "bd": weight(8, seed=6)}
    body = f"c = Conv<pads=[1,1,1,1]>(x, wc, bc) {gate} d = {reader} y = Relu(d)"
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,8,8,8] y)", body, arrays))


def images() -> Tensor:
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def output(model: Model, **fed: Tensor) -> Tensor:
    with torch.no_grad():
        return Executor.from_model(model).run(fed or {"x": images()}, ["y"])["y"]


def learned(model: Model, *, generic_inputs: bool = False) -> Quantizer:
    worker = Quantizer(model, make_plan(model, EIGHT), Settings(generic_inputs=generic_inputs))
    worker.run(images())
    return worker


def of(worker: Quantizer, name: str) -> Grid:
    return worker.results.grids[name, 8]


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_a_gate_is_seen_and_what_lies_far_below_it_costs_no_steps(gate: str) -> None:
    model = network(gate)
    tensors = model.graph.tensors()
    found = gated_output(tensors["c"])
    assert found is tensors["g"]
    assert is_gated(found)
    assert not is_gated(tensors["c"])
    with torch.no_grad():
        c = Executor.from_model(model).run({"x": images()}, ["c"])["c"]
    plain = least_squares(c.reshape(-1), 8, "uint8", False)
    behind = of(learned(model), "c")
    assert plain.bounds[0] < -10 < -8 < behind.bounds[0] < -2
    whole = output(model)
    unit = whole.var((0, 2, 3), keepdim=True) + 1e-3 * whole.var()
    lost = [
        float(((output(model, c=fake(c, grid)) - whole).square() / unit).mean()) for grid in (plain, behind)
    ]
    assert lost[1] < 0.95 * lost[0]


@pytest.mark.parametrize("other", ["z = Exp(c)", "z = HardSwish(g)"])
def test_a_tensor_that_something_else_reads_has_no_gate_of_its_own(other: str) -> None:
    model = network(f"s = Sigmoid(c) g = Mul(c, s) {other}")
    found = gated_output(model.graph.tensors()["c"])
    assert (found is None) == ("(c)" in other)


def test_errors_are_measured_behind_layers_and_their_activations() -> None:
    model = network("g = HardSwish(c)")
    plan = make_plan(model, EIGHT)
    tensors = model.graph.tensors()
    assert [ends_behind(model, plan, tensors[name]) for name in ("x", "c", "g", "y")] == [
        ["g"], ["y"], ["y"], ["y"]
    ]  # fmt: skip


def test_ranges_of_images_are_what_they_are_and_headroom_grows_with_depth() -> None:
    assert (headroom(0), headroom(1)) == (1, 1.75)
    assert headroom(0.1) < headroom(0.3) < headroom(0.6)
    model = network("g = HardSwish(c)")
    own, generic = learned(model), learned(model, generic_inputs=True)
    assert of(generic, "x").bounds == pytest.approx(
        (float(images().min()), float(images().max())), rel=0.02
    )
    assert of(generic, "c").bounds[1] == pytest.approx(of(own, "c").bounds[1], rel=0.02)  # in front of all
    depth = 0.5  # behind one of two layers
    assert generic._depths["g"] == depth


def test_headroom_widens_the_upper_end_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("g = HardSwish(c)")
    wide = of(learned(model, generic_inputs=True), "g").bounds
    monkeypatch.setattr("onnxcompress.optimize.reconstruction.quantize.headroom", lambda depth: 1.0)
    plain = of(learned(model, generic_inputs=True), "g").bounds
    assert wide[1] == pytest.approx(1.5 * plain[1], rel=0.02)
    assert plain[0] <= wide[0] <= 0  # a whole number of the wider steps


@pytest.mark.parametrize("op", ["Sigmoid", "HardSigmoid"])
def test_what_lies_between_0_and_1_has_that_range(op: str) -> None:
    """Whatever the samples reach: here they stay near a half."""
    body = f"c = Conv(x, wc, bc) s = {op}(c) y = Conv(s, wd, bd)"
    arrays = {"wc": 0.1 * weight(4, 3, 1, 1), "bc": 0.1 * weight(4, seed=5)}
    arrays |= {"wd": weight(4, 4, 1, 1, seed=1), "bd": weight(4, seed=6)}
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", body, arrays))
    assert of(learned(model), "s").bounds == pytest.approx((0, 1), rel=1e-3)


def two_ends(x: Tensor) -> list[Tensor]:
    """Behind a reader: a strong channel that sees only what is small, and a weak one that sees all."""
    return [torch.cat([1000 * x.clamp(0, 1), x], 1)]


def test_errors_behind_count_by_the_variance_of_their_channel() -> None:
    """The strong channel alone would have fine steps up to 1, where the weak one loses most of it."""
    x = 10 * torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)) ** 4
    low, high = fit_ends(x, lambda a, b: activation_grid(a, b, 4), two_ends, 0.0, float(x.max()))
    assert low == 0
    assert high > 5
    strong = fit_ends(
        x, lambda a, b: activation_grid(a, b, 4), lambda v: [two_ends(v)[0][:, :1]], 0.0, float(x.max())
    )
    assert strong[1] < 1.5


def test_ends_that_lose_far_more_than_others_are_not_followed_further() -> None:
    """What clips nearly all cannot be best: shares of an end that may be are tried, each once."""
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)).abs()
    tried: list[float] = []

    def grid(a: float, b: float) -> Grid:
        tried.append(b)
        return activation_grid(a, b, 8)

    low, high = fit_ends(x, grid, lambda v: [v], 0.0, 20.0)

    def error(b: float) -> float:
        return float((x - fake(x, activation_grid(0, b, 8))).square().mean())

    least = min((20 * share for share in SHARES), key=error)
    assert (low, high) == (0, least)
    assert len(tried) == len(set(tried)) < len(SHARES)


@pytest.mark.parametrize(
    ("behind", "logits"),
    [("y = Sigmoid(d)", True), ("e = Identity(d) y = Sigmoid(e)", True), ("y = HardSwish(d)", False),
     ("s = Sigmoid(d) y = Mul(d, s)", False)],
)  # fmt: skip
def test_logits_that_made_images_leave_low_keep_room_for_a_yes(behind: str, logits: bool) -> None:
    arrays: Arrays = {"wc": 0.1 * weight(4, 3, 1, 1), "bc": np.full(4, -5, np.float32)}
    body = f"d = Conv(x, wc, bc) {behind}"
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", body, arrays))
    assert reaches_sigmoid(model.graph.tensors()["d"]) == logits
    found = learned(model, generic_inputs=True).results.grids.get(("d", 8))
    if logits:
        assert found is not None
        assert found.bounds[0] <= -5.9
        assert found.bounds[1] >= 5.9


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize(
    ("reader", "spread", "scaled"),
    [(DEPTHWISE, 200.0, 1), (DEPTHWISE, 1.0, 0), ("Conv(g, wd, bd)", 200.0, 0)],
)
def test_a_mul_makes_unlike_channels_alike_in_front_of_depthwise_layers(
    gate: str, reader: str, spread: float, scaled: int
) -> None:
    model = network(gate, reader, spread)
    before, unscaled = output(model), model.copy()
    assert stretch(model, make_plan(model, EIGHT), images(), StatisticsAlignment()) == scaled
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-3)
    multiplied = [
        node for node in model.graph.nodes if node.op == "Mul" and node.name.endswith("scaled_node")
    ]
    assert len(multiplied) == scaled
    if scaled:
        assert worst_channel(model, multiplied[0].outputs[0].name) < worst_channel(unscaled, "g") / 100


def worst_channel(model: Model, name: str) -> float:
    """Squared error of a tensor's quantizer over the variance, of the channel that loses most."""
    with torch.no_grad():
        x = Executor.from_model(model).run({"x": images()}, [name])[name]
    lost = (fake(x, of(learned(model), name)) - x).square().mean((0, 2, 3))
    return float((lost / x.var((0, 2, 3))).max())
