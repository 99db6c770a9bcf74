"""The pass `drop-channels` on tiny networks: targets, repair, what is told and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from onnxcompress.cli.main import main
from onnxcompress.errors import ModelError, OptionError, RuntimeUnavailable
from onnxcompress.graph.macs import count_macs, count_parameters
from onnxcompress.model import Model, load, save
from onnxcompress.optimize.channel_drop.pipeline import ChannelDropper
from onnxcompress.optimize.channel_drop.repair import ChannelRepair
from onnxcompress.passes.drop_channels import DropChannels
from onnxcompress.runtime.block_latency import Share
from onnxcompress.runtime.clocks import Clock
from onnxcompress.runtime.inference import run as outputs
from onnxcompress.runtime.stopwatch import Stopwatch
from onnxcompress.statistics.record import ChannelStatistics, live_record, write_record
from tests.graph.test_channel_cuts import IMAGE, maker
from tests.helpers.folding import graph, weight
from tests.optimize.test_block_drop import network

pytestmark = pytest.mark.usefixtures("quick_clock")
FAST = DropChannels(
    inputs="procedural",
    synthetic=24,
    preprocess="unit",
    steps=2,
    batch=8,
    provider="cpu",
    macs_reduction=25,
)
"""No images are needed; a few steps."""


def named(**kept: int) -> DropChannels:
    chosen = tuple(f"{name}={count}" for name, count in kept.items())
    return replace(FAST, macs_reduction=None, channels_kept=chosen)


@pytest.mark.slow
def test_the_work_is_cut_to_the_target_and_no_further() -> None:
    model = network()
    before = count_macs(model)
    result = FAST.apply(model)
    macs = result.measured.macs
    assert macs is not None
    assert macs.before == before
    assert macs.after == count_macs(model)
    assert 0.25 <= 1 - macs.after / macs.before < 0.4
    assert result.measured.target_missed is None
    cut = [row for row in result.measured.groups if row.kept < row.channels]
    assert [change.node for change in result.changes] == [row.name for row in cut]
    assert all(row.error is not None and row.error >= 0 for row in cut)


@pytest.mark.slow
def test_parameters_before_are_those_of_the_file_with_its_batch_norm(models: Path) -> None:
    """As `inspect` counts them."""
    model = load(models / "resnet20-fashion.onnx")
    count = count_parameters(model)
    found = replace(FAST, steps=0, preprocess=None).apply(model).measured.parameters
    assert found is not None
    assert (found.before, found.after) == (count, count_parameters(model))


@pytest.mark.slow
def test_channels_of_the_features_and_of_each_output_are_worth_something() -> None:
    """Features do not tell what their own channels are worth, nor one output what another reads."""
    arrays = {f"w{i}": weight(8, 3 if i == 0 else 8, 3, 3, seed=i) for i in range(4)}
    arrays |= {"v": weight(5, 8, seed=9)}
    body = """a = Conv<pads=[1,1,1,1]>(x, w0) r = Relu(a) b = Conv<pads=[1,1,1,1]>(r, w1) s = Relu(b)
        p = GlobalAveragePool(s) f = Flatten(p) y = Gemm<transB=1>(f, v)
        c = Conv<pads=[1,1,1,1]>(r, w2) t = Relu(c) z = Conv<pads=[1,1,1,1]>(t, w3)"""
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,5] y, float[N,8,8,8] z)", body, arrays))
    result = named(a=6, b=4, c=4).apply(model)
    errors = {row.name: row.error for row in result.measured.groups}
    assert errors.keys() == {"a", "b", "c"}
    assert all(error is not None and error > 1e-5 for error in errors.values()), errors


@pytest.mark.slow
def test_named_groups_get_their_widths() -> None:
    model = network()
    result = named(c=3, f=5).apply(model)
    rows = {row.name: (row.channels, row.kept) for row in result.measured.groups}
    assert rows["c"] == (6, 3)
    assert rows["f"] == (6, 5)
    assert rows["a"] == (6, 6)
    weights = {t.name: t.shape for t in model.graph.tensors().values()}
    assert tuple(weights["w1"]) == (3, 6, 3, 3)
    assert tuple(weights["w2"]) == (6, 3, 3, 3)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_file() -> None:
    first, second = network(), network()
    for model in (first, second):
        FAST.apply(model)
    assert first.to_proto() == second.to_proto()


def relative_error(make: Callable[[], Model], cut: DropChannels, photos: str) -> float:
    """Of the output, on images like those that are learned from."""
    feeds = {"x": np.load(photos)["x"].astype(np.float32).transpose(0, 3, 1, 2) / 255}
    wanted, model = outputs(make(), feeds)["y"], make()
    replace(cut, inputs="images", synthetic=None, images=photos, steps=0, feature="y").apply(model)
    return float(np.square(outputs(model, feeds)["y"] - wanted).sum() / np.square(wanted).sum())


def linear() -> Model:
    """Three of the six channels with large weights are sums of the others."""
    w = weight(12, 3, 3, 3, seed=1)
    w[:6] *= 4
    w[3], w[4], w[5] = w[0] + w[1], w[1] + w[2], w[0] - w[2]
    arrays = {"w": w, "v": weight(5, 12, 1, 1, seed=3)}
    signature = "(float[N,3,8,8] x) => (float[N,5,6,6] y)"
    return Model.from_proto(graph(signature, "a = Conv(x, w) y = Conv(a, v)", arrays))


def halved() -> Model:
    """The same in half precision, as the pass fp16 writes it."""
    weights = {name: constant.values for name, constant in linear().graph.tensors().items() if name in "vw"}
    arrays = {name: value.astype(np.float16) for name, value in weights.items()}
    body = "h = Cast<to=10>(x) a = Conv(h, w) b = Conv(a, v) y = Cast<to=1>(b)"
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,5,6,6] y)", body, arrays))


@pytest.mark.slow
@pytest.mark.parametrize("make", [linear, halved])
def test_refitting_brings_the_outputs_nearer(
    make: Callable[[], Model], photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refitted = relative_error(make, named(a=9), photos)
    monkeypatch.setattr(ChannelRepair, "run", lambda self, start: (0.0, None))
    assert refitted < 0.1 * relative_error(make, named(a=9), photos)


@pytest.mark.parametrize("criterion", ["group-norm", "magnitude"])
def test_channels_by_what_they_are_worth_lose_less_than_by_norms(
    criterion: Literal["group-norm", "magnitude"], photos: str
) -> None:
    by_worth, by_norm = (
        relative_error(linear, cut, photos)
        for cut in (named(a=9), replace(named(a=9), criterion=criterion))
    )
    assert by_worth < 0.2 * by_norm


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["several outputs", "u-net", "depthwise", "shuffled", "matrix by the last axis"]
)
def test_networks_of_many_kinds_go_through(name: str) -> None:
    model = maker(name)()
    result = replace(FAST, macs_reduction=15).apply(model)
    assert result.measured.target_missed is None
    assert result.modified


@pytest.mark.slow
def test_the_record_loses_the_channels() -> None:
    model = network()
    write_record(model, {"c": ChannelStatistics(np.arange(6, dtype=np.float32), np.ones(6, np.float32))})
    named(c=4).apply(model)
    left = live_record(model)["c"].mean.tolist()
    assert len(left) == 4
    assert left == sorted(left)


@pytest.mark.slow
@pytest.mark.parametrize("clock", ["wall", "processor"])
def test_widths_are_chosen_by_what_the_clock_says(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the group `i` makes the network faster for sure: no other is cut. A busy machine is told."""

    def savings(self: Stopwatch, model: Model, variants: dict[str, Model]) -> dict[str, Share]:
        self.clock = clock
        sure, unsure = Share(0.21, 0.2, 0.22), Share(0.9, -0.01, 1.0)
        return {n: sure if n == "i=4" else unsure for n in variants}

    monkeypatch.setattr(Stopwatch, "savings", savings)
    monkeypatch.setattr(ChannelDropper, "_latency_saved", lambda self, widths: 0.3 * len(widths))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = replace(FAST, macs_reduction=None, latency_reduction=20).apply(network())
    busy = [w for w in told if "the wall clock is too noisy" in str(w.message)]
    assert len(busy) == (clock == "processor")
    assert {row.name: row.kept for row in result.measured.groups if row.kept < 6} == {"i": 4}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "give one target"),
        ({"latency_reduction": 20, "macs_reduction": 10}, "give one target"),
        ({"macs_reduction": 10, "steps": 5, "time": "5s"}, "give --steps or --time"),
        ({"macs_reduction": 10, "time": "soon"}, "expected a duration such as"),
        ({"channels_kept": ("a",)}, "expected NAME=N"),
        ({"channels_kept": ("a=0",)}, "expected NAME=N"),
        ({"channels_kept": ("a=2", "a=3")}, "stands there twice"),
        ({"channels_kept": ("conv=3",)}, "no such group"),
        ({"channels_kept": ("a=7",)}, "it has 6 channels"),
        ({"macs_reduction": 10, "inputs": "layerwise"}, "layerwise"),
        ({"macs_reduction": 10, "feature": "no"}, "it is no tensor of the network"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], text: str) -> None:
    bare = replace(FAST, macs_reduction=None)
    with pytest.raises(OptionError, match=text):
        replace(bare, **options).apply(network())  # type: ignore[arg-type]


def test_a_network_without_channels_to_cut_is_refused() -> None:
    model = Model.from_proto(graph(IMAGE, "y = Conv(x, w)", {"w": weight(3, 4, 1, 1)}))
    with pytest.raises(ModelError, match="no channels can be cut"):
        FAST.apply(model)


def test_what_cannot_be_timed_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(watch: Stopwatch, model: Model) -> None:
        raise RuntimeUnavailable(f"not on {watch.provider}")

    monkeypatch.setattr(Stopwatch, "check", refuse)
    monkeypatch.setattr(ChannelDropper, "run", lambda own: pytest.fail("it was begun"))
    with pytest.raises(RuntimeUnavailable, match="not on"):
        FAST.apply(network())


@pytest.mark.slow
def test_the_command_writes_shows_and_misses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    save(network(), source)
    common = ["--inputs", "procedural", "--synthetic", "16", "--preprocess", "unit", "--steps", "0"]
    argv = ["drop-channels", str(source), str(target), *common, "--provider", "cpu", "--force"]
    assert main([*argv, "--macs-reduction", "99"]) == 3
    text = "".join(capsys.readouterr())
    assert "work is " in text
    assert "% was asked for" in text
    assert count_macs(load(target)) < count_macs(load(source))


def test_inspect_lists_groups_and_what_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.onnx"
    save(network(), source)
    assert main(["inspect", str(source)]) == 0
    text = capsys.readouterr().out
    assert "groups of channels that can be cut" in text
    assert "y: is an output of the model" in text
