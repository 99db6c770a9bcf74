"""Networks that read several inputs: passes that learn take them as parts of one, the file keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.account import Change
from onnxcompress.cli.main import main
from onnxcompress.errors import CompressWarning, ModelError, OptionError
from onnxcompress.evaluation.guard import Guard
from onnxcompress.graph.edit import set_values
from onnxcompress.graph.shape_inference import tensor_types
from onnxcompress.model import Model, save
from onnxcompress.optimize.calibration import InputRequest
from onnxcompress.passes.base import Pass, run
from onnxcompress.passes.calibrate import Calibrate
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.drop_channels import DropChannels
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.quantize import Quantize
from onnxcompress.passes.several_inputs import PREFIX, pack, previewed
from onnxcompress.runtime.random_inputs import random_inputs
from onnxcompress.runtime.several_inputs import settings, shapes_that_run
from tests.helpers.folding import graph, outputs, weight

FEW: dict[str, Any] = {"effort": "fast", "synthetic": 8}
HEAD = "g = GlobalAveragePool(e)  f = Flatten(g)  y = Gemm<transB=1>(f, z)"
LAYERS = {"w": weight(8, 3, 3, 3), "v": weight(8, 8, 3, 3, seed=1), "z": weight(5, 8, seed=2)}


def two_images() -> Model:
    body = f"""a = Conv<pads=[1,1,1,1]>(left, w)  b = Conv<pads=[1,1,1,1]>(right, w)  m = Mul(a, b)
        r = Relu(m)  d = Conv<pads=[1,1,1,1]>(r, v)  e = Relu(d)  {HEAD}"""
    return Model.from_proto(
        graph("(float[N,3,8,8] left, float[N,3,8,8] right) => (float[N,5] y)", body, LAYERS)
    )


def with_time_and_mask() -> Model:
    """As networks that denoise: an image, an integer for each image, and a mask."""
    body = f"""t = Cast<to=1>(step)  u = Unsqueeze(t, axes)  a = Conv<pads=[1,1,1,1]>(x, w)  s = Add(a, u)
        r = Relu(s)  d = Conv<pads=[1,1,1,1]>(r, v)  q = Cast<to=1>(seen)  e = Mul(d, q)  {HEAD}"""
    arrays = {**LAYERS, "axes": np.array([1, 2, 3])}
    signature = "(int64[N] step, float[N,3,8,8] x, bool[N,1,8,8] seen) => (float[N,5] y)"
    return Model.from_proto(graph(signature, body, arrays))


def with_state() -> Model:
    """As networks that hear: a frame of open length, a state with the batch on its second axis, a rate."""
    body = """high = Equal(rate, sixteen)  h = Cast<to=1>(high)  c = Unsqueeze(sound, one)
        k = Mul(c, h)  a = Conv<strides=[4]>(k, p)  r = Relu(a)  d = Conv(r, q)  g = GlobalAveragePool(d)
        f = Flatten(g)  i = Unsqueeze(f, zero)  l, n = RNN<hidden_size=8>(i, s, o, , , state)
        j = Squeeze(n, zero)  y = Gemm<transB=1>(j, z)"""
    arrays = {
        "p": weight(8, 1, 8) / 3, "q": weight(8, 8, 3, seed=1) / 5, "s": weight(1, 8, 8, seed=3) / 3,
        "o": weight(1, 8, 8, seed=4) / 3, "z": weight(5, 8, seed=2), "sixteen": np.array(16000),
        "one": np.array([1]), "zero": np.array([0]),
    }  # fmt: skip
    signature = "(float[N,L] sound, float[1,N,8] state, int64 rate) => (float[N,5] y, float[1,N,8] n)"
    return Model.from_proto(graph(signature, body, arrays))


def with_switch() -> Model:
    """An image, and a bool that is a setting."""
    body = f"""a = Conv<pads=[1,1,1,1]>(x, w)  b = Where(bright, a, none)  r = Relu(b)
        d = Conv<pads=[1,1,1,1]>(r, v)  e = Relu(d)  {HEAD}"""
    arrays = {**LAYERS, "none": np.array(0, np.float32)}
    return Model.from_proto(graph("(float[N,3,8,8] x, bool bright) => (float[N,5] y)", body, arrays))


MAKERS = [two_images, with_time_and_mask, with_state, with_switch]
PASSES: list[Pass] = [
    Calibrate(inputs="procedural", **FEW), Quantize(**FEW), Prune(sparsity=0.2, scope="layer", **FEW),
    HalfPrecision(),
]  # fmt: skip


def check_inputs_kept(before: onnx.ModelProto, model: Model) -> None:
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert list(after.graph.input) == list(before.graph.input)
    assert PREFIX not in str(after)


@pytest.mark.filterwarnings("ignore::onnxcompress.errors.CompressWarning")
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("pass_", PASSES, ids=lambda p: str(p.name))
def test_the_file_keeps_its_inputs(make: Any, pass_: Pass) -> None:
    model = make()
    before = model.to_proto()
    (result,) = run([pass_], model, guard=Guard())
    check_inputs_kept(before, model)
    assert result.modified
    assert not [refusal for refusal in result.refusals if refusal.node.startswith(PREFIX)]
    assert result.guard is not None
    assert result.guard.fidelity is not None, result.guard


@pytest.mark.filterwarnings("ignore::onnxcompress.errors.CompressWarning")
def test_channels_are_cut_between_several_inputs() -> None:
    model = two_images()
    before = model.to_proto()
    (result,) = run([DropChannels(macs_reduction=20, steps=0, **FEW)], model)
    check_inputs_kept(before, model)
    assert result.changes[0] == Change("d", "8 channels cut to 4")


@pytest.mark.filterwarnings("ignore::onnxcompress.errors.CompressWarning")
@pytest.mark.parametrize("make", MAKERS)
def test_the_reference_of_correct_bias_is_packed_alike(make: Any, tmp_path: Path) -> None:
    save(make(), reference := tmp_path / "reference.onnx")
    model = make()
    before = model.to_proto()
    weights = model.graph.tensors()["q" if make is with_state else "v"]
    set_values(weights, weights.values + np.float32(0.1))
    (result,) = run([CorrectBias(reference=str(reference), inputs="procedural")], model)
    check_inputs_kept(before, model)
    assert any(change.what == "bias corrected" for change in result.changes)


def test_what_is_drawn_is_said_once() -> None:
    with pytest.warns(CompressWarning) as noted:
        run([Prune(sparsity=0.2, scope="layer", **FEW)], with_state())
    text = (
        "model: it reads several inputs: sound (1x1024), state (1x1x8) drawn at random, rate held at 16000"
    )
    assert [str(note.message) for note in noted].count(text) == 1
    assert not [note for note in noted if "leaves sizes open" in str(note.message)]


@pytest.mark.filterwarnings("ignore::onnxcompress.errors.CompressWarning")
def test_parts_of_the_packed_input_have_the_types_of_the_file() -> None:
    types = tensor_types(pack(with_time_and_mask(), InputRequest()).model)
    kinds = onnx.TensorProto
    assert [types[name] for name in ("step", "x", "seen")] == [kinds.INT64, kinds.FLOAT, kinds.BOOL]


def test_a_setting_is_no_constant_and_has_its_value() -> None:
    """A runtime that knew it would put the branch of an If that it selects into the graph."""
    proto = pack(with_state(), InputRequest()).model.to_proto()
    (maker,) = (node.op_type for node in proto.graph.node if "rate" in node.output)
    assert maker != "Constant"
    del proto.graph.output[:]
    proto.graph.output.append(onnx.helper.make_tensor_value_info("rate", onnx.TensorProto.INT64, []))
    for feed in (np.zeros((1, 4096)), np.full((1, 4096), -3e30)):
        size = proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value
        values = {PREFIX: feed[:, :size].astype(np.float32)}
        (found,) = outputs(proto, values)
        assert found == 16000
        assert found.shape == ()


def test_sizes_fit_each_other_and_the_guard_uses_them() -> None:
    model = with_state()
    assert settings(model) == {"rate": 16000}
    shapes = shapes_that_run(model, {"sound": (1, 400)})
    assert shapes == {"sound": (1, 400), "state": (1, 1, 8), "rate": ()}
    model.assume(shapes)
    drawn = random_inputs(model)
    assert drawn.count == 8
    assert drawn.one_by_one() == drawn
    assert all(feed["rate"] == 16000 and feed["state"].shape == (1, 1, 8) for feed in drawn.feeds)


def test_the_remedy_for_sizes_that_do_not_fit_is_an_option_that_exists() -> None:
    with pytest.raises(ModelError, match=r"give the shapes .* --input-shape sound=1x4,state=1x1x8"):
        shapes_that_run(with_state(), {"sound": (1, 4)})
    with pytest.warns(CompressWarning, match=r"sound \(1x400\), state"):
        previewed(Quantize(input_shape="sound=1x400,state=1x1x8", **FEW), with_state())


def test_images_tell_nothing_of_the_other_inputs(tmp_path: Path) -> None:
    np.savez(images := tmp_path / "images.npz", x=np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(OptionError, match=r"--images: model reads several inputs \(left, right\)"):
        run([Quantize(images=str(images), effort="fast")], two_images())


def test_sensitivities_between_several_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(two_images(), path := tmp_path / "net.onnx")
    options = ["--synthetic", "4", "--weight-bits", "8", "--no-reconstruct"]
    assert main(["sensitivity", str(path), *options]) == 0
    assert PREFIX not in capsys.readouterr().out
