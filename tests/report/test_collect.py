"""Facts that the report collects: bytes of weights by layer, and sample images."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from onnxcompress.data.contact_sheet import GAP
from onnxcompress.data.image_set import ImageSet
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.model import Model
from onnxcompress.report.collect import layer_sizes, pictures
from onnxcompress.report.run_data import LayerSize
from tests.helpers.folding import graph, weight


def network(quantized: bool) -> Model:
    """Two convolutions with one weight, a third with one of its own, and constants of other operators."""
    arrays = {"w": weight(4, 4, 1, 1), "b": weight(4), "v": weight(4, 4, 3, 3), "c": weight(1, 4, 1, 1)}
    body = "d = Conv(x, w, b) e = Conv(d, w) f = Add(e, c) g = Mul(f, c) y = Conv(g, {v})"
    head = ""
    if quantized:
        arrays |= {"v": np.ones((4, 4, 3, 3), np.int8), "s": np.float32(0.5).reshape(())}
        head = "k = DequantizeLinear(v, s)"
    text = f"{head} {body.format(v='k' if quantized else 'v')}"
    return Model.from_proto(graph("(float[N,4,8,8] x) => (float[N,4,6,6] y)", text, arrays))


def test_bytes_count_for_the_first_layer_that_reads_them() -> None:
    rows = layer_sizes(network(False), network(True))
    assert rows == [
        LayerSize("d", 4 * (16 + 4), 4 * (16 + 4)),
        LayerSize("y", 4 * 144, 144 + 4),  # its integers, and their scale
        LayerSize("all Add nodes", 16, 16, layer=False),
    ]
    assert layer_sizes(network(False))[1] == LayerSize("y", 4 * 144, None)


@pytest.mark.parametrize(("count", "shown"), [(40, 16), (5, 5)])
def test_images_are_shown_from_the_first_to_the_last(count: int, shown: int) -> None:
    x = np.broadcast_to(np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1), (count, 96, 96, 1))
    images = ImageSet(np.ascontiguousarray(x), None, ("",) * count, Preprocess(mean=(0.5,)))
    found = pictures("Seen", images)
    assert found.text == f"{shown} of {count} images, 96×96 pixels, before they are normalized."
    sheet = np.asarray(Image.open(io.BytesIO(found.png)))
    middles = sheet[GAP + 48 :: 96 + GAP, GAP + 48 :: 96 + GAP].ravel().tolist()
    assert middles[:shown] == np.linspace(0, count - 1, shown).astype(int).tolist()
