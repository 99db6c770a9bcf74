"""Accuracy on networks whose answers are known: the pixels are the scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnxcompress.cli.evaluate import evaluate as command
from onnxcompress.data.image_set import ImageSet, load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import InputError, ModelError, OptionError
from onnxcompress.evaluation import accuracy
from onnxcompress.evaluation.accuracy import Accuracy, agreement, evaluate, logits, preprocessing, topk
from tests.helpers.paths import MODELS


def network(batch: str = "N", kind: str = "float", scale: str = "1.0") -> onnx.ModelProto:
    """Six pixels in, six scores out; before them an output that is none."""
    return onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        net ({kind}[{batch},1,2,3] x) => (float[{batch},1,2,3] maps, float[{batch},6] scores)
        <float k = {{{scale}}}> {{ f = Cast<to=1>(x)  maps = Mul(f, k)  scores = Flatten<axis=1>(maps) }}
    """)


def images(y: list[int] | None, count: int = 7, text: str = "raw") -> ImageSet:
    """Image i is brightest at pixel i mod 6, next brightest at the pixel before it, and so on."""
    x = np.empty((count, 2, 3, 1), np.uint8)
    for i in range(count):
        x[i] = ((np.arange(6) - i - 1) % 6 * 10).reshape(2, 3, 1)
    labels = None if y is None else np.array(y)
    return ImageSet(x, labels, tuple(f"image{i}" for i in range(count)), Preprocess.parse(text))


# what is refused


def test_no_labels() -> None:
    with pytest.raises(InputError, match="no labels"):
        evaluate(network(), images(None))


def test_label_beyond_the_classes() -> None:
    with pytest.raises(InputError, match="a label is 6, the network has 6 classes"):
        evaluate(network(), images([0, 1, 2, 3, 4, 5, 6]))


def test_images_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="input 'x' takes 1x2x3, the images are 2x3x1"):
        logits(network(), images(None, text="raw layout=nhwc"))


def test_unknown_output() -> None:
    with pytest.raises(OptionError, match="has maps, scores"):
        logits(network(), images(None), output="score")


def test_no_output_of_the_form_of_scores() -> None:
    with pytest.raises(ModelError, match=r"no output of shape \[7, classes\]; got maps"):
        logits(network(), images(None), output="maps")


def test_nan_scores() -> None:
    with pytest.raises(ModelError, match="'scores' is NaN for 7 of 7 images, first image0"):
        logits(network(scale="nan"), images(None))


def test_two_inputs() -> None:
    model = network()
    model.graph.input.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1]))
    model.graph.node.append(onnx.helper.make_node("Relu", ["z"], ["unused"]))
    with pytest.raises(ModelError, match=r"reads 2 \(x, z\)"):
        logits(model, images(None))


def test_integer_input_takes_raw_pixels_only() -> None:
    with pytest.raises(InputError, match="give one of whole numbers"):
        logits(network(kind="uint8"), images(None, text="unit"))


# what is measured


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_top1_and_top5(batch: int) -> None:
    # right, right, second, fifth, sixth, right, right
    found = evaluate(network(), images([0, 1, 1, 5, 5, 5, 0]), batch=batch, provider="cpu")
    assert found.top1 == pytest.approx(4 / 7)
    assert found.top5 == pytest.approx(6 / 7)
    assert (found.count, found.provider) == (7, "cpu")


@pytest.mark.parametrize("kind", ["float", "double", "float16", "uint8"])
def test_input_types(kind: str) -> None:
    assert evaluate(network(kind=kind), images([0, 1, 2, 3, 4, 5, 0])).top1 == 1


@pytest.mark.parametrize("batch", ["1", "3", "16"])
def test_a_fixed_batch_wins_and_the_last_is_filled_up(batch: str) -> None:
    expected = logits(network(), images(None))
    assert np.array_equal(logits(network(batch), images(None), batch=2), expected)


def test_scores_of_any_monotone_normalization_rank_alike() -> None:
    plain, scaled = (logits(network(), images(None, text=t)) for t in ("raw", "mean=0.5 std=0.2"))
    assert agreement(plain, scaled) == 1


def test_equal_scores_do_not_count_as_right() -> None:
    assert topk(np.zeros((6, 6)), np.arange(6)) == pytest.approx((1 / 6, 5 / 6))


def test_the_time_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 102.5])
    monkeypatch.setattr(accuracy, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert evaluate(network(), images([0] * 7), provider="cpu").seconds == 2.5


@pytest.mark.parametrize(
    ("kind", "text", "given"),
    [("3,H,W", None, "1x3x24x32"), ("H,W,3", "layout=nhwc", "1x24x32x3"), ("3,H,W", None, "x=4x3x24x32")],
)
def test_images_are_brought_to_the_height_and_width_of_a_given_shape(
    kind: str, text: str | None, given: str
) -> None:
    proto = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N,{kind}] x) => (float[N,{kind}] y) {{ y = Relu(x) }}
    """)
    choice = preprocessing(proto, text, given)
    assert (choice.preprocess.size, choice.source) == ((24, 32), "option")


def test_agreement() -> None:
    a = np.array([[1, 0], [0, 1], [1, 0], [0, 1]])
    assert agreement(a, a) == 1
    assert agreement(a, a[::-1]) == 0
    with pytest.raises(ModelError, match="cannot be compared"):
        agreement(a, a[:2])


# the command


def test_command_prints_one_json_object(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "net.onnx")
    np.savez(tmp_path / "set.npz", x=images(None).x, y=np.array([0, 1, 2, 3, 4, 5, 1]))
    arguments = [str(tmp_path / "net.onnx"), "--images", str(tmp_path / "set.npz"), "--json"]
    result = CliRunner().invoke(command, [*arguments, "--provider", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["top1"] == pytest.approx(6 / 7)
    assert found["count"] == 7
    assert (found["preprocess"], found["preprocess_from"]) == ("mean=0 std=1", "default")
    assert result.stderr == ""
    table = CliRunner().invoke(command, [*arguments[:-1], "--preprocess", "raw"], catch_exceptions=False)
    assert "85.71%" in table.stdout
    assert "images are preprocessed by mean=0 std=1 scale=1 (as asked for)" in table.stdout
    assert re.fullmatch(r"running net.onnx: 7 in \d+\.\d s\n", table.stderr)


# the networks of this repository


@pytest.mark.parametrize("file", sorted(MODELS.glob("*.onnx")), ids=lambda file: file.stem)
def test_networks_of_the_repository_know_their_classes(file: Path) -> None:
    pre = Preprocess.parse("fashion-mnist")
    held_out = load_images(MODELS / "fashion-test2k.npz", preprocess=pre, count=200, labels=True)
    found = evaluate(file, held_out, provider="cpu", threads=1)
    assert found.top1 > 0.8
    assert found.top5 > 0.98


# figures of known scores


def test_of_equal_scores_the_lower_class_ranks_first() -> None:
    scores = np.array([[1.0, 3, 3, 0], [3, 3, 3, 3], [5, 4, 3, 2]])
    for y, top1 in (([1, 0, 0], 1.0), ([2, 0, 0], 2 / 3), ([2, 1, 1], 0.0)):
        assert topk(scores, np.array(y))[0] == pytest.approx(top1)
    equal = np.zeros((4, 8))
    assert topk(equal, np.array([0, 3, 4, 5])) == (0.25, 0.75)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(50, 100, 0.4038, 0.5962), (9, 10, 0.5958, 0.9821), (0, 20, 0.0, 0.1611), (200, 200, 0.9812, 1.0)],
)
def test_the_interval_of_an_accuracy_is_wilsons_at_95_percent(
    right: int, count: int, low: float, high: float
) -> None:
    """(p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n) with z = 1.96."""
    z, p, n = 1.959964, right / count, count
    half, centre = z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5, p + z * z / 2 / n
    wanted = ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
    assert wanted == pytest.approx((low, high), abs=1e-3)
    assert Accuracy(p, p, n, 0.0, "cpu").interval == pytest.approx(wanted, abs=1e-5)


def test_agreement_is_the_share_of_the_same_best_class() -> None:
    a = np.array([[1.0, 2, 3], [3, 1, 2], [1, 3, 2], [0, 1, 2]])
    b = np.array([[2.0, 1, 3], [3, 2, 1], [3, 1, 2], [0, 1, 2]])
    assert agreement(a, b) == 0.75
    assert agreement(a, -a) == 0
