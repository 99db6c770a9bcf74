"""drop-blocks on a shipped network and its images, small and quick; figures are in tests/benchmarks."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxcompress.cli.main import main
from onnxcompress.errors import CompressError, ModelError
from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import find_blocks
from onnxcompress.model import Model, load
from onnxcompress.passes.base import run
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.statistics.record import write_record
from tests.helpers.brief import COMMAND, few_rounds

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", autouse=True)
def brief() -> Iterator[None]:
    """Latency from a few rounds."""
    with pytest.MonkeyPatch.context() as patch:
        few_rounds(patch)
        yield


@pytest.fixture(scope="session")
def arguments(models: Path) -> list[str]:
    return ["--images", str(models / "fashion-tiny.npz"), "--preprocess", "fashion-mnist", "--count", "48",
            "--steps", "3", "--batch", "16"]  # fmt: skip


@pytest.fixture(scope="session")
def resnet(models: Path) -> str:
    return str(models / "resnet20-fashion.onnx")


@pytest.fixture(scope="module")
def scores(resnet: str, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores measured once, as a user would keep them."""
    folder = tmp_path_factory.mktemp("scores")
    file = folder / "scores.json"
    command = ["drop-blocks", resnet, str(folder / "o.onnx"), *arguments, "--blocks", "1"]
    assert main([*command, "--scores", str(file)]) == 0
    return file


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "give one target"),
        (["--blocks", "1", "--latency-reduction", "5"], "give one target"),
        (["--blocks", "1", "--steps", "5", "--time", "5s"], "give --steps or --time"),
        (["--blocks", "1", "--time", "5"], "expected a duration such as"),
        (["--blocks", "99"], "the network has 9"),
        (["--drop", "blocks.11"], "did you mean 'blocks.1'"),
        (["--latency-reduction", "120"], "expected more than 0 and less than 100"),
        (["--blocks", "1", "--feature", "nowhere"], "it is no tensor of the network"),
        (["--drop", "blocks.5", "--feature", "/blocks/blocks.1/Relu_output_0"], "do not depend on it"),
        (["--blocks", "3", "--feature", "/blocks/blocks.1/Relu_output_0"], "depend on 2 blocks"),
        (["--blocks", "1", "--batch", "0"], "expected 1 or more"),
        (["--blocks", "1", "--seed", "-1"], "expected 0 or more"),
        (["--blocks", "1", "--learning-rate", "nan"], "expected more than 0"),
        (["--blocks", "1", "--scores", "nowhere/s.json"], "an existing folder"),
        (["--blocks", "1", "--latency-batch", "-4"], "expected 1 or more"),
    ],
)
def test_wrong_options_are_usage_errors(
    extra: list[str],
    message: str,
    resnet: str,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "o.onnx"
    assert main(["drop-blocks", resnet, str(out), *arguments, *extra]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_images_of_the_wrong_shape_are_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "rgb.npz", x=np.zeros((4, 28, 28, 3), np.uint8))
    command = ["drop-blocks", str(models / "resnet20-fashion.onnx"), str(tmp_path / "o.onnx")]
    assert main([*command, "--images", str(tmp_path / "rgb.npz"), "--blocks", "1"]) == 1
    assert "add channels=1" in capsys.readouterr().err


def test_a_network_without_blocks_is_refused() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,1,28,28] x) => (float[N,1,28,28] y) {y = Relu(x)}"""
    )
    with pytest.raises(CompressError, match="no block can be dropped"):
        DropBlocks(images="x", blocks=1).apply(Model.from_proto(proto))


NO_DATA = {"preprocess": "fashion-mnist", "synthetic": 24, "steps": 2, "batch": 8, "drop": ("blocks.1",)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "recorded", "source"),
    [("auto", True, "distilled"), ("auto", False, "procedural"), ("layerwise", True, "layerwise")],
)
def test_without_images_the_best_inputs_are_made(
    resnet: str, asked: str, recorded: bool, source: str
) -> None:
    """What was learned from, how many, with which seed and why stands in the provenance."""
    model = load(resnet)
    FoldBatchNorm().apply(model)
    if not recorded:
        write_record(model, {})
    run([DropBlocks(inputs=asked, **NO_DATA)], model)  # type: ignore[arg-type]
    (used,) = model.provenance()[-1]["inputs"]
    assert (used["source"], used["count"], used["seed"]) == (source, 24, 0)
    assert used["why"]


@pytest.mark.slow
def test_procedural_inputs_need_no_record(resnet: str) -> None:
    """With BatchNorm in the file, and folded without a record, the same weights come out."""
    results = []
    for recorded in (True, False):
        model = load(resnet)
        if not recorded:
            FoldBatchNorm().apply(model)
            write_record(model, {})
        DropBlocks(inputs="procedural", **NO_DATA).apply(model)  # type: ignore[arg-type]
        results.append({t.name: onnx.numpy_helper.to_array(t) for t in model.to_proto().graph.initializer})
    assert results[0].keys() == results[1].keys()
    assert all(np.array_equal(results[0][name], value) for name, value in results[1].items())


def test_layerwise_inputs_need_a_record(resnet: str) -> None:
    model = load(resnet)
    FoldBatchNorm().apply(model)
    write_record(model, {})
    with pytest.raises(ModelError, match="calibrate"):
        DropBlocks(inputs="layerwise", **NO_DATA).apply(model)  # type: ignore[arg-type]


@pytest.mark.slow
def test_real_and_made_images_together(resnet: str, models: Path) -> None:
    model = load(resnet)
    images = str(models / "fashion-tiny.npz")
    both = DropBlocks(images=images, count=8, inputs="procedural", **NO_DATA)  # type: ignore[arg-type]
    run([both], model)
    assert [(u["source"], u["count"]) for u in model.provenance()[-1]["inputs"]] == [
        ("images", 8),
        ("procedural", 24),
    ]


@pytest.mark.slow
def test_the_output_is_the_input_with_fewer_nodes(
    resnet: str, arguments: list[str], scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.onnx"
    command = [
        "drop-blocks",
        resnet,
        str(out),
        *arguments,
        "--blocks",
        "2",
        "--scores",
        str(scores),
        "--json",
    ]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    dropped = [c["node"] for c in report["changes"] if "dropped" in c["what"]]
    assert len(dropped) == 2
    assert {"before_ms", "after_ms", "ratio", "low", "high"} <= set(report["measured"]["latency"])
    before, after = onnx.load(resnet), onnx.load(str(out))
    onnx.checker.check_model(after, full_check=True)
    assert not Counter(n.op_type for n in after.graph.node) - Counter(n.op_type for n in before.graph.node)
    assert len(find_blocks(load(out)).blocks) == 7
    session = onnxruntime.InferenceSession(str(out))
    for batch in (1, 3):
        assert session.run(None, {"input": np.zeros((batch, 1, 28, 28), np.float32)})[0].shape == (
            batch,
            10,
        )
    passes = [entry["pass"] for entry in load(out).provenance()]
    assert passes == ["drop-blocks"]


@pytest.mark.slow
def test_another_seed_gives_another_file(resnet: str, arguments: list[str], tmp_path: Path) -> None:
    """That the same one gives the same file is in tests/robustness/test_sameness.py."""
    files = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        command = ["drop-blocks", resnet, str(out), *arguments, "--count", "16", "--blocks", "1"]
        assert main([*command, "--seed", seed, "--quiet"]) == 0
        files.append(out.read_bytes())
    assert files[0] != files[1]


@pytest.mark.slow
def test_scores_of_another_model_are_refused(
    models: Path, arguments: list[str], scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(models / "mobilenetv2-fashion.onnx")
    command = [
        "drop-blocks",
        other,
        str(tmp_path / "o"),
        *arguments,
        "--blocks",
        "1",
        "--scores",
        str(scores),
    ]
    assert main(command) == 1
    assert "another model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_target_out_of_reach_is_written_and_said(
    resnet: str, arguments: list[str], scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.onnx"
    command = [
        "drop-blocks",
        resnet,
        str(out),
        *arguments,
        "--latency-reduction",
        "99",
        "--scores",
        str(scores),
        "--force",  # without any block nothing is left to tell classes by
    ]
    assert main(command) == 3
    assert "99 % was asked for" in capsys.readouterr().err
    assert not find_blocks(load(out)).blocks


@pytest.mark.slow
def test_named_blocks_of_a_mobilenet(models: Path, arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "o.onnx"
    source = str(models / "mobilenetv2-fashion.onnx")
    assert main(["drop-blocks", source, str(out), *arguments, "--drop", "blocks.1,blocks.5"]) == 0
    names = {b.name for b in find_blocks(load(out)).blocks}
    assert names == {"blocks.0", "blocks.2", "blocks.4", "blocks.6", "blocks.8", "blocks.9"}


@pytest.mark.slow
def test_interrupted_while_tuning_nothing_is_left(
    resnet: str, arguments: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "o.onnx"
    command = [*COMMAND, "drop-blocks", resnet, str(out), *arguments]
    process = subprocess.Popen(
        [*command, "--drop", "blocks.1", "--steps", "100000"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
    )
    assert process.stderr is not None
    for line in process.stderr:  # the plain progress: refitting has ended, so it is fine-tuning
        if "refitting" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_blocks_loss_is_that_of_the_network_without_it(resnet: str) -> None:
    from onnxcompress.graph.topology import Topology
    from onnxcompress.optimize.block_drop.recoverability import Scorer, probe
    from onnxcompress.optimize.executor import Executor

    model = load(resnet)
    FoldBatchNorm().apply(model)
    feature = Topology(model).feature()
    assert feature is not None
    x = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    executor = Executor.from_model(model)
    blocks = find_blocks(model).blocks
    scorer = Scorer(model, blocks, probe(executor, x, "input", feature.name), executor=executor, steps=0)
    wanted = executor.run({"input": x}, [feature.name])[feature.name]
    for block in blocks[:3]:
        pruned = model.copy()
        name = drop_blocks(pruned, [block.exit]).get(feature.name, feature.name)
        got = Executor.from_model(pruned).run({"input": x}, [name])[name]
        expected = float((got - wanted).square().sum() / wanted.square().sum())
        assert scorer.recover(block).loss == pytest.approx(expected, rel=0.05)  # bfloat16 where it pays


@pytest.mark.slow
def test_adapters_and_refitting_recover_features(resnet: str, models: Path) -> None:
    from onnxcompress.graph.topology import Topology
    from onnxcompress.optimize.block_drop.recoverability import Scorer, probe
    from onnxcompress.optimize.executor import Executor
    from onnxcompress.optimize.reconstruction.residual_refit import RefitSettings, ResidualRefit

    model = load(resnet)
    FoldBatchNorm().apply(model)
    feature = Topology(model).feature()
    assert feature is not None
    pixels = np.load(models / "fashion-tiny.npz")["x"][:64].transpose(0, 3, 1, 2)
    x = torch.from_numpy(((pixels / 255 - 0.2860) / 0.3530).astype(np.float32))
    teacher = Executor.from_model(model)
    found = find_blocks(model)
    target = probe(teacher, x, "input", feature.name)
    losses = [
        Scorer(model, found.blocks, target, executor=teacher, steps=n).recover(found["blocks.1"]).loss
        for n in (0, 16)
    ]
    pruned = model.copy()
    drop_blocks(pruned, [found["blocks.1"].exit])
    student = Executor.from_model(pruned)
    new = ResidualRefit.of(model, pruned, feature.name, RefitSettings()).run(x)
    with torch.no_grad():
        got = student.run({"input": x}, [feature.name], new)[feature.name]
    refitted = float((got - target.wanted.float()).square().sum()) / target.energy
    assert refitted < losses[1] < losses[0]


def test_a_batch_norm_that_stays_keeps_its_statistics() -> None:
    """Training a variance would make it negative; only scale, offset and convolutions are trained."""
    from onnxcompress.optimize.executor import Executor
    from onnxcompress.optimize.reconstruction.feature_loss import Matched
    from onnxcompress.optimize.reconstruction.finetune import Schedule, finetune
    from onnxcompress.optimize.reconstruction.held_out import HeldOut

    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N,2,6,6] x) => (float[N,2,6,6] y)
    <float[2] s = {1, 1}, float[2] o = {0, 0}, float[2] m = {0, 0}, float[2] v = {0.001, 0.001}> {
      n = BatchNormalization(x, s, o, m, v) r = Relu(n) y = Conv(r, w) }"""
    proto = onnx.parser.parse_model(text)
    weight = np.ones((2, 2, 1, 1), np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    student = Executor.from_model(Model.from_proto(proto))
    proto.graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(-weight, "w"))
    teacher = Executor.from_model(Model.from_proto(proto))
    x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    schedule = Schedule(steps=5, batch=4, learning_rate=0.5, seed=0)
    aside = HeldOut(teacher, x, "x", "y")
    trained = finetune(student, teacher, Matched("x", ("y", "y")), x, schedule, aside).values
    assert set(trained) == {"s", "o", "w"}
    assert all(bool(value.isfinite().all()) for value in trained.values())
