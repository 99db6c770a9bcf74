"""Dry runs say what a run would refuse; runs that change nothing say why; messages name users' files."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcompress.cli.main import main
from onnxcompress.model import Model
from onnxcompress.passes.base import Pass, run
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.quantize import Quantize
from onnxcompress.pipeline import Pipeline
from tests.helpers.folding import graph, weight

SIGNATURE = "(float[N,3,8,8] x) => (float[N,4,8,8] y)"
ARRAYS = {"w": weight(4, 3, 3, 3), "v": weight(4, 4, 1, 1)}
BODY = "c = Conv<pads = [1,1,1,1]>(x, w) r = Relu(c) y = Conv(r, v)"


@pytest.fixture
def net(tmp_path: Path) -> str:
    onnx.save(graph(SIGNATURE, BODY, ARRAYS), tmp_path / "net.onnx")
    return str(tmp_path / "net.onnx")


SHARED = "c = Conv<pads = [1,1,1,1]>(x, w) r = Conv(c, v) y = Conv(r, v)"


@pytest.mark.parametrize(
    "one", [Quantize(synthetic=4, inputs="procedural"), Prune(synthetic=4, scope="layer")]
)
def test_a_preview_names_what_the_run_leaves_alone(one: Pass) -> None:
    proto = graph(SIGNATURE, SHARED, ARRAYS)
    model = Model.from_proto(proto)
    expected = one.preview(model)
    assert model.to_proto() == proto
    assert any("shared" in refusal.rule for refusal in expected)
    assert [r.node for r in one.apply(model).refusals] == [r.node for r in expected]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["prune", "--sparsity", "0.99"], "weights may become 0"),
        (["drop-blocks", "--blocks", "1"], "no block can be dropped"),
        (["quantize", "--inputs", "layerwise"], "needs BatchNorm or recorded statistics"),
        (["quantize", "--images", "{npz}"], "the images are 3x6x6"),
    ],
)
def test_a_dry_run_fails_where_the_run_would(
    command: list[str], message: str, net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "small.npz", x=np.zeros((4, 6, 6, 3), np.uint8))
    name, *options = [part.format(npz=tmp_path / "small.npz") for part in command]
    for more in (["--dry-run"], []):
        assert main([name, net, str(tmp_path / "out.onnx"), *options, *more]) in (1, 2)
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.onnx").exists()


def test_a_dry_run_lists_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(graph(SIGNATURE, SHARED, ARRAYS), tmp_path / "net.onnx")
    command = ["quantize", str(tmp_path / "net.onnx"), str(tmp_path / "out.onnx"), "--dry-run"]
    assert main(command) == 0
    assert "would be left alone: 2" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    (step,) = json.loads(capsys.readouterr().out)["steps"]
    assert "shared" in step["refusals"][0]["rule"]


def test_a_chain_looks_at_what_quick_passes_leave() -> None:
    norm = {name: weight(4, seed=3) ** 2 + 0.5 for name in "gbmu"}
    body = "c = Conv<pads = [1,1,1,1]>(x, w) y = BatchNormalization(c, g, b, m, u)"
    model = Model.from_proto(graph(SIGNATURE, body, {"w": ARRAYS["w"], **norm}))
    chain = Pipeline([FoldBatchNorm(), Quantize(inputs="layerwise"), Prune(sparsity=0.99)])
    assert [preview.refusals for preview in chain.previews(model)] == [(), (), ()]


@pytest.mark.parametrize(
    ("one", "body", "reason"),
    [
        (Quantize(), "y = Relu(z)", "no Conv, ConvTranspose, Gemm or MatMul"),
        (Prune(), "y = Relu(z)", "none of its layers may be pruned"),
        (HalfPrecision(), "y = Identity(k)", "nothing that fp16 would change"),
    ],
)
def test_a_pass_that_changes_nothing_says_why(one: Pass, body: str, reason: str) -> None:
    kind, name = ("float", "z") if "z" in body else ("int64", "k")
    model = Model.from_proto(graph(f"({kind}[N,3] {name}) => ({kind}[N,3] y)", body, {}))
    (result,) = run([one], model)
    assert not result.modified
    (refusal,) = result.refusals
    assert reason in refusal.rule


def test_zeros_that_are_there_already_are_the_reason() -> None:
    model = Model.from_proto(graph(SIGNATURE, BODY, ARRAYS))
    one = Prune(reconstruct=False)
    run([one], model)
    (again,) = run([one], model)
    assert not again.modified
    assert "zero already" in again.refusals[-1].rule


def test_few_images_are_warned_of(net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", net, str(tmp_path / "out.onnx"), "--inputs", "procedural", "--quiet"]
    assert main([*command, "--synthetic", "8"]) == 0
    assert "warning: quantize learned from 8 images" in capsys.readouterr().err
    for enough in (["--synthetic", "64"], ["--effort", "balanced"]):
        assert main([*command, *enough]) == 0
        assert "warning" not in capsys.readouterr().err


def test_messages_name_the_stream_and_no_temporary_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = graph("(float[N,3,H,W] x) => (float[N,3,A,B] y)", "y = Relu(x)", {})

    class Stream:
        buffer = io.BytesIO(proto.SerializeToString())

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdin", Stream())
    assert main(["drop-blocks", "-", str(tmp_path / "out.onnx"), "--blocks", "1"]) == 1
    printed = capsys.readouterr()
    text = " ".join((printed.out + printed.err).split())
    assert "error: standard input: no block can be dropped" in text
    assert "stdin.onnx" not in text
