"""Outputs that are collected batch by batch: each image's rows in their place, or a word."""

from __future__ import annotations

import onnx.parser
import pytest
import torch
from torch import Tensor

from onnxcompress.model import Model
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.executor import ExecutionError


def collected(body: str, count: int = 6, batch: int = 4, kept_as: torch.dtype | None = None) -> Tensor:
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        net (float[N,2] x) => (float[M,K] y) {{ {body} }}""")
    x = torch.arange(2.0 * count).reshape(count, 2)
    executor = Executor.from_model(Model.from_proto(model))
    return executor.run_batched({"x": x}, ["y"], count=count, batch=batch, kept_as=kept_as)["y"]


def test_rows_of_each_image_are_in_their_place() -> None:
    assert collected("y = Relu(x)").tolist() == torch.arange(12.0).reshape(6, 2).tolist()
    split = "s = Constant<value = int64[2] {-1, 1}>() y = Reshape(x, s)"
    assert collected(split).flatten().tolist() == list(range(12))
    assert collected("y = Relu(x)", kept_as=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("y = ReduceSum<keepdims = 1>(x)", id="one row"),
        pytest.param("y = ReduceSum<keepdims = 0>(x)", id="no row"),
        pytest.param("s = Constant<value = int64[2] {-1, 4}>() y = Reshape(x, s)", id="half a row each"),
        pytest.param("t = Transpose(x) y = Relu(t)", id="images last"),
        pytest.param("c = Constant<value = float[4,2] {1,1,1,1,1,1,1,1}>() y = Relu(c)", id="constant"),
        pytest.param("y = ReduceMax<axes = [0], keepdims = 1>(x)", id="over images"),
    ],
)
@pytest.mark.parametrize(("count", "batch"), [(6, 4), (5, 4)])
def test_images_that_are_mixed_are_no_memory_that_nobody_wrote(body: str, count: int, batch: int) -> None:
    with pytest.raises(ExecutionError, match=r"'y'.* does not hold one image after the other"):
        collected(body, count, batch)
