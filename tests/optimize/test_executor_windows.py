"""Windows and Resize where onnxruntime differs from a plain reading of the standard."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from onnxcompress.model import Model
from onnxcompress.optimize.executor import Executor
from tests.helpers.folding import graph

BODIES = {
    "resize that is 13 in float32": "y = Resize<mode='nearest'>(x, , s)",
    "resize to its own size": "y = Resize<mode='linear'>(x, , t)",
    "resize by corners": "y = Resize<mode='linear', {by}='align_corners'>(x, , u)",
    "resize to one": "y = Resize<mode='cubic', {by}='pytorch_half_pixel'>(x, , o)",
    "resize at the edge of a cell": "y = Resize<mode='nearest', nearest_mode='floor'>(x, , p)",
    "transposed, less than its stride": "y = ConvTranspose<strides=[3,3], auto_pad='SAME_UPPER'>(x, v)",
    "transposed, odd": "y = ConvTranspose<strides=[3,3], auto_pad='SAME_LOWER', dilations=[2,2]>(x, w)",
    "transposed to a size": "y = ConvTranspose<strides=[3,3], output_shape=[23,23]>(x, w)",
    "pool of one with steps": "y = MaxPool<kernel_shape=[1,1], strides=[3,3], auto_pad='SAME_UPPER'>(x)",
    "pool of one, lower": "y = MaxPool<kernel_shape=[1,1], strides=[3,3], auto_pad='SAME_LOWER'>(x)",
    "dilated pool": "y = MaxPool<kernel_shape=[3,3], dilations=[2,2], auto_pad='SAME_UPPER'>(x)",
    "no auto_pad": "y = Conv<auto_pad='', pads=[1,1,1,1]>(x, w)",
}
SCALES = {"s": 13 / 7, "t": 1.1, "u": 0.6, "o": 0.2, "p": 0.6}


@pytest.mark.parametrize("which", BODIES)
def test_the_executor_computes_what_onnxruntime_does(which: str) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"w": rng.normal(size=(2, 2, 3, 3)), "v": rng.normal(size=(2, 2, 2, 2))}
    arrays |= {name: np.array([1, 1, scale, scale]) for name, scale in SCALES.items()}
    body = BODIES[which].replace("'", '"').replace("{by}", "coordinate_transformation_mode")
    used = {name: v.astype(np.float32) for name, v in arrays.items() if f" {name})" in body}
    proto: onnx.ModelProto = graph("(float[1,2,h,w0] x) => (float[1,2,p0,q0] y)", body, used)
    x = rng.normal(size=(1, 2, 7, 7)).astype(np.float32)
    (expected,) = ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})
    found = Executor.from_model(Model.from_proto(proto)).run({"x": torch.from_numpy(x)}, ["y"])["y"]
    assert found.shape == expected.shape
    assert np.abs(found.detach().numpy() - expected).max() < 1e-5
