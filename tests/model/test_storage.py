"""External data, broken files, and output that is whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from onnxcompress.errors import ModelError
from onnxcompress.graph.edit import set_values
from onnxcompress.graph.query import read
from onnxcompress.model import Model, load, protobuf_stream, save, tensor_storage
from onnxcompress.model.envelope import nested_tensors
from onnxcompress.pipeline.cache_keys import model_file_digest
from tests.model.test_model import BIG, rich, tiny


def external(folder: Path, proto: onnx.ModelProto) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "in.onnx"
    onnx.save(
        onnx.ModelProto.FromString(proto.SerializeToString()), path, save_as_external_data=True,
        location="weights.bin", size_threshold=0, convert_attribute=True,
    )  # fmt: skip
    return path


def test_external_data(tmp_path: Path) -> None:
    path = external(tmp_path / "a", tiny(small=np.ones(3, np.float32)))
    (tmp_path / "b").mkdir()
    model = load(path)
    assert model.external_data
    save(model, tmp_path / "b" / "out.onnx")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["out.onnx", "out.onnx.data"]
    assert (tmp_path / "b" / "out.onnx").stat().st_size < 1000
    after = onnx.load(tmp_path / "b" / "out.onnx")
    for tensor, before in zip(after.graph.initializer, tiny().graph.initializer, strict=False):
        assert tensor.name == before.name
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), numpy_helper.to_array(before))
    save(load(tmp_path / "b" / "out.onnx"), tmp_path / "b" / "out.onnx")  # over itself
    np.testing.assert_array_equal(
        numpy_helper.to_array(onnx.load(tmp_path / "b" / "out.onnx").graph.initializer[0]), BIG
    )


def test_external_data_of_attributes_and_bodies(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (bool k) => (float[40,30] y, float[40,30] z) { '
        " y = If(k) <then_branch = t () => (float[40,30] a) { a = Identity(inner) },"
        "  else_branch = e () => (float[40,30] b) { b = Neg(z) }> }"
    )
    constant = helper.make_node("Constant", [], ["z"], value=numpy_helper.from_array(BIG, "v"))
    proto.graph.node.insert(0, constant)
    body = next(a.g for a in proto.graph.node[1].attribute if a.name == "then_branch")
    body.initializer.append(numpy_helper.from_array(BIG, "inner"))
    path = external(tmp_path / "a", proto)
    save(load(path), tmp_path / "out.onnx")
    after = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert [t.ByteSize() for t in nested_tensors(after.graph)] == [
        t.ByteSize() for t in nested_tensors(proto.graph)
    ]
    for tensor in nested_tensors(after.graph):
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), BIG)
    before = model_file_digest(path)
    assert load(path).external_files == {path.parent.resolve() / "weights.bin"}
    (path.parent / "weights.bin").write_bytes(bytes((path.parent / "weights.bin").stat().st_size))
    assert model_file_digest(path) != before  # kept results of other weights are not taken


def test_proto_with_external_data(tmp_path: Path) -> None:
    path = external(tmp_path, tiny())
    with pytest.raises(ModelError, match="'w' lies in external data; load the file instead"):
        Model.from_proto(onnx.load(path, load_external_data=False))


def set_entry(path: Path, key: str, value: str) -> None:
    proto = onnx.load(path, load_external_data=False)
    entries = proto.graph.initializer[0].external_data
    next(e for e in entries if e.key == key).value = value
    onnx.save(proto, path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "missing.bin", "missing"),
        ("location", "../secret.bin", "outside"),
        ("location", "/etc/passwd", "outside"),
        ("location", ".", "outside"),
        ("length", "999999", "cut short"),
        ("offset", "-4", "cut short"),
        ("offset", "four", "broken offset"),
        ("length", "4", "needs 4800 bytes"),
    ],
)
def test_broken_external_data(key: str, value: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(5000))
    path = external(tmp_path / "a", tiny())
    set_entry(path, key, value)
    with pytest.raises(ModelError, match=message) as caught:
        read(load(path).graph.nodes[0].inputs[1])
    assert "\n" not in str(caught.value)
    assert "'w'" in str(caught.value)


def test_external_data_cut_short_after_loading(tmp_path: Path) -> None:
    path = external(tmp_path, tiny())
    model = load(path)
    with (tmp_path / "weights.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ModelError, match="cut short"):
        save(model, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_over_the_size_of_a_protobuf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_storage, "PROTOBUF_LIMIT", 3000)
    model = Model.from_proto(tiny(other=BIG.astype(np.float64)))
    weight = model.graph.nodes[0].inputs[1]
    set_values(weight, BIG + 1)
    save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").stat().st_size >= BIG.nbytes
    after = onnx.load(tmp_path / "out.onnx")
    np.testing.assert_array_equal(numpy_helper.to_array(after.graph.initializer[0]), BIG + 1)
    onnx.checker.check_model(str(tmp_path / "out.onnx"))


def check_refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_missing_empty_and_folder(tmp_path: Path) -> None:
    assert "no such file" in check_refused(tmp_path / "none.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    assert "empty" in check_refused(tmp_path / "empty.onnx")
    assert "a folder" in check_refused(tmp_path)


def test_every_truncation(tmp_path: Path) -> None:
    """No prefix of a file is a model, but for those that end between two fields."""
    data = tiny().SerializeToString()
    whole = 0
    for length in [*range(1, 300), *range(300, len(data), 97)]:
        path = tmp_path / "cut.onnx"
        path.write_bytes(data[:length])
        try:
            load(path)
            whole += 1
        except ModelError as error:
            assert "\n" not in str(error)  # noqa: PT017
    assert whole <= 1


@pytest.mark.parametrize("seed", range(40))
def test_random_bytes(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    (tmp_path / "random.onnx").write_bytes(rng.bytes(int(rng.integers(1, 3000))))
    check_refused(tmp_path / "random.onnx")


@pytest.mark.parametrize("seed", range(60))
def test_flipped_bytes(seed: int, tmp_path: Path) -> None:
    """A damaged file is refused in one line or read; nothing else is raised."""
    rng = np.random.default_rng(seed)
    data = bytearray(rich().SerializeToString())
    for at in rng.integers(0, min(len(data), 1500), 4):
        data[at] = rng.integers(256)
    path = tmp_path / "flipped.onnx"
    path.write_bytes(data)
    try:
        load(path)
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("text", ["<html>not found</html>", "version https://git-lfs.github.com/spec/v1\n"])
def test_other_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text(text)
    check_refused(tmp_path / "text.onnx")


@pytest.mark.parametrize("body", ["y = Relu(x) y = Neg(x)", "y, y = Split <num_outputs = 2> (x)"])
def test_tensor_made_twice(body: str) -> None:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 18]> g (float[N] x) => (float[N] y) {{ {body} }}'
    )
    with pytest.raises(ModelError, match="'y'"):
        Model.from_proto(proto)


@pytest.mark.parametrize("fail_at", [1, 2, 3])
@pytest.mark.parametrize("as_external", [False, True])
def test_failure_while_saving(
    fail_at: int, as_external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(Model.from_proto(tiny()), tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").write_bytes(b"of an older model")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    arrays = {f"w{i}": BIG + i for i in range(6)}
    model = Model.from_proto(tiny(**arrays))
    model.external_data = as_external
    calls = 0
    payload = tensor_storage._payload

    def broken(values: np.ndarray) -> protobuf_stream.Payload:
        nonlocal calls
        length, pieces = payload(values)

        def fail() -> list[memoryview]:
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError(28, "No space left on device")
            return list(pieces())  # type: ignore[arg-type]

        return length, fail

    for tensor in model._tensors:  # written anew, so that there are payloads
        set_values(tensor.constant, BIG * 7)
    monkeypatch.setattr(tensor_storage, "_payload", broken)
    with pytest.raises(ModelError, match="No space left"):
        save(model, tmp_path / "model.onnx")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_failure_of_the_second_file_keeps_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.from_proto(tiny())
    set_values(model.graph.nodes[0].inputs[1], BIG)
    model.external_data = True
    save(model, tmp_path / "model.onnx")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def broken(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensor_storage, "write", broken)
    set_values(model.graph.nodes[0].inputs[1], BIG * 2)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "model.onnx")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_unwritable_places(tmp_path: Path) -> None:
    model = Model.from_proto(tiny())
    with pytest.raises(ModelError, match="no folder"):
        save(model, tmp_path / "none" / "out.onnx")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match="cannot be written"):
        save(model, tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_saving_over_the_input(tmp_path: Path) -> None:
    onnx.save(tiny(), tmp_path / "in.onnx")
    model = load(tmp_path / "in.onnx")
    model.graph.nodes[1].op = "Neg"
    model.touch()
    save(model, tmp_path / "in.onnx")
    save(model, tmp_path / "in.onnx")
    after = onnx.load(tmp_path / "in.onnx")
    np.testing.assert_array_equal(numpy_helper.to_array(after.graph.initializer[0]), BIG)
    assert after.graph.node[1].op_type == "Neg"


def test_external_weights_begin_on_pages_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Whoever maps the file needs them there; each piece is the tensor's own bytes."""
    arrays = {f"w{i}": np.full(2000 + i, i, np.float32) for i in range(4)}
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[M] y) '
        "{ y = Concat<axis = 0>(x, w0, w1, w2, w3) }"
    )
    proto.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in arrays.items())
    save(load(external(tmp_path / "a", proto)), tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    data, end = (tmp_path / "model.onnx.data").read_bytes(), 0
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(where["offset"]), int(where["length"])
        assert where["location"] == "model.onnx.data"
        assert offset % 4096 == 0
        assert end <= offset < end + 4096
        end = offset + length
        np.testing.assert_array_equal(np.frombuffer(data[offset:end], np.float32), arrays.pop(tensor.name))
    assert not arrays
    assert len(data) == end


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o000, 0o666)])
@pytest.mark.parametrize("beside", [False, True])
def test_files_have_the_mode_that_the_umask_leaves(
    umask: int, mode: int, beside: bool, tmp_path: Path
) -> None:
    model = Model.from_proto(tiny())
    model.external_data = beside
    before = os.umask(umask)
    try:
        save(model, tmp_path / "model.onnx")
    finally:
        assert os.umask(before) == umask
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {mode}
    assert len(list(tmp_path.iterdir())) == 1 + beside
