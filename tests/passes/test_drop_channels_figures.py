"""What `drop-channels` measures, chooses and learns from, step by step, on tiny networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from torch import Tensor

from onnxcompress.account import BeforeAfter
from onnxcompress.graph.macs import count_parameters
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop.repair import Repair
from onnxcompress.optimize.channel_drop import pipeline
from onnxcompress.optimize.channel_drop.figures import DropChannelsFigures
from onnxcompress.optimize.channel_drop.pipeline import ChannelDropper
from onnxcompress.optimize.channel_drop.repair import ChannelRefit, ChannelRepair
from onnxcompress.optimize.channel_drop.widths import Narrowing, narrowings
from onnxcompress.optimize.channel_drop.worth import Reader, measure_readers
from onnxcompress.optimize.effort import DROP_BLOCKS
from onnxcompress.optimize.reconstruction.finetune import Finetuned
from onnxcompress.optimize.reconstruction.ridge import TARGET_MADE, TARGET_REAL
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.drop_channels import DropChannels
from onnxcompress.runtime.block_latency import LatencyChange
from onnxcompress.runtime.clocks import Clock
from onnxcompress.runtime.inference import run as outputs
from onnxcompress.runtime.stopwatch import Stopwatch
from tests.helpers.folding import graph, norm, weight
from tests.optimize.test_block_drop import network
from tests.passes.test_drop_channels import FAST, linear, named

pytestmark = pytest.mark.usefixtures("quick_clock")


def test_the_error_that_is_predicted_is_the_one_that_refitting_leaves(photos: str) -> None:
    """Of each channel of the output by its own size; as much as today, within 10 %."""
    feeds = {"x": np.load(photos)["x"].astype(np.float32).transpose(0, 3, 1, 2) / 255}
    wanted, model = outputs(linear(), feeds)["y"], linear()
    real = {"inputs": "images", "synthetic": None, "images": photos}
    figures = replace(named(a=7), steps=0, feature="y", **real).apply(model).measured  # type: ignore[arg-type]
    squares = [np.square(x).mean((0, 2, 3)) for x in (outputs(model, feeds)["y"] - wanted, wanted)]
    (row,) = figures.groups
    assert row.error == pytest.approx(float((squares[0] / squares[1]).mean()), rel=0.3)
    assert row.error == pytest.approx(1.12e-3, rel=0.1)  # measured on images kept aside
    assert figures.feature_error == pytest.approx(4.55e-4, rel=0.1)
    assert squares[0].sum() / squares[1].sum() == pytest.approx(4.92e-4, rel=0.1)
    assert (figures.parameters, figures.macs) == (BeforeAfter(384, 236), BeforeAfter(13824, 8064))
    assert figures.tuning is None


def classifier() -> Model:
    """Features t, behind tensors of two larger resolutions; groups a, b and c."""
    arrays = {"w": weight(8, 3, 3, 3), "u": weight(8, 8, 2, 2), "v": weight(8, 8, 2, 2), "e": weight(4, 8)}
    body = """a = Conv<pads = [1,1,1,1]>(x, w) r = Relu(a) b = Conv<strides = [2,2]>(r, u) s = Relu(b)
        c = Conv<strides = [2,2]>(s, v) t = Relu(c) p = GlobalAveragePool(t) f = Flatten(p)
        y = Gemm<transB = 1>(f, e)"""
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4] y)", body, arrays))


@pytest.mark.parametrize(("real", "enough"), [(True, True), (False, True), (False, False)])
def test_the_repair_gets_what_it_learns_from(
    real: bool, enough: bool, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors that are matched, real inputs as such, and the steps asked for."""
    seen: list[ChannelRepair] = []

    def run(repair: ChannelRepair, start: object) -> tuple[float, None]:
        seen.append(repair)
        return 0.25, None

    monkeypatch.setattr(ChannelRepair, "run", run)
    monkeypatch.setattr("onnxcompress.optimize.reconstruction.levels.FEWEST_POOLED", 24 if enough else 97)
    model = classifier()
    options = {"inputs": "images", "synthetic": None, "images": photos} if real else {}
    figures = replace(named(a=6, c=5), steps=7, **options).apply(model).measured  # type: ignore[arg-type]
    (repair,) = seen
    assert figures.feature_error == 0.25
    assert repair.matched.feature[0] == "t"
    assert [name for name, _ in repair.matched.levels] == ["r", "s"]
    assert [name for name, _ in repair.matched.pooled] == ["p"] * enough
    assert repair.kept["t"].mask.sum() == 5
    assert (repair.inputs.gathered.real, repair.inputs.nhwc, repair.options.steps) == (real, False, 7)
    assert len(repair.inputs.images) + len(repair.inputs.aside) == (96 if real else 24 + 32)


@pytest.mark.parametrize(("real", "ridge"), [(True, TARGET_REAL), (False, TARGET_MADE)])
def test_refitting_has_the_seed_and_the_damping_of_its_inputs(
    real: bool, ridge: float, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float, int]] = []

    def run(refit: ChannelRefit, images: Tensor, progress: object) -> dict[str, Tensor]:
        seen.append((refit.settings.seed, refit.settings.ridge, len(images)))
        return {}

    monkeypatch.setattr(ChannelRefit, "run", run)
    options = {"inputs": "images", "synthetic": None, "images": photos} if real else {}
    replace(named(a=6), steps=0, seed=4, **options).apply(classifier())  # type: ignore[arg-type]
    assert seen == [(4, ridge, 84 if real else 24)]


def test_what_is_behind_the_features_is_fitted_to_what_tuning_made_of_them(
    photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tuning doubles the features: the layer behind them takes them half, and nothing is lost."""
    feeds = {"x": np.load(photos)["x"].astype(np.float32).transpose(0, 3, 1, 2) / 255}

    def parameters(model: Model) -> list[gs.Constant]:
        return list(next(node for node in model.graph.nodes if node.outputs[0].name == "c").inputs[1:])

    def doubled(repair: Repair, student: object, start: dict[str, Tensor], *rest: object) -> Finetuned:
        values = {t.name: 2 * start[t.name] for t in parameters(repair.model)}
        return Finetuned(values, TuningOutcome(12, 7, 7, 0.1, 0.1, 7))

    def repaired(steps: int) -> tuple[float, np.ndarray]:
        model, wanted = classifier(), outputs(classifier(), feeds)["y"]
        real = {"inputs": "images", "synthetic": None, "images": photos}
        replace(named(a=6, c=5), steps=steps, **real).apply(model)  # type: ignore[arg-type]
        lost = np.square(outputs(model, feeds)["y"] - wanted).sum() / np.square(wanted).sum()
        return float(lost), parameters(model)[0].values

    monkeypatch.setattr(Repair, "_finetune", doubled)
    (untuned, before), (tuned, after) = repaired(0), repaired(7)
    assert untuned == pytest.approx(8.46e-3, rel=0.1)
    assert tuned == pytest.approx(untuned, rel=0.1)
    np.testing.assert_allclose(after, 2 * before, rtol=1e-4)


def test_without_features_nothing_is_fine_tuned() -> None:
    """Nothing through which all data flows."""
    arrays = {"w": weight(8, 3, 3, 3), "v": weight(4, 8, 1, 1), "u": weight(8, 3, 3, 3, seed=1)}
    body = "a = Conv(x, w) r = Relu(a) y = Conv(r, v) b = Conv(x, u) s = Relu(b) z = Conv(s, v)"
    signature = "(float[N,3,8,8] x) => (float[N,4,6,6] y, float[N,4,6,6] z)"
    figures = named(a=6).apply(Model.from_proto(graph(signature, body, arrays))).measured
    assert (figures.feature, figures.tuning) == ("y", None)


def test_channels_are_priced_on_all_inputs_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def measured(
        model: Model, groups: object, images: object, *names: object, **options: object
    ) -> list[Reader]:
        seen.update(options, images=len(images), answers=names[-1])  # type: ignore[arg-type]
        return measure_readers(model, groups, images, *names, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "measure_readers", measured)
    arrays = {"w": weight(8, 3, 3, 3), "v": weight(4, 8)}
    body = """a = Conv(x, w) r = Relu(a) p = GlobalAveragePool(r) f = Flatten(p) g = Gemm<transB = 1>(f, v)
        y = Softmax(g)"""
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4] y)", body, arrays))
    replace(named(a=6), synthetic=80, seed=3, steps=0).apply(model)
    assert (seen["images"], seen["seed"]) == (70, 3)  # one of eight is kept aside
    assert seen["answers"] == ["g"]  # a softmax would hide what is lost


def test_equal_groups_share_what_they_gain_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both lose four channels in one measurement: each counts for half of it."""
    gains: list[dict[str, dict[int, float]]] = []

    def chosen(costs: Mapping[str, Sequence[float]], found: dict[str, dict[int, float]]) -> list[Narrowing]:
        gains.append(found)
        return narrowings(costs, found)

    monkeypatch.setattr(pipeline, "narrowings", chosen)
    arrays = {"w": weight(8, 3, 3, 3), "e": weight(4, 8, 1, 1)}
    arrays |= {name: weight(8, 8, 1, 1, seed=at) for at, name in enumerate("uvo")}
    body = """s = Conv(x, w) a = Conv(s, u) r = Relu(a) b = Conv(r, v) q = Relu(b) c = Conv(q, o)
        y = Conv(c, e)"""
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,6,6] y)", body, arrays))
    macs = replace(FAST, steps=0, width_step=1).apply(model).measured.macs
    assert macs == BeforeAfter(15840, 11880)  # 25.0 % fewer, as few as that
    (found,) = gains
    assert all(list(widths) == [7, 6, 5, 4, 3, 2, 1] for widths in found.values())
    whole = 8 * 27 + 3 * 64 + 32
    assert found["a"][4] == found["b"][4] == pytest.approx((32 + 48 + 32) / whole / 2)
    assert found["s"][4] == pytest.approx((4 * 27 + 32) / whole)
    assert found["c"][4] == pytest.approx((32 + 16) / whole)


@pytest.mark.parametrize(
    ("latency", "words"),
    [
        ((0.85, 0.83, 0.88), "latency is 15.0 % lower, 20 % was asked for"),
        ((0.82, 0.79, 0.85), ""),  # within the interval
        ((0.79, 0.77, 0.81), ""),
        ((0.77, 0.76, 0.785), ""),  # at most 2 % more than asked for
        ((0.76, 0.75, 0.77), "latency is 24.0 % lower, 20 % was asked for"),
    ],
)
def test_a_latency_is_missed_where_its_interval_says_so(
    latency: tuple[float, float, float], words: str
) -> None:
    work: Any = SimpleNamespace(options=DropChannels(latency_reduction=20))
    change = LatencyChange(10.0, 10 * latency[0], *latency)
    assert ChannelDropper._missed(work, change, None) == words


@pytest.mark.parametrize(
    ("ratios", "target", "saved"),
    [((0.85,), 0.2, 0.15), ((0.79, 0.78), 0.2, 0.21), ((0.79, 0.81), 0.2, 0.19)],
)
def test_widths_are_chosen_by_the_middle_of_what_they_save(
    ratios: tuple[float, ...], target: float, saved: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the latency of the cut network over that of the given one, twice where it seems to be enough."""
    measured = iter(ratios)

    def compare(self: Stopwatch, before: str, after: str, seconds: float) -> LatencyChange:
        assert (before, after) == ("given", "cut to 3")
        ratio = next(measured)
        return LatencyChange(10.0, 10 * ratio, ratio, ratio - 0.07, ratio + 0.07)

    monkeypatch.setattr(Stopwatch, "compare", compare)
    work: Any = SimpleNamespace(original="given", stopwatch=Stopwatch(), _target=target)
    work._cut = lambda widths: f"cut to {widths['a']}"
    assert ChannelDropper._latency_saved(work, {"a": 3}) == pytest.approx(saved)
    assert not list(measured)


def test_work_is_missed_by_its_share_of_the_whole() -> None:
    work: Any = SimpleNamespace(options=DropChannels(macs_reduction=50))
    latency = LatencyChange(1.0, 1.0, 1.0, 1.0, 1.0)
    assert ChannelDropper._missed(work, latency, BeforeAfter(100, 50)) == ""
    missed = ChannelDropper._missed(work, latency, BeforeAfter(100, 60))
    assert missed == "work is 40.0 % lower, 50 % was asked for"


def test_latency_is_of_the_result_over_the_network_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its BatchNorm counts: what folding it saves is saved."""
    compared: list[tuple[int, int]] = []

    def compare(self: Stopwatch, before: Model, after: Model, seconds: float) -> LatencyChange:
        compared.append((len(before.graph.nodes), count_parameters(after)))
        return LatencyChange(9.0, 6.0, 2 / 3, 0.6, 0.7, batch=self.batch)

    monkeypatch.setattr(Stopwatch, "compare", compare)
    arrays = {"w": weight(8, 3, 3, 3), "e": weight(4, 8, 1, 1), **norm(8)}
    body = "a = Conv(x, w) n = BatchNormalization(a, g, b, m, v) r = Relu(n) y = Conv(r, e)"
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,6,6] y)", body, arrays))
    figures = replace(named(n=6), steps=0, latency_batch=4).apply(model).measured
    assert figures.latency == LatencyChange(9.0, 6.0, 2 / 3, 0.6, 0.7, batch=4)
    left = 6 * 27 + 6 + 4 * 6 + 4  # the layer behind has got a bias
    assert compared == [(4, left)]
    assert figures.parameters == BeforeAfter(8 * 27 + 4 * 8 + 4 * 8, left)


def test_counts_are_those_of_the_effort_where_no_option_gives_them() -> None:
    model, work = network(), DROP_BLOCKS["balanced"]
    asked = DropChannels(macs_reduction=10, effort="balanced")
    given = asked.with_counts("drop-channels", model)
    assert (given.effort, given.synthetic, given.steps) == ("balanced", work.inputs, work.steps)
    own = replace(asked, synthetic=9, steps=0).with_counts("drop-channels", model)
    assert (own.synthetic, own.steps) == (9, 0)


@pytest.mark.parametrize(
    ("options", "clock", "missed", "repeatable"),
    [
        ({"latency_reduction": 9}, "wall", None, True),
        ({"latency_reduction": 9}, "processor", None, False),
        ({"macs_reduction": 9}, "processor", None, True),
        ({"macs_reduction": 9}, "wall", "missed", False),
    ],
)
def test_a_result_of_a_disturbed_clock_is_not_kept(
    options: dict[str, Any], clock: Clock, missed: str | None, repeatable: bool
) -> None:
    latency = LatencyChange(1.0, 1.0, 1.0, 1.0, 1.0, clock=clock)
    figures = DropChannelsFigures("f", "", latency, (), target_missed=missed)
    assert DropChannels(**options).is_repeatable(figures) is repeatable


def test_what_is_suggested_leaves_more_of_the_network() -> None:
    images = "--images with a few hundred real ones"
    assert DropChannels(steps=800).hints() == ["a smaller reduction", "--steps 1600", images]
    assert DropChannels(images="x").hints() == ["a smaller reduction", "--steps 600"]


@pytest.mark.parametrize(
    ("on_gpu", "given", "wanted"),
    [
        (False, {}, (200, 32, 0.015)),
        (True, {}, (1000, 64, 0.03)),
        (True, {"device": "cpu"}, (200, 32, 0.015)),
        (False, {"batch": 8, "steps": 5}, (5, 8, 0.00375)),
        (True, {"batch": 32, "learning_rate": 0.1}, (1000, 32, 0.1)),
    ],
)
def test_defaults_of_fine_tuning_go_by_the_device_and_by_each_other(
    on_gpu: bool, given: dict[str, Any], wanted: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    monkeypatch.setattr("onnxcompress.optimize.effort.measured_rate", lambda device: 1e9)
    for asked in (DropChannels(macs_reduction=10), DropBlocks(blocks=1)):
        own = replace(asked, effort="balanced", **given).with_counts(asked.name, network())
        assert (own.steps, own.batch, own.learning_rate) == wanted
        assert f"--steps {4000 if on_gpu else 600}" in asked.hints()
