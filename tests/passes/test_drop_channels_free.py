"""`drop-channels` where parts of a network cost nothing or say nothing, and on files with old records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onnxcompress.graph.macs import count_macs
from onnxcompress.model import Model
from onnxcompress.optimize.channel_drop.widths import Narrowing, choose_widths, narrowings
from onnxcompress.passes.base import run
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.drop_channels import DropChannels
from onnxcompress.runtime.inference import random_feeds
from onnxcompress.runtime.inference import run as outputs
from onnxcompress.statistics.record import ChannelStatistics, live_record, write_record
from tests.graph.test_channel_counts import CUT, TWO, model_of
from tests.graph.test_channel_cuts import IMAGE, STEM
from tests.helpers.folding import graph, weight

pytestmark = pytest.mark.usefixtures("quick_clock")
FAST = DropChannels(
    inputs="procedural", synthetic=8, preprocess="unit", steps=0, provider="cpu", macs_reduction=10
)


def kept(model: Model, options: DropChannels = FAST) -> dict[str, int]:
    return {group.name: group.kept for group in options.apply(model).measured.groups}


def same_outputs(before: Model, after: Model) -> bool:
    feeds = random_feeds(before, batch=2, seed=1)
    expected, found = outputs(before, feeds), outputs(after, feeds)
    return all(np.allclose(found[name], y, rtol=0, atol=1e-5) for name, y in expected.items())


def half_unread() -> Model:
    body = f"{STEM} q = Slice(r, from0, to8, axis) y = Conv(q, v)"
    arrays = {"w": weight(16, 4, 3, 3), "b": weight(16), "v": weight(5, 8, 1, 1)}
    arrays |= {name: np.array([n]) for name, n in (("from0", 0), ("to8", 8), ("axis", 1))}
    return Model.from_proto(graph(IMAGE, body, arrays))


def zero_weights() -> Model:
    body = f"{STEM} d = Conv(x, w2) e = Relu(d) f = Conv(r, z) g = Conv(e, v) y = Add(f, g)"
    arrays = {"w": weight(8, 4, 3, 3), "b": weight(8), "w2": weight(8, 4, 3, 3, seed=1)}
    arrays |= {"z": np.zeros((5, 8, 1, 1), np.float32), "v": weight(5, 8, 1, 1)}
    return Model.from_proto(graph(IMAGE, body, arrays))


@pytest.mark.parametrize(("make", "free"), [(half_unread, "a#2"), (zero_weights, "a")])
def test_channels_that_nothing_depends_on_go_first(make: Callable[[], Model], free: str) -> None:
    model, before = make(), make()
    widths = kept(model)
    assert widths.pop(free) == 4
    assert set(widths.values()) == {8}
    assert same_outputs(before, model)
    assert count_macs(model) <= 0.9 * count_macs(before)


def test_channels_that_a_pad_crops_go_first() -> None:
    body = f"{STEM} q = Pad(r, crop) y = Conv(q, v)"
    arrays = {"w": weight(16, 4, 3, 3), "b": weight(16), "v": weight(5, 8, 1, 1)}
    arrays |= {"crop": np.array([0, -3, 0, 0, 0, -5, 0, 0])}
    model, before = (Model.from_proto(graph(IMAGE, body, arrays)) for _ in range(2))
    kept(model)
    assert same_outputs(before, model)
    assert count_macs(model) <= 0.9 * count_macs(before)


def test_an_output_that_is_zero_says_nothing_of_the_others() -> None:
    body = f"{STEM} y = Conv(r, v) z = Conv(r, nothing)"
    arrays = {"w": weight(12, 4, 3, 3), "b": weight(12), "v": weight(5, 12, 1, 1)}
    arrays |= {"nothing": np.zeros((3, 12, 1, 1), np.float32)}
    result = FAST.apply(Model.from_proto(graph(TWO, body, arrays)))
    (group,) = result.measured.groups
    assert group.kept == 8
    assert group.error is not None
    assert 0 < group.error < 1


@pytest.mark.parametrize("channels", [5, 20])
def test_statistics_of_another_number_of_channels_are_left_out(channels: int) -> None:
    """A file that other programs changed may still hold them."""
    model = model_of(IMAGE, f"{STEM} y = Conv(r, v)")
    write_record(
        model, {"r": ChannelStatistics(np.zeros(channels, np.float32), np.ones(channels, np.float32))}
    )
    assert kept(model) == {"a": 8}
    assert "r" not in live_record(model)


def test_a_layer_is_refitted_behind_a_shape_that_the_network_no_longer_reads() -> None:
    signature, _, body = CUT["a tensor takes the shape of another"]
    named = replace(FAST, macs_reduction=None, channels_kept=("a=8",))
    assert kept(model_of(signature, body), named) == {"a": 8}


def test_the_last_step_goes_no_further_than_needed() -> None:
    """Width 8 of 12 costs nearly what width 4 does, which gains more; it is enough all the same."""
    costs = {"a": [0.0, 1, 2, 3, 6, 6, 6, 6, 6.5, 7, 8, 9], "b": [0.0, 90.0]}
    steps = narrowings(costs, {"a": {8: 0.3, 4: 0.8}, "b": {1: 0.9}})
    assert steps[0] == Narrowing("a", 4, 6.5, 0.8, (Narrowing("a", 8, 6.0, 0.3),))
    saved = {12: 0.0, 8: 0.3, 4: 0.8}
    choice = choose_widths(steps, 0.25, lambda widths: saved[widths.get("a", 12)])
    assert (choice.kept, choice.saved) == ({"a": 8}, 0.3)
    assert choose_widths(steps, 0.5, lambda widths: saved[widths.get("a", 12)]).kept == {"a": 4}


@pytest.mark.filterwarnings("error:.*a usual size:onnxcompress.errors.CompressWarning")
@pytest.mark.parametrize("one", [DropChannels(macs_reduction=15), DropBlocks(blocks=1)])
def test_the_network_before_is_timed_at_the_given_size(one: DropChannels | DropBlocks) -> None:
    body = """s = Conv<pads=[1,1,1,1]>(x, w) a = Conv<pads=[1,1,1,1]>(s, v) b = Relu(a)
        c = Conv<pads=[1,1,1,1]>(b, u) d = Add(s, c) y = Relu(d)"""
    arrays = {"w": weight(8, 3, 3, 3), "v": weight(8, 8, 3, 3) / 9, "u": weight(8, 8, 3, 3, seed=1) / 9}
    model = Model.from_proto(graph("(float[N,3,h,k] x) => (float[N,8,h,k] y)", body, arrays))
    few: dict[str, Any] = {"effort": "fast", "inputs": "procedural", "synthetic": 40, "steps": 2}
    (result,) = run([replace(one, input_shape="1x3x13x13", **few)], model)
    assert result.modified
