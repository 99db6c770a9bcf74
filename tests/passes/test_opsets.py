"""Old operator sets: converted to the lowest that a pass needs, compared, noted; nothing is lost by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxcompress.account import Change
from onnxcompress.cli.main import main
from onnxcompress.errors import ModelError
from onnxcompress.model import Model
from onnxcompress.passes import opsets
from onnxcompress.passes.base import Pass, run
from onnxcompress.passes.calibrate import Calibrate
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.opsets import converted
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.quantize import Quantize
from onnxcompress.runtime.inference import run as outputs
from tests.helpers.folding import feeds, graph, weight

SIGNATURE = "(float[N,3,8,8] x) => (float[N,4] y)"
BODY = """c = Conv<pads = [1,1,1,1]>(x, w) r = Clip<min = 0.0, max = 6.0>(c) u = Unsqueeze<axes = [4]>(r)
    s = Squeeze<axes = [4]>(u) p = ReduceSum<axes = [2,3], keepdims = 0>(s) l = Softmax(p)
    y = MatMul(l, m)"""
CLIPPED = BODY.replace("Clip<min = 0.0, max = 6.0>(c)", "Clip(c, low, high)")
ARRAYS = {"w": weight(8, 3, 3, 3), "m": weight(8, 4)}
BOUNDS = {"low": np.float32(0), "high": np.float32(6)}


def network(opset: int) -> onnx.ModelProto:
    arrays = ARRAYS if opset < 11 else {**ARRAYS, **BOUNDS}
    return graph(SIGNATURE, BODY if opset < 11 else CLIPPED, arrays, opset=opset)


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12])
@pytest.mark.parametrize("lowest", [13, 21])
def test_outputs_stay(opset: int, lowest: int) -> None:
    proto = network(opset)
    made = converted(Model.from_proto(proto), lowest).to_proto()
    onnx.checker.check_model(made, full_check=True)
    assert [o.version for o in made.opset_import] == [lowest]
    x = feeds(proto)
    np.testing.assert_allclose(outputs(made, x)["y"], outputs(proto, x)["y"], atol=1e-6)


def test_nothing_else_is_lost() -> None:
    proto = network(9)
    proto.producer_name, proto.model_version, proto.doc_string = "someone", 7, "a network"
    proto.graph.doc_string = "its graph"
    helper.set_model_props(proto, {"author": "someone"})
    for at, node in enumerate(proto.graph.node):
        node.name, node.doc_string = f"node {at}", f"does {node.op_type}"
    proto.graph.value_info.append(
        helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, ["N", 8, "H", "W"])
    )
    proto.opset_import.append(helper.make_opsetid("com.example", 3))
    made = converted(Model.from_proto(proto), 13).to_proto()
    for field in ("ir_version", "producer_name", "model_version", "doc_string", "metadata_props"):
        assert getattr(made, field) == getattr(proto, field)
    for field in ("input", "output", "value_info", "doc_string", "name"):
        assert getattr(made.graph, field) == getattr(proto.graph, field)
    assert [(o.domain, o.version) for o in made.opset_import] == [("", 13), ("com.example", 3)]
    notes = {n.output[0]: (n.name, n.doc_string) for n in made.graph.node}
    for node in proto.graph.node:
        if node.op_type != "Softmax":  # three nodes stand for it
            assert notes[node.output[0]] == (node.name, node.doc_string)
    named = [n.name for n in made.graph.node if n.name]
    assert len(named) == len(set(named))
    kept = {t.name for t in made.graph.initializer}
    assert {"w", "m"} <= kept


def test_a_pass_says_so_and_goes_no_higher_than_it_must() -> None:
    cases: list[tuple[Pass, int, int]] = [
        (Quantize(synthetic=8), 9, 13),
        (Quantize(synthetic=8, per_channel=False), 9, 10),
        (Quantize(synthetic=8, per_channel=False, activation_bits=4), 9, 11),
        (Prune(reconstruct=False, storage="sparse"), 9, 11),
        (HalfPrecision(provider="cpu", threads=1), 8, 9),
    ]
    for one, old, new in cases:
        model = Model.from_proto(network(old))
        (result,) = run([one], model)
        assert model.opset == new, one
        assert result.changes[0] == Change(model.name, f"converted from opset {old} to {new}")


@pytest.mark.parametrize(("per_channel", "opset"), [(False, 12), (False, 11), (True, 13)])
def test_what_is_high_enough_stays(per_channel: bool, opset: int) -> None:
    model = Model.from_proto(network(min(opset, 12)))
    model = model if opset < 13 else converted(model, opset)
    (result,) = run([Quantize(synthetic=8, per_channel=per_channel)], model)
    assert model.opset == opset
    assert not any("opset" in change.what for change in result.changes)
    assert (result.figures.output_snr_db or {})["y"] > 15


def test_a_model_that_nothing_changes_in_stays_old() -> None:
    proto = graph("(float[N,3] x) => (float[N,3] y)", "y = Relu(x)", {}, opset=9)
    model = Model.from_proto(proto)
    (result,) = run([Quantize()], model)
    assert not result.modified
    assert model.to_proto() == proto


def test_a_pass_that_needs_no_more_than_seven_converts_nothing() -> None:
    model = Model.from_proto(network(7))
    (result,) = run([Calibrate(inputs="procedural", synthetic=4)], model)
    assert model.opset == 7
    assert not any("opset" in change.what for change in result.changes)


def test_a_conversion_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
        made = onnx.ModelProto()
        made.CopyFrom(proto)
        made.graph.node[0].attribute.append(helper.make_attribute("strides", [1, 1]))
        made.graph.node[0].attribute.append(helper.make_attribute("dilations", [2, 2]))
        made.graph.node[0].attribute[0].ints[:] = [2, 2, 2, 2]
        return made

    monkeypatch.setattr(onnx.version_converter, "convert_version", wrong)
    proto = graph(SIGNATURE.replace("float[N,4]", "float[N,8,8,8]"), "y = Conv<pads = [1,1,1,1]>(x, w)",
                  {"w": ARRAYS["w"]}, opset=12)  # fmt: skip
    with pytest.raises(ModelError, match="output 'y' would differ"):
        converted(Model.from_proto(proto), 13)
    onnx.save(proto, tmp_path / "net.onnx")
    assert main(["quantize", str(tmp_path / "net.onnx"), str(tmp_path / "out.onnx")]) == 1
    assert "net.onnx: it has opset 12, 13 is needed" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()


def test_open_sizes_are_tried_until_one_runs() -> None:
    proto = graph("(float[N,3,H,W] x) => (float[N,8,A,B] y)", "y = Conv(x, w)", {"w": weight(8, 3, 65, 65)})
    proto.opset_import[0].version = 12
    assert opsets.OPEN_SIZES[0] < 65
    assert converted(Model.from_proto(proto), 13).opset == 13
