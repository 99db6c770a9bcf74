"""Calibrate: the sums are right, the right tensors are measured, what BatchNorm knows stays, and so on."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from onnxcompress.cli.main import main
from onnxcompress.data.image_set import load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import InputError, ModelError, OptionError
from onnxcompress.model import Model, load, save
from onnxcompress.optimize.calibration import InputRequest, gather_inputs
from onnxcompress.optimize.statistics_estimation import estimate_statistics, measurable
from onnxcompress.passes.base import run
from onnxcompress.passes.calibrate import Calibrate, CalibrateFigures
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.runtime.inference import run as run_model
from onnxcompress.statistics.record import ChannelStatistics, known_statistics, read_record, write_record
from tests.helpers.folding import Arrays, graph, norm, weight
from tests.helpers.results import figures_of

IMAGES, PREPROCESS = "fashion-tiny.npz", "fashion-mnist"


def folded(models: Path, name: str = "resnet20-fashion") -> tuple[Model, dict[str, ChannelStatistics]]:
    """A network as most are found, without BatchNorm and record; and what the record was."""
    model = load(models / f"{name}.onnx")
    FoldBatchNorm().apply(model)
    record = read_record(model)
    write_record(model, {})
    return model, record


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet20-fashion", "mobilenetv2-fashion"])
def test_estimates_from_training_images_are_what_batch_norm_knew(models: Path, network: str) -> None:
    """500 of 60,000 training images: means to a tenth of the deviation, deviations to 5 % on average and
    to a quarter in each channel, and the same channels are dead."""
    model, truth = folded(models, network)
    (result,) = run([Calibrate(images=str(models / IMAGES))], model)
    found = read_record(model)
    assert found.keys() == truth.keys() | {"input", "logits"}
    for name, exact in truth.items():
        assert found[name].dead == exact.dead
        std = np.maximum(exact.std, 0.02 * exact.std.max())
        assert (np.abs(found[name].mean - exact.mean) < 0.1 * std).all()
        off = np.abs(found[name].std - exact.std) / std
        assert off.max() < 0.25
        assert off.mean() < 0.05
    (used,) = result.inputs
    assert (used.source, used.count) == ("images", 500)
    assert {s.source for s in found.values()} == {"estimated: images 500, seed 0"}
    assert figures_of(result, CalibrateFigures).estimated == len(result.changes) == len(found)


def test_a_second_run_changes_nothing(models: Path) -> None:
    model, _ = folded(models)
    once = Calibrate(images=str(models / IMAGES), count=60)
    run([once], model)
    before = model.to_proto()
    (result,) = run([replace(once, batch=7)], model)
    assert not result.modified
    assert model.to_proto() == before
    assert [entry["pass"] for entry in model.provenance()] == ["calibrate"]
    assert model.provenance()[0]["inputs"] == [asdict(used) for used in result.inputs]
    (other,) = run([replace(once, seed=1)], model)
    assert len(other.changes) == 23


@pytest.mark.slow
def test_what_batch_norm_knows_is_kept_unless_overwritten(models: Path) -> None:
    model, truth = folded(models)
    write_record(model, truth)
    keep = Calibrate(images=str(models / IMAGES))
    (result,) = run([keep], model)
    figures = figures_of(result, CalibrateFigures)
    assert (figures.estimated, figures.kept) == (2, 21)
    assert figures.agreement is not None
    assert figures.agreement.tensors == 21
    assert figures.agreement.mean_error < 0.02
    assert figures.agreement.std_ratio == pytest.approx(1, abs=0.03)
    for name, exact in truth.items():
        np.testing.assert_array_equal(read_record(model)[name].mean, exact.mean)
    (result,) = run([replace(keep, overwrite=True)], model)
    assert len(result.changes) == 21
    assert all(s.estimated for s in known_statistics(model).values())


def test_norms_in_the_graph_are_recorded_and_overwritten_on_purpose(models: Path) -> None:
    model = load(models / "resnet20-fashion.onnx")
    exact = known_statistics(model)
    over = Calibrate(images=str(models / IMAGES), count=60)
    run([over], model)
    assert {n: s.source for n, s in known_statistics(model).items() if n in exact} == dict.fromkeys(
        exact, "batch-norm"
    )
    run([replace(over, overwrite=True)], model)
    assert all(s.estimated for s in known_statistics(model).values())
    (again,) = run([replace(over, overwrite=True)], model)
    assert not again.modified


BODY = """t = Transpose<perm=[0, 3, 1, 2]>(x)
    a = Conv<pads=[1, 1, 1, 1]>(t, w) n = BatchNormalization(a, g, b, m, v) r = Relu(n)
    s = Shape(r) u = ConvTranspose<strides=[2, 2]>(r, wu) p = GlobalMaxPool(u) f = Flatten(p)
    q = MatMul(f, wq) k = Add(q, bq) h = Relu(k) d = MatMul(h, wq2) e = Abs(d) y = Gemm(e, wg, cg)"""


def adversarial(batch: str = "N") -> Model:
    """Every kind of linear layer, NHWC images, a dead channel, one with a mean of 3000 deviations."""
    arrays: Arrays = {"w": weight(5, 3, 3, 3), **norm(5), "wu": weight(5, 4, 2, 2, seed=1)}
    arrays |= {"wq": weight(4, 6, seed=2), "bq": np.array([0, 1, 2, 3, 4, -1e4], "f4")}
    arrays |= {"wq2": weight(6, 3, seed=3), "wg": weight(3, 2, seed=4), "cg": np.array([3000, 0], "f4")}
    return Model.from_proto(graph(f"(float[{batch},8,6,3] x) => (float[M,2] y, int64[4] s)", BODY, arrays))


def test_every_sum_is_what_onnxruntime_gives() -> None:
    model = adversarial()
    names, refusals = measurable(model)
    assert names == ["t", "n", "u", "k", "d", "y"]
    assert not refusals
    x = np.random.default_rng(0).normal(2, 3, (37, 8, 6, 3)).astype(np.float32)
    proto = model.to_proto()
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names if n != "y")
    wanted = run_model(proto, {"x": x})
    found = estimate_statistics(model, torch.from_numpy(x), source="estimated: test", batch=5)
    for name in names:
        exact = wanted[name].astype(np.float64)
        axes = tuple(i for i in range(exact.ndim) if i != 1)
        std = exact.std(axes)
        limit = 1e-5 * std + 1e-6 * np.abs(exact).max(axes)  # of each channel
        assert (np.abs(found[name].mean - exact.mean(axes)) <= limit).all()
        assert (np.abs(found[name].std - std) <= limit).all()
    assert found["n"].std[4] == 0
    assert found["n"].dead == [4]


def test_a_batch_that_the_file_fixes_is_kept() -> None:
    x = torch.randn(10, 8, 6, 3, generator=torch.Generator().manual_seed(0))
    found = estimate_statistics(adversarial("4"), x, source="estimated: test")
    wanted = estimate_statistics(adversarial(), x[:8], source="estimated: test")
    for name in wanted:
        np.testing.assert_allclose(found[name].mean, wanted[name].mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="fixes a batch of 4, there are 3 images"):
        estimate_statistics(adversarial("4"), x[:3], source="estimated: test")


def test_little_memory_makes_small_batches_and_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(10, 8, 6, 3, generator=torch.Generator().manual_seed(0))
    wanted = estimate_statistics(adversarial(), x, source="estimated: test")
    steps: list[int] = []
    monkeypatch.setattr(
        "onnxcompress.optimize.statistics_estimation.BYTES", 3 * 4 * (3 * 48 + 5 * 48 + 4 * 192 + 6 + 3 + 2)
    )
    found = estimate_statistics(
        adversarial(), x, source="estimated: test", progress=lambda _, done, __: steps.append(done)
    )
    assert steps == [3, 6, 9, 10]
    for name in wanted:
        np.testing.assert_allclose(found[name].std, wanted[name].std, rtol=1e-5, atol=1e-6)


def test_attention_and_channels_last_are_left_alone() -> None:
    body = "p = Relu(x) r = Reshape(p, shape) y = MatMul(r, w)"
    arrays = {"w": weight(3, 5), "shape": np.array([0, -1, 3], np.int64)}
    model = Model.from_proto(graph("(float[N,4,4,3] x) => (float[N,16,5] y)", body, arrays))
    names, refusals = measurable(model)
    assert names == []
    assert "no Transpose puts them there" in str(refusals[0])
    assert "are not what MatMul" in str(refusals[1])


def test_a_file_with_nothing_gets_a_record_from_nothing(models: Path) -> None:
    """Procedural images are no Fashion-MNIST, and the entries say so; what follows can use them."""
    model, truth = folded(models)
    procedural = Calibrate(synthetic=24)
    (result,) = run([procedural], model)
    (used,) = result.inputs
    assert (used.source, used.count, used.seed) == ("procedural", 24, 0)
    assert {s.source for s in known_statistics(model).values()} == {"estimated: procedural 24, seed 0"}
    assert known_statistics(model).keys() == truth.keys() | {"input", "logits"}
    assert gather_inputs(model, InputRequest(inputs="layerwise", synthetic=2)).layerwise
    (again,) = run([procedural], model)  # not from images distilled from what it estimated itself
    assert not again.modified
    assert again.inputs == result.inputs


def test_overwriting_does_not_learn_from_what_it_overwrites(models: Path) -> None:
    model, truth = folded(models)
    write_record(model, truth)
    (result,) = run([Calibrate(overwrite=True, synthetic=8)], model)
    assert result.inputs[0].source == "procedural"
    with pytest.raises(OptionError, match="would bring it back"):
        Calibrate(overwrite=True, inputs="distilled").apply(model)
    with pytest.raises(ModelError, match="needs BatchNorm or recorded statistics"):
        Calibrate(inputs="distilled").apply(model)  # only its own estimates are left


def test_images_that_make_the_network_infinite_are_an_error(models: Path) -> None:
    model, _ = folded(models)
    images = load_images(models / IMAGES, preprocess=Preprocess.parse("mean=0 std=1e-38"), count=8)
    with pytest.raises(InputError, match="is not finite on these images"):
        estimate_statistics(model, images, source="estimated: test")


def test_the_command_line(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "net.onnx", tmp_path / "calibrated.onnx"
    save(folded(models, "mobilenetv2-fashion")[0], source)
    options = ["--images", str(models / IMAGES), "--count", "40"]
    assert main(["calibrate", str(source), str(target), *options]) == 0
    shown = capsys.readouterr().out
    assert "statistics of 34 tensors: 34 estimated, 0 kept" in shown
    assert "estimated from 40 images" in shown
    assert "channels do not vary" in shown
    assert main(["inspect", str(target), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["recorded_tensors"] == 34
    assert facts["provenance"][-1]["inputs"][0]["count"] == 40
    assert main(["calibrate", str(target), str(source), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changes"] == []


@pytest.mark.slow
def test_an_open_image_size_is_chosen_and_said(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = folded(models)[0].to_proto()
    for axis in (2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "HW"[axis - 2]
    del proto.graph.value_info[:], proto.metadata_props[:]
    onnx.save(proto, tmp_path / "net.onnx")
    command = ["calibrate", str(tmp_path / "net.onnx"), str(tmp_path / "out.onnx")]
    assert main([*command, "--synthetic", "2"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("note: net.onnx: input ")
    assert "is run at 1x1x224x224, a usual size: choose another with --input-shape" in error
    real = ["--images", str(models / IMAGES), "--count", "9", "--preprocess", PREPROCESS]
    assert main([*command, *real]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "--batch 0"),
        ({"seed": -1}, "--seed -1"),
        ({"inputs": "layerwise"}, "expected one of auto, images, distilled, procedural"),
        ({"inputs": "images"}, "name them with --images"),
    ],
)
def test_wrong_options(models: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Calibrate(**options).apply(folded(models)[0])  # type: ignore[arg-type]
