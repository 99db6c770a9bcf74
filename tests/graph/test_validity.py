"""Between passes the model is checked: a pass that breaks it is named, a broken file is not refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxcompress.account import Change
from onnxcompress.errors import ModelError
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.graph.validity import fault
from onnxcompress.model import Model, load
from onnxcompress.model.model_like import input_specs
from onnxcompress.passes.base import Pass, PassResult, run
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.pipeline import Pipeline
from onnxcompress.progress import Progress, silent

TEXT = """
<ir_version: 8, opset_import: ["": 17]>
g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y)
<float[2, 2, 1, 1] w = {1, 0, 0, 1}>
{
  [conv] c = Conv(x, w)
  [relu] y = Relu(c)
}
"""


def out_of_order(model: Model) -> None:
    model.graph.nodes.reverse()


def one_channel_more(model: Model) -> None:
    weight = next(n for n in model.graph.nodes if n.op == "Conv").inputs[1]
    weight.values = np.ones((3, 2, 1, 1), np.float32)


def no_such_attribute(model: Model) -> None:
    model.graph.nodes[0].attrs["colour"] = 1


BREAKS: list[Callable[[Model], None]] = [out_of_order, one_channel_more, no_such_attribute]


@dataclass(frozen=True)
class Break(Pass):
    """Break the model in one of the ways."""

    name: ClassVar[str] = "break"
    way: int = 0

    def apply(self, model: Model, progress: Progress = silent) -> PassResult[None]:
        BREAKS[self.way](model)
        model.touch()
        return PassResult([Change("model", "broken")])


@pytest.mark.parametrize("way", range(len(BREAKS)))
def test_a_pass_that_breaks_the_model_is_named(way: int) -> None:
    model = Model.from_proto(onnx.parser.parse_model(TEXT), "net.onnx")
    with pytest.raises(
        ModelError, match=r"^net.onnx: break made an invalid model of a valid one \(\[?\w"
    ) as said:
        run([Break(way)], model)
    assert "\n" not in str(said.value)


def test_in_a_chain_its_place_is_told(models: Path) -> None:
    chain = Pipeline([FoldBatchNorm(), Break(2)])
    with pytest.raises(ModelError, match=r"^pass 2 of 2, break: .* made an invalid model"):
        chain.run(load(models / "resnet20-fashion.onnx"))


def test_a_model_that_was_invalid_is_not_held_against_a_pass() -> None:
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.node[1].attribute.append(onnx.helper.make_attribute("colour", 1))
    model = Model.from_proto(proto)
    assert "colour" in (fault(model) or "")
    run([Break(0)], model)


def test_the_shipped_networks_are_valid_before_and_after(models: Path) -> None:
    for file in sorted(models.glob("*.onnx")):
        model = load(file)
        assert fault(model) is None
        run([FoldBatchNorm()], model)
        assert fault(model) is None


def test_a_type_that_there_is_not_is_a_fault() -> None:
    """Of which the checker says something else than of other faults."""
    text = "net (float[2] x) => (uint8[2] y) <float s = {1}, uint8 z = {0}> { y = QuantizeLinear(x, s, z) }"
    proto = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]> {text}""")
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UNDEFINED
    assert "data type 0" in (fault(Model.from_proto(proto, "net")) or "")


@pytest.mark.parametrize("index", [-(2**63), -3, 2, 2**62])
def test_a_size_that_there_is_not_is_not_looked_up(index: int) -> None:
    text = (
        f"""net (float[2, 3] x) => (int64 y) <int64 i = {{{index}}}> {{ s = Shape(x) y = Gather(s, i) }}"""
    )
    proto = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]> {text}""")
    assert "y" in tensor_shapes(Model.from_proto(proto, "net"))


@pytest.mark.parametrize("kind", [-1, 0, 99])
def test_an_input_of_a_type_that_there_is_not_is_refused(kind: int) -> None:
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.input[0].type.tensor_type.elem_type = kind
    with pytest.raises(ModelError, match=f"type {'undefined' if kind == 0 else kind} is not handled"):
        input_specs(proto)
