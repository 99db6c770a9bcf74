"""Open height and width: sizes are said, chosen or taken from images, and stay open in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxcompress.data.input_shapes import parse_input_shapes
from onnxcompress.errors import CompressWarning, OptionError
from onnxcompress.graph.blocks import find_blocks
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model, load, save
from onnxcompress.model.model_like import input_specs
from onnxcompress.optimize.calibration import InputRequest, assume_sizes, gather_inputs
from onnxcompress.passes.base import run
from onnxcompress.passes.quantize import Quantize
from onnxcompress.runtime.inference import run as run_model
from tests.helpers.folding import graph, weight
from tests.robustness.test_input_kinds import BLOCK, HEAD, arrays, block_model


def open_model() -> Model:
    return block_model("open")


@pytest.mark.slow
def test_open_sizes_are_said_aloud_and_stay_open() -> None:
    model = open_model()
    with pytest.warns(
        CompressWarning,
        match="it is run at 1x3x224x224, a usual size: choose another with --input-shape x=",
    ):
        (result,) = run([Quantize(synthetic=4)], model)
    assert result.input_shape == {"x": ("N", 3, 224, 224)}
    assert result.measured_json()["input_shape"] == {"x": ["N", 3, 224, 224]}
    proto = model.to_proto()
    dims = [d.dim_param for d in proto.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["N", "", "H", "W"]
    assert not model.assumed
    for side in (8, 24):  # it runs at any size as the float network does
        x = {"x": np.random.default_rng(0).random((1, 3, side, side)).astype("f4")}
        a, b = run_model(open_model(), x)["y"], run_model(model, x)["y"]
        assert a.shape == b.shape == (1, 4, side // 2, side // 2)
        assert np.abs(a - b).mean() < 0.05


@pytest.mark.filterwarnings("error::onnxcompress.errors.CompressWarning")
@pytest.mark.parametrize(
    "request_",
    [
        InputRequest(input_shape="x=1x3x16x24"),
        InputRequest(input_shape="1x3x16x24"),
        InputRequest(preprocess="size=16x24"),
    ],
)
def test_sizes_that_are_said_are_taken(request_: InputRequest) -> None:
    model = open_model()
    assume_sizes(model, request_)
    assert tensor_shapes(model)["y"] == (1, 4, 8, 12)
    assert model.graph.inputs[0].shape[2:] == ["H", "W"]


def test_sizes_follow_images_and_metadata(tmp_path: Path) -> None:
    model = open_model()
    np.savez(tmp_path / "images.npz", x=np.zeros((4, 12, 20, 3), np.uint8))
    assume_sizes(model, InputRequest(str(tmp_path / "images.npz")))
    assert model.assumed["x"][2:] == (12, 20)
    model.set_metadata("imgsz", "[32, 48]")
    with pytest.warns(CompressWarning, match="1x3x32x48, the size in its metadata"):
        assume_sizes(model, InputRequest())
    line = graph("(float[N,3,48,W] x) => (float[N,8,48,W] y)", "y = Conv<pads=[1,1,1,1]>(x, w)", arrays())
    with pytest.warns(CompressWarning, match="1x3x48x320, a usual size"):
        assume_sizes(Model.from_proto(line), InputRequest())


def test_usual_size_is_one_at_which_the_network_runs() -> None:
    body = f"{HEAD} p = AveragePool<kernel_shape=[48,4], strides=[48,4]>(r) q = Squeeze(p, two) y = Relu(q)"
    line = graph("(float[N,3,H,W] x) => (float[N,8,L] y)", body, arrays(two=[2]))
    with pytest.warns(CompressWarning, match="1x3x48x320, a usual size"):
        assume_sizes(Model.from_proto(line), InputRequest())


def test_real_images_are_brought_to_the_shape_that_is_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", x=np.zeros((4, 40, 40, 3), np.uint8))
    request = InputRequest(str(tmp_path / "images.npz"), input_shape="1x3x16x16")
    assert gather_inputs(open_model(), request).images.array().shape == (4, 3, 16, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1x4x16x16", "expected the shape Nx3xHxW, got 1x4x16x16"),
        ("1x3x16", "expected the shape"),
        ("z=1x3x16x16", "the model's inputs are x"),
    ],
)
def test_shape_that_contradicts_the_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        assume_sizes(open_model(), InputRequest(input_shape=text))


def test_shapes_are_read() -> None:
    assert parse_input_shapes("a=1x3, b=2x2") == {"a": (1, 3), "b": (2, 2)}
    assert parse_input_shapes(None) == {}


def test_block_of_a_network_with_open_sizes_is_one_at_any_size() -> None:
    """A stride of 2 keeps a size of 1, and 2x up is undone by 2x down; only the latter holds everywhere."""
    body = f"{BLOCK} d = Conv<strides=[2,2], pads=[1,1,1,1]>(q, t) y = Sigmoid(d)"
    values = {"u": weight(8, 8, 3, 3, seed=2), "t": weight(8, 8, 3, 3, seed=3)}
    model = Model.from_proto(graph("(float[N,3,H,W] x) => (float[N,8,H2,W2] y)", body, arrays() | values))
    assume_sizes(model, InputRequest(input_shape="1x3x1x1"))
    assert tensor_shapes(model)["d"] == tensor_shapes(model)["q"]
    names = [block.exit for block in find_blocks(model).blocks]
    assert "a" in names
    assert "d" not in names


def test_size_dependent_constants_are_not_written() -> None:
    """A target computed from the shape must not become the number that it has at the assumed size."""
    rows = "n = Slice(s, zero, one) l = Concat<axis=0>(n, e)"
    body = f"{HEAD} s = Shape(r) {rows} f = Reshape(r, l) y = Relu(f)"
    values = arrays(zero=[0], one=[1], e=[-1])
    model = Model.from_proto(graph("(float[N,3,H,W] x) => (float[N,F] y)", body, values))
    run([Quantize(synthetic=4, input_shape="1x3x8x8")], model)
    for side in (8, 16):
        x = np.random.default_rng(0).random((2, 3, side, side)).astype("f4")
        assert run_model(model, {"x": x})["y"].shape == (2, 8 * side * side)


def test_file_keeps_what_it_says(tmp_path: Path) -> None:
    save(open_model(), tmp_path / "open.onnx")
    model = load(tmp_path / "open.onnx")
    assume_sizes(model, InputRequest(input_shape="1x3x8x8"))
    assert model.copy().assumed == model.assumed
    assert [s.shape for s in input_specs(model)] == [("N", 3, 8, 8)]
    assert model.digest() == load(tmp_path / "open.onnx").digest()
