"""Activations of more than 8 bits: in 16-bit types, nearer to the original, with biases that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.model import Model, load
from onnxcompress.passes.base import run
from onnxcompress.passes.quantize import Quantize
from onnxcompress.runtime.inference import random_feeds
from onnxcompress.runtime.inference import run as run_model
from tests.helpers.folding import graph, weight

FEW: dict[str, Any] = {"synthetic": 16, "inputs": "procedural", "effort": "fast"}


@pytest.mark.parametrize(
    ("bits", "kind", "stored"),
    [(16, "uint8", np.uint16), (16, "int8", np.int16), (12, "uint8", np.uint16), (8, "uint8", np.uint8)],
)
def test_activations_are_stored_in_the_smallest_type_that_holds_them(
    bits: int, kind: Any, stored: type, models: Path
) -> None:
    model = load(models / "resnet20-fashion.onnx")
    (result,) = run([Quantize(activation_bits=bits, activation_type=kind, **FEW)], model)
    quantizers = [n for n in model.graph.nodes if n.op == "QuantizeLinear"]
    assert {n.inputs[2].dtype.type for n in quantizers} == {stored}  # sums and pools, too
    assert any(n.op == "Clip" for n in model.graph.nodes) == (bits == 12)
    opset = next(o.version for o in model.to_proto().opset_import if not o.domain)
    assert opset >= 21 if bits > 8 else opset < 21
    onnx.checker.check_model(model.to_proto(), full_check=True)
    noise = min((result.figures.output_snr_db or {}).values())
    assert noise > (40 if bits > 8 else 25)


def test_a_bias_beyond_int32_stays_a_float() -> None:
    """The bias is a million times the products: as int32 with a 16-bit scale it would be cut off."""
    arrays = {"w": weight(2, 2, 1, 1), "b": np.array([1e6, -3e6], np.float32)}
    proto = graph("(float[N,2,8,8] x) => (float[N,2,8,8] y)", "y = Conv(x, w, b)", arrays)
    model = Model.from_proto(proto)
    Quantize(activation_bits=16, **FEW).apply(model)
    feeds = random_feeds(model)
    was, now = (run_model(one, feeds)["y"] for one in (Model.from_proto(proto), model))
    assert np.abs(was - now).max() < 2.0
