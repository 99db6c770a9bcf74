"""Factors that bring channels to equal ranges, against the formulas, on inputs of known largest values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from onnxcompress.graph.query import read
from onnxcompress.model import Model
from onnxcompress.optimize.reconstruction.range_equalization import SHARED, stretch
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.quantization.qdq_plan import Bits, make_plan
from onnxcompress.statistics.record import ChannelStatistics, read_record, write_record
from tests.helpers.folding import graph, weight

LARGEST = np.array([0.5, 1.0, 2.0, 3.0, 4.0, 5.0])
"""What each channel reaches on the images."""


def network(activation: str) -> Model:
    """Each channel of the first layer is one of the input's; a dense layer reads them."""
    arrays = {"wa": np.eye(6, dtype=np.float32)[..., None, None], "ba": np.zeros(6, np.float32)}
    arrays |= {"wb": weight(4, 6, 1, 1, seed=1), "bb": weight(4, seed=2)}
    if activation.startswith("Clip"):
        arrays |= {"low": np.float32(0).reshape(()), "high": np.float32(6).reshape(())}
    body = f"a = Conv(x, wa, ba) r = {activation} y = Conv(r, wb, bb)"
    return Model.from_proto(graph("(float[N,6,4,4] x) => (float[N,4,4,4] y)", body, arrays))


def images() -> Tensor:
    """From -1 to the largest value of each channel, which only one image reaches."""
    x = torch.rand(8, 6, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.9 - 0.2
    x[5, :, 2, 1] = 1.0
    return x * torch.from_numpy(LARGEST).float().reshape(6, 1, 1)


def factors(
    activation: str, *, power: float = 1.0, record: dict[str, ChannelStatistics] | None = None
) -> np.ndarray:
    """By which rows grew; columns shrink by as much, and the record grows with them."""
    model = network(activation)
    write_record(model, record or {})
    model.touch()
    own = read(model.graph.tensors()["wb"]).copy()
    plan = make_plan(model, Bits(8, 8, 8))
    assert stretch(model, plan, images(), StatisticsAlignment(), batch=3, power=power) == 1
    tensors = model.graph.tensors()
    rows = read(tensors["wa"])[range(6), range(6), 0, 0].astype(np.float64)
    np.testing.assert_allclose(read(tensors["wb"])[..., 0, 0] * rows, own[..., 0, 0], rtol=1e-5)
    for name, known in read_record(model).items():
        before = (record or {})[name]
        np.testing.assert_allclose(known.mean, before.mean * rows, rtol=1e-5)
        np.testing.assert_allclose(known.std, before.std * rows, rtol=1e-5)
    assert read_record(model).keys() == (record or {}).keys()
    return rows


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_every_channel_reaches_as_far_as_the_farthest(power: float) -> None:
    """With half the power, half of that on a logarithmic scale."""
    np.testing.assert_allclose(factors("Relu(a)", power=power), (5 / LARGEST) ** power, rtol=1e-5)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_in_front_of_a_clip_channels_reach_its_end_with_a_margin_of_a_half(power: float) -> None:
    reach = np.minimum(1.5 * LARGEST, 6)
    np.testing.assert_allclose(factors("Clip(a, low, high)", power=power), (6 / reach) ** power, rtol=1e-5)


def test_a_channel_may_reach_four_recorded_deviations_where_ranges_are_equalized_by_half() -> None:
    """The first one, which these images hardly move; the others are recorded to vary less."""
    known = ChannelStatistics(np.full(6, -0.1, np.float32), np.array([0.5, *[0.1] * 5], np.float32))
    reach = 1.5 * LARGEST
    reach[0] = 0.1 + 4 * 0.5
    found = factors("Relu(a)", power=0.5, record={"a": known})
    np.testing.assert_allclose(found, (7.5 / reach) ** 0.5, rtol=1e-5)
    whole = factors("Relu(a)", power=1.0, record={"a": known})
    np.testing.assert_allclose(whole, 5 / LARGEST, rtol=1e-5)


def test_a_channel_that_is_next_to_dead_stays_as_it_is() -> None:
    """It would need a factor of more than 64."""
    model = network("Relu(a)")
    x = images()
    x[:, 0] *= 1 / 10
    assert stretch(model, make_plan(model, Bits(8, 8, 8)), x, StatisticsAlignment()) == 1
    rows = read(model.graph.tensors()["wa"])[range(6), range(6), 0, 0]
    np.testing.assert_allclose(rows, [1, *(5 / LARGEST[1:])], rtol=1e-5)


def test_below_a_gate_counts_twice() -> None:
    """HardSwish gives down to -0.375: a channel that reaches hardly above 0 is taken to reach 0.75."""
    arrays = {"wa": np.eye(3, dtype=np.float32)[..., None, None], "ba": np.zeros(3, np.float32)}
    arrays |= {"wb": weight(3, 1, 1, 1, seed=1), "bb": weight(3, seed=2)}
    body = "a = Conv(x, wa, ba) g = HardSwish(a) d = Conv<group=3>(g, wb, bb) y = Relu(d)"
    model = Model.from_proto(graph("(float[N,3,4,4] x) => (float[N,3,4,4] y)", body, arrays))
    x = torch.zeros(2, 3, 4, 4)
    x[0, :, 0, 0] = -1.5  # where HardSwish is least
    x[1, 0, 0, 0], x[1, 1, 0, 0], x[1, 2, 0, 0] = 0.1, 6.0, 20.0
    assert stretch(model, make_plan(model, Bits(8, 8, 8)), x, StatisticsAlignment()) == 1
    (mul,) = [node for node in model.graph.nodes if node.op == "Mul"]
    np.testing.assert_allclose(read(mul.inputs[1]).reshape(-1), [20 / 0.75, 20 / 6, 1], rtol=1e-5)


@pytest.mark.parametrize(
    ("reader", "fan", "power"),
    [("Conv<group=6>", 1, 1.0), ("Conv", 6, SHARED)],
    ids=["depthwise", "dense"],
)
def test_with_few_bits_rare_large_values_do_not_count(reader: str, fan: int, power: float) -> None:
    """Channels of one shape and of unlike size; where a reader adds them up, factors are between."""
    x = torch.randn(1500, 6, 8, 8, generator=torch.Generator().manual_seed(3)).relu()
    x *= torch.from_numpy(LARGEST).float().reshape(6, 1, 1)
    x[5, :, 3, 3] = 5.0
    arrays = {"wa": np.eye(6, dtype=np.float32)[..., None, None], "ba": np.zeros(6, np.float32)}
    arrays |= {"wb": weight(6, fan, 1, 1, seed=1), "bb": weight(6, seed=2)}
    body = f"a = Conv(x, wa, ba) r = Relu(a) y = {reader}(r, wb, bb)"
    model = Model.from_proto(graph("(float[N,6,8,8] x) => (float[N,6,8,8] y)", body, arrays))
    plan = make_plan(model, Bits(4, 4, None))
    assert stretch(model, plan, x, StatisticsAlignment(), few_bits=4) == 1
    found = read(model.graph.tensors()["wa"])[range(6), range(6), 0, 0]
    np.testing.assert_allclose(found, (5 / LARGEST) ** power, rtol=0.15)
