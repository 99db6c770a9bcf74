"""Model in, model out: nothing of the user's file is lost."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.graph.edit import remove_nodes, set_values, unique_name
from onnxcompress.graph.query import read
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import PROVENANCE, Model, load, save

BIG = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
"""Larger than what is kept in the skeleton."""


def tiny(**arrays: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N,40] x) => (float[N,30] y) '
        "{ p = MatMul(x, w) y = Relu(p) }"
    )
    for name, values in ({"w": BIG} | arrays).items():
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return proto


def text(name: str, *strings: bytes) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=TensorProto.STRING, dims=[len(strings)])
    tensor.string_data.extend(strings)
    return tensor


def through_file(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model after `load` and `save`; the two other ways must agree."""
    onnx.save(proto, folder / "in.onnx")
    model = load(folder / "in.onnx")
    save(model, folder / "out.onnx")
    after = onnx.load(folder / "out.onnx")
    assert model.to_proto() == after
    assert model.copy().to_proto() == after
    assert Model.from_proto(proto).to_proto() == after
    return after


def rich() -> onnx.ModelProto:
    """One model with all that a round trip through a graph library tends to lose."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, producer_name: "p", producer_version: "1", domain: "d", model_version: 7, '
        'doc_string: "model doc", opset_import: ["": 21, "my": 2, "unused.domain": 3]> '
        "g (float[N,40] x, bool k, float[K] unused_input) => "
        "(float[N,30] y, float[N,30] z, float[N,40] o) {"
        " p = MatMul(x, w) "
        " y = Relu(p) "
        " z = If(k) <then_branch = t () => (float[N,30] a) { a = Add(p, only_body) },"
        "  else_branch = e () => (float[N,30] b) { i = Neg(p) b = Identity(i) }> "
        ' o = my.Custom <mode = "m", floats = [1.0, 2.0], names = ["a", "b"]> (x, , w, ) '
        '} <domain: "my", opset_import: ["": 21], doc_string: "function doc"> '
        "Custom <mode, q: int = 3> (a, b, c) => (r) { r = Identity(a) }"
    )
    graph = proto.graph
    graph.initializer.append(numpy_helper.from_array(BIG, "w"))
    graph.initializer.append(numpy_helper.from_array(np.ones(30, np.float32), "only_body"))
    graph.initializer.append(numpy_helper.from_array(BIG, "never_used"))
    graph.initializer.append(helper.make_tensor("as_floats", TensorProto.FLOAT, [400], [0.5] * 400))
    graph.initializer.append(helper.make_tensor("as_ints", TensorProto.FLOAT16, [2], [0x3C00, 0x4000]))
    graph.initializer.append(text("text", b"a\xff", b"b"))
    graph.initializer[0].doc_string = "weight doc"
    graph.doc_string = "graph doc"
    graph.node[0].doc_string = "node doc"
    graph.node[0].name = graph.node[1].name = "the same name twice"
    graph.input[0].doc_string = "input doc"
    graph.input[0].type.denotation = "IMAGE"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.value_info.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 30], "info doc"))
    for holder in (proto, graph, graph.node[1], graph.initializer[0], graph.value_info[0], graph.input[0]):
        holder.metadata_props.add(key="key", value="value ü")
    quantization = graph.quantization_annotation.add(tensor_name="p")
    quantization.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="as_floats")
    sparse = graph.sparse_initializer.add(dims=[3, 4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.array([1.5], np.float32), "sparse"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([5], np.int64), "sparse_indices"))
    training = proto.training_info.add()
    training.algorithm.name = "training"
    training.initialization.name = "initialization"
    return proto


def test_everything_survives(tmp_path: Path) -> None:
    proto = rich()
    assert through_file(proto, tmp_path) == proto


def test_everything_else_survives_an_edit(tmp_path: Path) -> None:
    proto = rich()
    onnx.save(proto, tmp_path / "in.onnx")
    model = load(tmp_path / "in.onnx")
    weight = model.graph.nodes[0].inputs[1]
    set_values(weight, read(weight) * 2)
    model.touch()
    save(model, tmp_path / "out.onnx")
    after = onnx.load(tmp_path / "out.onnx")
    np.testing.assert_array_equal(numpy_helper.to_array(after.graph.initializer[0]), BIG * 2)
    after.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data
    assert after == proto


KINDS = [
    np.float16, np.float64, np.int8, np.uint16, np.int64, np.bool_, np.complex64,
    ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e5m2fnuz, ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float4_e2m1fn,
]  # fmt: skip


@pytest.mark.parametrize("size", [0, 3, 4001])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: np.dtype(k).name)
def test_types_of_initializers(kind: type, size: int, tmp_path: Path) -> None:
    values: np.ndarray = (np.arange(size) % 2).astype(kind)
    proto = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["": 23]> g (float[N] x) => (float[N] y, float[M] z) '
        "{ y = Relu(x) z = Cast <to = 1> (w) }"
    )
    proto.graph.initializer.append(numpy_helper.from_array(values, "w"))
    assert through_file(proto, tmp_path) == proto
    model = load(tmp_path / "in.onnx")  # and written anew, as by a pass
    constant = model.graph.nodes[1].inputs[0]
    set_values(constant, read(constant).copy())
    save(model, tmp_path / "new.onnx")
    (tensor,) = onnx.load(tmp_path / "new.onnx").graph.initializer
    assert tensor.data_type == proto.graph.initializer[0].data_type
    assert numpy_helper.to_array(tensor).tobytes() == values.tobytes()


@pytest.mark.parametrize(
    "attribute",
    [
        helper.make_attribute("a", np.float32(0.1).item()),
        helper.make_attribute("a", 3),
        helper.make_attribute("a", b"\xff\x00 no text"),
        helper.make_attribute("a", [b"\xff", b"ok"]),
        helper.make_attribute("a", [1.5, float("nan")]),
        helper.make_attribute("a", numpy_helper.from_array(BIG, "t")),
        helper.make_attribute("a", [numpy_helper.from_array(BIG, "t")]),
        helper.make_attribute("a", [], attr_type=onnx.AttributeProto.INTS),
        helper.make_attribute("a", helper.make_tensor_type_proto(TensorProto.FLOAT, ["N"])),
        helper.make_attribute("a", text("t", b"\xff")),
        helper.make_attribute(
            "a",
            helper.make_sparse_tensor(
                helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]),
                helper.make_tensor("i", TensorProto.INT64, [1], [2]),
                [4],
            ),
        ),
    ],
    ids=lambda a: onnx.AttributeProto.AttributeType.Name(a.type),
)
def test_attributes(attribute: onnx.AttributeProto, tmp_path: Path) -> None:
    proto = tiny()
    proto.opset_import.add(domain="my", version=1)
    node = proto.graph.node.add(op_type="Op", domain="my", input=["x"], output=["q"], overload="o")
    node.attribute.append(attribute)
    node.attribute[0].doc_string = "attribute doc"
    assert through_file(proto, tmp_path) == proto


def test_binary_string_in_a_body(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "my": 1]> g (float[N] x, bool k) => (float[N] y) '
        "{ y = If(k) <then_branch = t () => (float[N] a) { a = my.Op(x) },"
        " else_branch = e () => (float[N] b) { b = Neg(x) }> }"
    )
    body = next(a.g for a in proto.graph.node[0].attribute if a.name == "then_branch")
    body.node[0].attribute.append(helper.make_attribute("engine", b"\xff\xfe"))
    assert through_file(proto, tmp_path) == proto


def test_values_that_are_not_tensors(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        "g (seq(float[N]) s, optional(float[N]) p) => (float[N] y, seq(float[N]) t) "
        "{ i = Constant <value = int64 {0}> () y = SequenceAt(s, i) q = OptionalGetElement(p)"
        " t = SequenceInsert(s, q) }"
    )
    assert through_file(proto, tmp_path) == proto


def test_function_overloads(tmp_path: Path) -> None:
    proto = tiny()
    for overload in ("first", "second"):
        function = helper.make_function(
            "my", "f", ["a"], ["r"], [helper.make_node("Neg", ["a"], ["r"])], [helper.make_opsetid("", 17)]
        )
        function.overload = overload
        proto.functions.append(function)
    assert through_file(proto, tmp_path) == proto


@pytest.mark.parametrize("ir", [3, 8])
def test_initializers_listed_as_inputs(ir: int, tmp_path: Path) -> None:
    proto = tiny()
    proto.ir_version = ir
    info = helper.make_tensor_value_info("w", TensorProto.FLOAT, [40, 30])
    proto.graph.input.insert(0, info)
    assert through_file(proto, tmp_path) == proto
    model = Model.from_proto(proto)
    assert [t.name for t in model.graph.inputs] == ["x"]
    relu = model.graph.nodes[1]
    model.graph.outputs = [relu.inputs[0]]
    remove_nodes(model, [relu])
    assert [i.name for i in model.to_proto().graph.input] == ["w", "x"]


def test_initializer_that_is_an_output(tmp_path: Path) -> None:
    proto = tiny(c=np.ones(3, np.float32))
    proto.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [3]))
    proto.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 40]))
    assert through_file(proto, tmp_path) == proto


def test_no_opset_import(tmp_path: Path) -> None:
    proto = tiny()
    del proto.opset_import[:]
    assert through_file(proto, tmp_path) == proto
    assert load(tmp_path / "in.onnx").opset == 1


def test_properties() -> None:
    model = Model.from_proto(rich(), "rich.onnx")
    assert (model.opset, model.ir_version, model.producer, model.name) == (21, 10, "p 1", "rich.onnx")
    assert model.metadata == {"key": "value ü"}
    assert tensor_shapes(model)["p"] == ("N", 30)


def test_removed_tensors_take_their_entries_along() -> None:
    model = Model.from_proto(rich())
    nodes = [n for n in model.graph.nodes if n.op in ("MatMul", "Relu", "If")]
    model.graph.outputs = model.graph.outputs[2:]
    remove_nodes(model, nodes)
    graph = model.to_proto().graph
    assert [n.op_type for n in graph.node] == ["Custom"]
    assert not graph.value_info
    assert not graph.quantization_annotation
    assert [o.name for o in graph.output] == ["o"]
    assert [t.name for t in graph.initializer] == ["w", "never_used", "as_floats", "as_ints", "text"]


def test_unique_name_knows_bodies_and_unused_initializers() -> None:
    model = Model.from_proto(rich())
    for taken in ("x", "p", "i", "b", "never_used", "unused_input", "sparse"):
        assert unique_name(model, taken) != taken
    assert unique_name(model, "free") == "free"


def test_metadata() -> None:
    model = Model.from_proto(rich())
    model.set_metadata("new", "1")
    model.set_metadata("key", "2")
    assert model.metadata == {"key": "2", "new": "1"}
    model.set_metadata("key", None)
    assert Model.from_proto(model.to_proto()).metadata == {"new": "1"}


def test_copies_are_independent(tmp_path: Path) -> None:
    onnx.save(tiny(), tmp_path / "in.onnx")
    model = load(tmp_path / "in.onnx")
    twin = model.copy()
    weight = twin.graph.nodes[0].inputs[1]
    set_values(weight, np.zeros_like(BIG))
    twin.graph.nodes[1].op = "Neg"
    twin.set_metadata("k", "v")
    twin.touch()
    again = twin.copy()
    assert model.to_proto() == tiny()
    for one in (twin, again):
        proto = one.to_proto()
        assert proto.graph.node[1].op_type == "Neg"
        assert proto.metadata_props[0].key == "k"
        assert not numpy_helper.to_array(proto.graph.initializer[0]).any()


def test_later_changes_of_the_proto_are_not_seen() -> None:
    proto = tiny()
    model = Model.from_proto(proto)
    digest = model.digest()
    proto.graph.node[1].op_type = "Neg"
    proto.graph.initializer[0].raw_data = b""
    assert model.to_proto() == tiny()
    assert Model.from_proto(tiny()).digest() == digest == model.digest()


def test_small_tensors_that_were_only_looked_at_stay_as_they_were() -> None:
    proto = rich()
    proto.graph.node.add(op_type="Shape", input=["as_ints"], output=["s1"])
    proto.graph.initializer[-1].string_data[0] = "ä".encode()
    proto.graph.node.add(op_type="Shape", input=["text"], output=["s2"])
    model = Model.from_proto(proto)
    for node in model.graph.nodes[-2:]:
        assert node.inputs[0].values is not None  # graphsurgeon now holds an array
    assert model.to_proto() == proto


def test_new_string_tensor(tmp_path: Path) -> None:
    proto = rich()
    proto.graph.node.add(op_type="Shape", input=["text"], output=["s"])
    model = Model.from_proto(proto)
    set_values(model.graph.nodes[-1].inputs[0], np.array(["new", "text"], object))
    save(model, tmp_path / "out.onnx")
    tensors = {t.name: t for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert list(tensors["text"].string_data) == [b"new", b"text"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_digest_is_that_of_the_file(tmp_path: Path) -> None:
    onnx.save(rich(), tmp_path / "in.onnx")
    model = load(tmp_path / "in.onnx")
    assert model.digest() == sha256(tmp_path / "in.onnx")
    assert model.copy().digest() == model.digest()
    assert model.digest() == sha256(tmp_path / "in.onnx")
    model.set_metadata("k", "v")
    save(model, tmp_path / "out.onnx")
    assert model.digest() == sha256(tmp_path / "out.onnx") != sha256(tmp_path / "in.onnx")
    weight = model.graph.nodes[0].inputs[1]
    set_values(weight, BIG * 3)
    model.touch()
    save(model, tmp_path / "out.onnx")
    assert model.digest() == sha256(tmp_path / "out.onnx")


def test_provenance(tmp_path: Path) -> None:
    model = Model.from_proto(tiny())
    model.add_provenance("first", {"a": 1}, "00")
    model.add_provenance("second", {}, "11")
    save(model, tmp_path / "out.onnx")
    entries = load(tmp_path / "out.onnx").provenance()
    assert [(e["pass"], e["options"], e["input_sha256"]) for e in entries] == [
        ("first", {"a": 1}, "00"),
        ("second", {}, "11"),
    ]
    for broken in ("{", json.dumps({"not": "a list"})):
        model.set_metadata(PROVENANCE, broken)
        assert model.provenance() == []
