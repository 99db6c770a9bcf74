"""Sizes that are chosen for dimensions which a file leaves open."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.data.input_shapes import sized
from onnxcompress.errors import CompressWarning
from onnxcompress.model import Shape
from onnxcompress.model.model_like import InputSpec


@pytest.mark.filterwarnings("error::onnxcompress.errors.CompressWarning")
def test_closed_shapes_stay_and_images_give_their_size() -> None:
    closed = InputSpec("x", np.dtype(np.float32), ("N", 3, 32, 48))
    assert sized(closed, None, "net") == ("N", 3, 32, 48)
    for shape, expected in (
        (("N", 3, "H", "W"), ("N", 3, 10, 20)),
        (("N", "H", "W", 3), ("N", 10, 20, 3)),
    ):
        spec = InputSpec("x", np.dtype(np.float32), shape)
        assert sized(spec, None, "net", size=(10, 20)) == expected


@pytest.mark.parametrize(
    ("shape", "metadata", "expected"),
    [
        (("N", 3, "H", "W"), "", ("N", 3, 224, 224)),
        (("N", None, "H", "W"), "320", ("N", 3, 320, 320)),
        (("N", "H", "W", 3), "[96, 128]", ("N", 96, 128, 3)),
        (("N", 3, 48, "W"), "", ("N", 3, 48, 320)),  # a line of text
        (("N", 3, 96, "W"), "", ("N", 3, 96, 320)),
        (("N", 3, 128, "W"), "", ("N", 3, 128, 128)),
        (("N", "L"), "", ("N", 1024)),
        (("N", 80, "L"), "320", ("N", 80, 1024)),
        (("N", 1, "D", "H", "W"), "", ("N", 1, 16, 16, 16)),
        (("N", None, 8, "H", "W"), "", ("N", 3, 8, 16, 16)),
        (("N", "N", "L"), "", ("N", "N", 1024)),  # the batch, twice
    ],
)
def test_usual_sizes(shape: Shape, metadata: str, expected: Shape) -> None:
    spec = InputSpec("x", np.dtype(np.float32), shape)
    with pytest.warns(CompressWarning, match="leaves sizes open"):
        assert sized(spec, None, "net", metadata={"imgsz": metadata}) == expected
