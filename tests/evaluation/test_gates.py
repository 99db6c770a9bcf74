"""Gates: what is judged is what was measured, a miss is exit code 3, and the file is there all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcompress.cli.main import main
from onnxcompress.data.image_set import load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import InputError, OptionError
from onnxcompress.evaluation import gate_results as verdicts_module
from onnxcompress.evaluation import gates as gates_module
from onnxcompress.evaluation.accuracy import evaluate
from onnxcompress.evaluation.compare import compare
from onnxcompress.evaluation.gate_results import GateMeasurements, judge, summary
from onnxcompress.evaluation.gates import LIMITS, Gates
from onnxcompress.runtime.latency import Ratio
from onnxcompress.runtime.session import cuda_devices

pytestmark = pytest.mark.usefixtures("quick_clock")

FACTS = GateMeasurements(
    bytes=1_500_000,
    inputs="200 images",
    top1=(0.93, 0.92),
    agreement=0.955,
    latency_ms=2.0,
    ratio=Ratio(0.8, 0.75, 0.85),
    device="cpu, batch 1",
)


@pytest.fixture
def net(models: Path) -> Path:
    return models / "resnet20-fashion.onnx"


@pytest.fixture(scope="session")
def pictures(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 labelled images that the network was not trained on."""
    archive = np.load(models / "fashion-test2k.npz")
    file = tmp_path_factory.mktemp("pictures") / "few.npz"
    np.savez(file, x=archive["x"][:120], y=archive["y"][:120])
    return file


@pytest.fixture(scope="session")
def damaged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network with noise on a weight: less accurate, as large."""
    proto = onnx.load(models / "resnet20-fashion.onnx")
    weight = next(t for t in proto.graph.initializer if len(t.dims) == 4 and t.dims[0] == 64)
    values = onnx.numpy_helper.to_array(weight)
    noise = np.random.default_rng(0).standard_normal(values.shape).astype(np.float32)
    weight.CopyFrom(onnx.numpy_helper.from_array(values + 3 * values.std() * noise, weight.name))
    file = tmp_path_factory.mktemp("damaged") / "damaged.onnx"
    onnx.save(proto, file)
    return file


@pytest.mark.parametrize(
    ("gate", "kept", "missed", "measured", "text"),
    [
        ("max_drop", 1.0, 0.99, 1.0, "(93.00% to 92.00% on 200 images), it may fall by 0.99"),
        ("max_drop", 2, -0.5, 1.0, "fell by 1.00 points"),
        ("min_agreement", 95.5, 95.6, 95.5, "for 95.50 % of 200 images, at least 95.6 % is asked for"),
        ("max_latency", 2.0, 1.9, 2.0, "median latency 2 ms (cpu, batch 1), at most 1.9 ms is allowed"),
        ("min_speedup", 1.25, 1.26, 1.25, "1.250 times as fast (95 % interval 1.176 to 1.333; cpu"),
        ("max_size", 1.5, 1.4, 1.5, "1.500 MB, at most 1.4 MB is allowed"),
    ],
)  # fmt: skip
def test_a_limit_is_kept_up_to_itself(
    gate: str, kept: float, missed: float, measured: float, text: str
) -> None:
    for limit, passed in ((kept, True), (missed, False)):
        gates = Gates(**{gate: limit}, images="x")  # type: ignore[arg-type]
        gates.check()
        (verdict,) = judge(gates.limits, FACTS)
        assert (verdict.gate, verdict.limit, verdict.passed) == (gate, limit, passed)
        assert verdict.measured == pytest.approx(measured)
        assert bool(summary([verdict])) is not passed
    assert text in summary([verdict])


def test_each_limit_has_a_judge_and_a_range() -> None:
    assert (
        set(LIMITS) == set(verdicts_module._JUDGES) == set(gates_module._RANGES) == set(gates_module._UNITS)
    )
    assert judge(Gates().limits, FACTS) == []


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_agreement": 0.98, "images": "x"}, "--min-agreement 0.98: expected percent, more than 1"),
        ({"min_agreement": 101.0, "images": "x"}, "at most 100"),
        ({"min_agreement": 98.0}, "--min-agreement needs images: name them with --gate-images"),
        ({"max_drop": 1.0}, "--max-drop needs labelled images"),
        ({"max_latency": 0.0}, "--max-latency 0: expected milliseconds, more than 0"),
        ({"max_size": float("nan")}, "--max-size nan"),
        ({"min_speedup": -1.0}, "--min-speedup -1: expected a factor"),
        ({"batch": 0}, "--latency-batch 0"),
    ],
)
def test_limits_that_mean_nothing_are_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Gates(**limits).check()  # type: ignore[arg-type]


@pytest.mark.slow
def test_what_is_measured_is_what_evaluate_and_compare_say(
    net: Path, damaged: Path, pictures: Path
) -> None:
    gates = Gates(max_drop=1, min_agreement=99, min_speedup=0.1, max_size=5, images=str(pictures))
    measurements = gates.measure(gates.prepare(net), damaged)
    preprocess = Preprocess.parse("fashion-mnist")
    own = load_images(pictures, preprocess=preprocess, labels=True)
    assert measurements.top1 == (evaluate(net, own).top1, evaluate(damaged, own).top1)
    found = GateMeasurements.of(compare(net, damaged, images=own))
    assert (found.top1, found.agreement, found.bytes, found.inputs) == (
        measurements.top1,
        measurements.agreement,
        measurements.bytes,
        measurements.inputs,
    )
    assert measurements.bytes == damaged.stat().st_size
    assert measurements.agreement is not None
    assert measurements.agreement < 1
    assert measurements.ratio is not None
    verdicts = {v.gate: v for v in judge(gates.limits, measurements)}
    assert verdicts["min_speedup"].passed
    assert not verdicts["max_drop"].passed


def test_images_are_checked_before_the_work(
    net: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "plain.npz", x=np.load(pictures)["x"])
    with pytest.raises(InputError, match="no labels"):
        Gates(max_drop=1, images=str(tmp_path / "plain.npz")).prepare(net)
    out = tmp_path / "o.onnx"
    np.savez(tmp_path / "large.npz", x=np.zeros((2, 30, 30, 1), np.uint8))
    command = ["fold-bn", str(net), str(out), "--min-agreement", "99"]
    gate = ["--gate-preprocess", "unit", "--gate-images"]
    assert main([*command, *gate, str(tmp_path / "large.npz")]) == 1
    assert "set size=28x28" in capsys.readouterr().err
    fixed = onnx.load(net)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(fixed, tmp_path / "fixed.onnx")
    latency = [str(out), "--max-latency", "9"]
    assert main(["fold-bn", str(tmp_path / "fixed.onnx"), *latency, "--latency-batch", "4"]) == 2
    assert "its batch is fixed to 1" in capsys.readouterr().err
    if not cuda_devices():
        assert main(["fold-bn", str(net), *latency, "--provider", "tensorrt"]) == 1
        assert "provider tensorrt" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_a_pass_is_gated(
    net: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.onnx"
    command = ["fold-bn", str(net), str(out), "--gate-images", str(pictures), "--json", "--no-verify"]
    assert main([*command, "--max-drop", "0", "--min-agreement", "100", "--max-latency", "1e6"]) == 0
    caught = capsys.readouterr()
    gates = json.loads(caught.out)["gates"]
    assert [(g["gate"], g["passed"]) for g in gates] == [
        ("max_drop", True), ("min_agreement", True), ("max_latency", True)
    ]  # fmt: skip
    assert caught.err == ""
    out.unlink()
    assert main([*command, "--max-size", "0.1", "--min-speedup", "1000"]) == 3
    caught = capsys.readouterr()
    assert [g["passed"] for g in json.loads(caught.out)["gates"]] == [False, False]
    assert caught.err.count("\n") == 1
    assert "not worth it" in caught.err
    assert "at least 1000 is asked for; 1.1" in caught.err
    assert out.exists()


def test_a_recipe_is_gated_and_the_command_line_wins(
    net: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"passes: [fold-bn]\ngates: {{max_size: 0.1, max_drop: 1, images: {pictures.name}}}\n"
    )
    (tmp_path / pictures.name).write_bytes(pictures.read_bytes())
    command = ["run", str(recipe), str(net), str(tmp_path / "o.onnx"), "--no-cache", "--json"]
    assert main(command) == 3
    assert "at most 0.1 MB" in capsys.readouterr().err
    assert main([*command, "--max-size", "2"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert {g["gate"]: g["limit"] for g in account["gates"]} == {"max_size": 2.0, "max_drop": 1}
    assert set(account) == {
        "recipe", "input", "output", "steps", "bytes", "guard", "latency", "gates", "provenance",
    }  # fmt: skip


@pytest.mark.slow
def test_compare_is_gated(
    net: Path, damaged: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", str(net), str(damaged)]
    images = ["--images", str(pictures), "--preprocess", "fashion-mnist"]
    assert main([*command, *images, "--max-drop", "0.5", "--max-size", "5"]) == 3
    caught = capsys.readouterr()
    assert "gate --max-size kept" in caught.out
    assert "gate --max-drop MISSED" in caught.out
    assert "\nerror: not worth it: top-1 accuracy fell by" in caught.err
    assert main([*command, *images, "--max-drop", "100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gates"][0]["passed"]
    assert main([*command, "--min-agreement", "90"]) == 2
    assert "--min-agreement needs images: name them with --images" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("after", "limit", "code"), [(1, 1.5, 0), (1, 1.99, 0), (1, 3, 3), (4, 1.5, 3)])
def test_twice_as_fast_is_a_speed_up_of_two(
    after: float,
    limit: float,
    code: int,
    net: Path,
    fixed_clock: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The input takes 2 ms, the output 1 or 4."""
    fixed_clock([2, after], jitter=0.02)
    command = ["fold-bn", str(net), str(tmp_path / "o.onnx"), "--json", "--no-verify", "--min-speedup"]
    assert main([*command, str(limit)]) == code
    (gate,) = json.loads(capsys.readouterr().out)["gates"]
    assert gate["measured"] == pytest.approx(2 / after, rel=0.005)
    assert gate["passed"] == (code == 0)


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "code"), [(3.1, 0), (2.9, 3)])
def test_the_latency_that_is_judged_is_that_of_the_output(
    limit: float, code: int, net: Path, fixed_clock: Callable[..., None], tmp_path: Path
) -> None:
    fixed_clock([3.0], [2.0, 3.0])
    command = ["fold-bn", str(net), str(tmp_path / "o.onnx"), "--quiet", "--no-verify"]
    assert main([*command, "--max-latency", str(limit)]) == code
    assert main([*command, "--max-latency", str(limit), "--min-speedup", "0.5"]) == code


@pytest.mark.parametrize(
    ("after", "start", "passed"),
    [
        (0.885, "fell by 1.50 points (90.00% to 88.50% on 200 images)", False),
        (0.89, "fell by 1.00 points (90.00% to 89.00% on 200 images)", True),
        (0.915, "rose by 1.50 points (90.00% to 91.50% on 200 images)", True),
    ],
)
def test_accuracy_falls_or_rises_by_points(after: float, start: str, passed: bool) -> None:
    (found,) = judge({"max_drop": 1.0}, GateMeasurements(1, "200 images", (0.9, after)))
    assert (found.text, found.passed) == (f"top-1 accuracy {start}, it may fall by 1", passed)
    assert found.measured == pytest.approx(100 * (0.9 - after))
