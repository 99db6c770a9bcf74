"""Options that would do nothing, or everything, and results in which nothing changed: they are said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcompress.cli.main import main
from tests.helpers.folding import graph, weight

BODY = """
    a = Conv<pads=[1,1,1,1]>(x, w)  b = Relu(a)  c = Conv<pads=[1,1,1,1]>(b, u)  d = Relu(c)
    g = GlobalAveragePool(d)  f = Flatten(g)  y = Gemm<transB=1>(f, z)
"""
ARRAYS = {"w": weight(8, 3, 3, 3), "u": weight(8, 8, 3, 3, seed=1), "z": weight(5, 8, seed=2)}
COMMANDS = (
    ["quantize", "--effort", "fast", "--no-latency"],
    ["prune", "--sparsity", "0.3", "--effort", "fast", "--no-latency"],
    ["fp16", "--no-latency"],
)


def written(folder: Path, signature: str = "(float[N,3,8,8] x) => (float[N,5] y)", body: str = BODY) -> str:
    path = folder / "net.onnx"
    arrays = {name: values for name, values in ARRAYS.items() if name in body}
    onnx.save(graph(signature, body, arrays), path)
    return str(path)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: str(c[0]))
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--exclude", ""], "--exclude '': it is empty"),
        (["--exclude", " , "], "it is empty"),
        (["--include", ""], "--include '': it is empty"),
        (["--exclude", "re:"], "--exclude 're:': it is empty"),
        (["--include", "op:"], "--include 'op:': it is empty"),
        (["--exclude", "@"], "--exclude @: name a file after it"),
        (["--exclude", "*"], "--exclude *: nothing is left"),
        (["--exclude", "re:x*"], "nothing is left"),
        (["--include", "op:Flatten", "--exclude", "op:Flatten"], "nothing is left"),
    ],
)
def test_patterns_that_would_do_nothing_or_everything_are_errors(
    command: list[str], given: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.onnx"
    name, *rest = command
    assert main([name, written(tmp_path), str(out), *rest, *given]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_patterns_that_leave_no_layer_say_how_many_there_would_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    for flag in ([], ["--dry-run"]):
        assert main(["quantize", path, str(tmp_path / "o.onnx"), "--include", "op:Relu", *flag]) == 2
        said = capsys.readouterr().err
        assert "--include op:Relu: nothing is left that can be quantized" in said
        assert "there would be 3 nodes" in said


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: str(c[0]))
def test_a_pass_that_changed_nothing_warns_also_where_nothing_else_is_printed(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "(int32[N,4] x) => (int32[N,4] y)", "y = Neg(x)")
    name, *rest = command
    assert main([name, path, str(tmp_path / "out.onnx"), *rest, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["refusals"]
    assert f"warning: {name} did not change the network: " in captured.err


def test_few_given_images_are_warned_of_at_every_effort(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "three.npz"
    np.savez(images, x=np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), np.uint8))
    path, out = written(tmp_path), str(tmp_path / "out.onnx")
    cut = ["drop-channels", "--macs-reduction", "10", "--effort", "fast", "--steps", "0"]
    for name, *rest in (COMMANDS[0], cut):
        assert main([name, path, out, *rest, "--images", str(images), "--force"]) == 0
        said = capsys.readouterr().err
        assert f"warning: {name} learned from 3 images" in said
        assert ("too few to keep some of them aside" in said) == (name == "drop-channels")


def test_a_note_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "(float[N,3,H,W] x) => (float[N,5] y)")
    assert main(["quantize", path, str(tmp_path / "out.onnx"), "--effort", "fast", "--no-latency"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "leaves sizes open" in line]) == 1


def test_tensorrt_reads_no_activations_of_16_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = written(tmp_path), tmp_path / "out.onnx"
    given = ["--for", "tensorrt", "--activation-bits", "16"]
    assert main(["quantize", path, str(out), *given]) == 2
    assert "--for tensorrt reads activations of 8 bits at most" in capsys.readouterr().err
    assert not out.exists()


def test_inspect_says_why_nothing_can_be_cut_or_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "y = Relu(x)"
    assert main(["inspect", written(tmp_path, "(float[N,3] x) => (float[N,3] y)", body)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no block can be dropped: no layers lie between" in said
    assert "no channels can be cut: no Conv" in said


def test_a_shared_weight_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = BODY.replace("d = Relu(c)", "e = Conv<pads=[1,1,1,1]>(c, u)  d = Relu(e)")
    assert main(["inspect", written(tmp_path, body=body), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (group,) = [one for one in found["channel_groups"] if one["stays"] is None]
    assert group["parameters"] == found["parameters"] == sum(values.size for values in ARRAYS.values())
