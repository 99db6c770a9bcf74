"""Models are timed and judged at one size, and get images in a layout and in values that they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.data.image_set import ImageSet
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import OptionError
from onnxcompress.evaluation.accuracy import preprocessing
from onnxcompress.evaluation.compare import compare
from onnxcompress.runtime import latency
from onnxcompress.runtime.timed_inputs import timed_feeds
from tests.helpers.folding import graph, weight

OPEN = "c = Conv<pads=[1,1,1,1]>(x, w) g = GlobalAveragePool(c) y = Flatten(g)"


def sizes_open(size: str, **metadata: str) -> onnx.ModelProto:
    """A classifier whose input has such a height and width."""
    text = f"(float[N,3,{size}] x) => (float[N,4] y)"
    proto: onnx.ModelProto = graph(text, OPEN, {"w": weight(4, 3, 3, 3)})
    onnx.helper.set_model_props(proto, metadata)
    return proto


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (sizes_open("16,16"), sizes_open("h,w")),
        (sizes_open("h,w"), sizes_open("16,16")),
        (sizes_open("h,w", preprocessing="unit size=16"), sizes_open("h,w")),
        (sizes_open("h,w", preprocessing="unit size=16"), sizes_open("16,16")),
    ],
)
def test_models_are_timed_at_one_size(a: onnx.ModelProto, b: onnx.ModelProto) -> None:
    feeds = timed_feeds({"a": a, "b": b}, 2, 0, {})
    assert {name: f["x"].shape for name, f in feeds.items()} == {"a": (2, 3, 16, 16), "b": (2, 3, 16, 16)}


def test_models_are_timed_at_the_size_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def timed(models: Any, **options: Any) -> Any:
        seen.append(options["shapes"])
        return latency.benchmark(models, **options)

    monkeypatch.setattr("onnxcompress.evaluation.compare.benchmark", timed)
    images = ImageSet(np.zeros((4, 12, 10, 3), np.uint8), None, ("a",) * 4, Preprocess())
    compare(sizes_open("h,w"), sizes_open("h,w"), images=images, runs=2)
    assert seen == [{"x": (1, 3, 12, 10)}]


def test_a_fixed_batch_is_told_as_such() -> None:
    proto = sizes_open("h,w")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    images = ImageSet(np.zeros((4, 12, 10, 3), np.uint8), None, ("a",) * 4, Preprocess())
    with pytest.raises(OptionError, match="use batch 4"):
        compare(proto, proto, images=images, runs=2)


def test_images_are_brought_to_the_given_shape(tmp_path: Path) -> None:
    np.savez(tmp_path / "i.npz", x=np.zeros((8, 40, 40, 3), np.uint8), y=np.zeros(8, int))
    onnx.save(sizes_open("h,w"), tmp_path / "n.onnx")
    choice = preprocessing(str(tmp_path / "n.onnx"), None, {"x": (1, 3, 20, 20)})
    assert choice.preprocess.size == (20, 20)


@pytest.mark.parametrize("text", [None, "unit size=8"])
def test_channels_last_are_not_read_as_a_width(text: str | None) -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        net (float[N,h,w0,3] x) => (float[N,4] y) {
        g = ReduceMean<axes=[1,2], keepdims=0>(x) y = MatMul(g, v) }""")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight(3, 4), "v"))
    with pytest.raises(OptionError, match=r"takes \?x\?x3, with channels last; add layout=nhwc"):
        preprocessing(proto, text)
    assert preprocessing(proto, "unit layout=nhwc").preprocess.layout == "nhwc"


@pytest.mark.parametrize(
    ("kind", "text", "fits"),
    [
        ("int8", "raw", False),
        ("int8", "raw mean=128", True),
        ("int8", None, True),
        ("uint8", "raw", True),
        ("uint8", "raw mean=128", False),
    ],
)
def test_pixels_that_an_integer_does_not_hold_are_refused(kind: str, text: str | None, fits: bool) -> None:
    proto = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        net ({kind}[N,3,8,8] x) => (float[N,3,1,1] y) {{ f = Cast<to=1>(x) y = GlobalAveragePool(f) }}""")
    if fits:
        preprocessing(proto, text)
        return
    with pytest.raises(OptionError, match=rf"takes {kind} pixels, from .* use --preprocess 'raw"):
        preprocessing(proto, text)
