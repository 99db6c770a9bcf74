"""The record of statistics: what survives other tools and our passes, what is ignored, what is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxsim
import onnxslim
import pytest
import torch

import onnxcompress.statistics.record as record_module
from onnxcompress.cli.main import main
from onnxcompress.model import Model, load, save
from onnxcompress.optimize.statistics_estimation import estimate_statistics, measurable
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.statistics.record import (
    KEY,
    ChannelStatistics,
    known_statistics,
    live_record,
    read_record,
    write_record,
)
from tests.helpers.folding import CONV, IMAGE, graph, norm, weight

Tool = Callable[[onnx.ModelProto], onnx.ModelProto]
TOOLS: dict[str, Tool] = {"onnxslim": onnxslim.slim, "onnxsim": lambda proto: onnxsim.simplify(proto)[0]}
NETWORKS = ("resnet20-fashion", "mobilenetv2-fashion")


def measured(model: Model, names: list[str] | None = None) -> dict[str, ChannelStatistics]:
    """Statistics on noise: whatever a tensor is called, these are what its values are."""
    x = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return estimate_statistics(model, x, names, source="estimated: noise")


def with_record(network: Path, *, fold: bool) -> Model:
    model = load(network)
    if fold:
        FoldBatchNorm().apply(model)
    write_record(model, measured(model))
    return model


def assert_true(model: Model) -> None:
    """Every live entry is what its tensor is now."""
    record = live_record(model)
    for name, now in measured(model, list(record)).items():
        limit = 1e-4 * float(now.std.max())
        np.testing.assert_allclose(record[name].mean, now.mean, rtol=0, atol=limit)
        np.testing.assert_allclose(record[name].std, now.std, rtol=0, atol=limit)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_folded_file_keeps_its_record_through_simplifiers(models: Path, network: str, tool: str) -> None:
    model = with_record(models / f"{network}.onnx", fold=True)
    after = Model.from_proto(TOOLS[tool](model.to_proto()))
    assert live_record(after).keys() == read_record(model).keys()
    assert_true(after)


@pytest.mark.parametrize("tool", TOOLS)
def test_when_a_simplifier_folds_entries_go_or_stay_true(models: Path, tool: str) -> None:
    """onnxslim calls the result as the BatchNorm's output, onnxsim as the convolution's: fold first."""
    model = with_record(models / "resnet20-fashion.onnx", fold=False)
    after = Model.from_proto(TOOLS[tool](model.to_proto()))
    assert not any(node.op == "BatchNormalization" for node in after.graph.nodes)
    assert read_record(after).keys() == read_record(model).keys()
    expected = {"onnxslim": 23, "onnxsim": 2}[tool]
    assert len(live_record(after)) == len(known_statistics(after)) == expected
    assert_true(after)
    measurable_now, _ = measurable(after)
    assert len(measurable_now) == 23  # what is lost can be estimated


@pytest.mark.slow
def test_dropping_a_block_forgets_its_tensors_and_keeps_the_rest(
    models: Path, tmp_path: Path, quick_clock: None
) -> None:
    model = load(models / "resnet20-fashion.onnx")
    FoldBatchNorm().apply(model)
    before = read_record(model)
    DropBlocks(drop=("blocks.1",), inputs="procedural", synthetic=4, steps=0).apply(model)
    save(model, tmp_path / "dropped.onnx")
    after = read_record(load(tmp_path / "dropped.onnx"))
    gone = before.keys() - after.keys()
    assert {name.split("/")[2] for name in gone} == {"blocks.1"}
    assert len(gone) == 2
    for name, found in after.items():
        np.testing.assert_array_equal(found.mean, before[name].mean)
        np.testing.assert_array_equal(found.std, before[name].std)


def test_entries_that_name_nothing_or_do_not_fit_are_ignored() -> None:
    model = Model.from_proto(graph("(float[N,4,7,6] x) => (float[N,5,5,4] y)", "y = Conv(x, w)", CONV))
    right, wrong = (ChannelStatistics(np.zeros(n, "f4"), np.ones(n, "f4")) for n in (5, 3))
    write_record(model, {"y": right, "x": wrong, "gone": right})
    assert set(known_statistics(model)) == {"y"}
    assert set(read_record(model)) == {"y", "x", "gone"}


def test_entries_do_not_fit_where_the_file_declares_no_shapes_either() -> None:
    model = Model.from_proto(graph(IMAGE, "c = Conv(x, w) y = Relu(c)", CONV))
    right, wrong, none = (ChannelStatistics(np.zeros(n, "f4"), np.ones(n, "f4")) for n in (5, 3, 0))
    write_record(model, {"c": wrong, "y": right})
    assert set(live_record(model)) == {"y"}
    write_record(model, {"c": none, "y": right})
    assert set(read_record(model)) == {"y"}


def test_what_something_else_broke_is_left_out() -> None:
    model = Model.from_proto(graph(IMAGE, "y = Conv(x, w)", CONV))
    write_record(model, {"y": ChannelStatistics(np.zeros(5, "f4"), np.ones(5, "f4"))})
    entries = json.loads(model.metadata[KEY])
    nan = ChannelStatistics(np.full(4, np.nan, "f4"), np.ones(4, "f4"))
    write_record(model, {"x": nan})
    entries |= json.loads(model.metadata[KEY]) | {
        "a": 3,
        "b": {"mean": "?"},
        "c": entries["y"] | {"std": ""},
        "d": entries["y"] | {"source": 5},
    }
    model.set_metadata(KEY, json.dumps(entries))
    assert set(read_record(model)) == {"y"}
    model.set_metadata(KEY, "[1, 2]")
    assert read_record(model) == {}


def test_a_batch_norm_knows_better_than_the_record_unless_it_was_overwritten() -> None:
    model = Model.from_proto(graph(IMAGE, "y = BatchNormalization(x, g, b, m, v)", norm(4)))
    other = ChannelStatistics(np.full(4, 7.0, "f4"), np.ones(4, "f4"))
    write_record(model, {"y": other})
    np.testing.assert_array_equal(known_statistics(model)["y"].mean, norm(4)["b"])
    write_record(model, {"y": ChannelStatistics(other.mean, other.std, "estimated: images 5, seed 0")})
    np.testing.assert_array_equal(known_statistics(model)["y"].mean, other.mean)


def test_the_deviation_of_a_channel_that_hardly_varies_is_not_gamma() -> None:
    """gamma 2, variance 1e-5 and epsilon 1e-5: the output's deviation is 2 sqrt(1/2)."""
    arrays = norm(4) | {"g": np.full(4, 2, "f4"), "v": np.array([1, 1e-5, 1e-12, 0], "f4")}
    model = Model.from_proto(graph(IMAGE, "y = BatchNormalization(x, g, b, m, v)", arrays))
    found = known_statistics(model)["y"]
    np.testing.assert_allclose(found.std, [2, 2**0.5, 2 * 1e-7**0.5, 0], rtol=1e-4)
    assert found.dead == [2, 3]


def test_folding_forgets_estimates_of_what_it_scales() -> None:
    body = "c = MatMul(x, w) y = BatchNormalization(c, g, b, m, v)"
    model = Model.from_proto(
        graph("(float[N,4] x) => (float[N,5] y)", body, {"w": weight(4, 5), **norm(5)})
    )
    estimate = ChannelStatistics(np.ones(5, "f4"), np.ones(5, "f4"), "estimated: images 5, seed 0")
    write_record(model, {"c": estimate})
    FoldBatchNorm().apply(model)
    assert {n.op for n in model.graph.nodes} == {"MatMul", "Add"}  # c is still there, times the scale
    assert set(read_record(model)) == {"y"}


def test_folding_forward_knows_better_than_an_estimate() -> None:
    arrays = {"w": weight(3, 4, 3, 3), **norm(4)}
    model = Model.from_proto(graph(IMAGE, "c = BatchNormalization(x, g, b, m, v) y = Conv(c, w)", arrays))
    write_record(model, {"x": ChannelStatistics(np.ones(4, "f4"), np.ones(4, "f4"), "estimated: noise")})
    FoldBatchNorm().apply(model)
    assert read_record(model)["x"].source == "batch-norm"


def test_a_scaled_or_shifted_tensor_has_the_scaled_or_shifted_statistics() -> None:
    rng = np.random.default_rng(0)
    values, factors, amounts = rng.normal(1, 2, (1000, 7)), rng.uniform(0.1, 10, 7), rng.normal(0, 5, 7)
    known = ChannelStatistics(values.mean(0, dtype="f4"), values.std(0, dtype="f4"), "estimated: noise")
    for changed, found in (
        (values * factors, known.scaled(factors)),
        (values + amounts, known.shifted(amounts)),
    ):
        np.testing.assert_allclose(found.mean, changed.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.std, changed.std(0), rtol=1e-4)
        assert found.source == known.source
        assert {found.mean.dtype, found.std.dtype} == {np.dtype("f4")}


def test_what_is_written_to_a_copy_stays_in_the_copy() -> None:
    model = Model.from_proto(graph(IMAGE, "y = Conv(x, w)", CONV))
    write_record(model, {"y": ChannelStatistics(np.zeros(5, "f4"), np.ones(5, "f4"))})
    twin = model.copy()
    read_record(twin)["x"] = read_record(twin)["y"]
    assert set(read_record(twin)) == {"y"}
    write_record(twin, {name: known.shifted(np.ones(5)) for name, known in read_record(twin).items()})
    assert (read_record(twin)["y"].mean == 1).all()
    assert (read_record(model)["y"].mean == 0).all()


@pytest.mark.parametrize(
    "command",
    [
        ("fold-bn",),
        ("equalize",),
        ("absorb-bias", "--deviations", "1"),
        ("calibrate", "--synthetic", "4"),
        pytest.param(
            ("quantize", "--synthetic", "4", "--inputs", "distilled", "--force"), marks=pytest.mark.slow
        ),
    ],
    ids=lambda command: command[0],
)
def test_a_command_decodes_the_record_of_its_file_once(
    command: tuple[str, ...],
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folded, out = tmp_path / "folded.onnx", tmp_path / "out.onnx"
    assert main(["fold-bn", str(models / "resnet20-fashion.onnx"), str(folded), "-q"]) == 0
    decoded: list[str] = []
    decode = record_module._decode

    def counted(text: str) -> np.ndarray:
        decoded.append(text)
        return decode(text)

    monkeypatch.setattr(record_module, "_decode", counted)
    assert main([command[0], str(folded), str(out), *command[1:], "-q"]) == 0
    in_file = 2 * len(json.loads(load(folded).metadata[KEY]))  # a mean and a deviation each
    assert len(decoded) == in_file


def show(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["inspect", str(path), *options]) == 0
    return capsys.readouterr().out


def test_inspect_shows_what_is_known_and_from_where(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folded = models / "mobilenetv2-fashion.onnx", tmp_path / "folded.onnx"
    shown = show(source, capsys, "--statistics")
    assert shown.count("in graph") == 1 + 32
    assert "`onnxcompress fold-bn` folds it and keeps them" in shown
    model = load(source)
    FoldBatchNorm().apply(model)
    save(model, folded)
    assert show(folded, capsys, "--statistics").count("batch-norm") == 32
    found = json.loads(show(folded, capsys, "--json"))["statistics"]
    before = json.loads(show(source, capsys, "--json"))["statistics"]
    assert {s["where"] for s in before.values()} == {"graph"}
    assert {s["where"] for s in found.values()} == {"record"}
    assert {n: s["std"] for n, s in found.items()} == {n: s["std"] for n, s in before.items()}
    assert sum(len(s["dead"]) for s in found.values()) == 87


@pytest.mark.parametrize("norms", [0, 1])
def test_inspect_says_how_to_get_what_is_missing(
    norms: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.onnx"
    training = "y, p, q = BatchNormalization<training_mode=1>(c, g, b, m, v)"
    proto = graph(IMAGE, f"c = Conv(x, w) {training if norms else 'y = Relu(c)'}", CONV)
    model = Model.from_proto(proto)
    write_record(model, {"gone": ChannelStatistics(np.zeros(5, "f4"), np.ones(5, "f4"))})
    save(model, path)
    shown = show(path, capsys, "--statistics")
    assert "1 recorded tensors are no longer in the graph" in shown
    assert ("none of 1 BatchNorms can be read" in shown) == bool(norms)
    assert "onnxcompress.export(" in shown
    assert "onnxcompress calibrate" in shown
