"""One fixed file for each way in which a file can lie; what the message must name."""

from __future__ import annotations

import io
import itertools
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.robustness.hostile.networks import network

HUGE = 2**35
"""Elements of a tensor of 128 GB."""
Build = Callable[[], onnx.ModelProto]


def _tensor(name: str, **fields: object) -> Build:
    """The residual network, where fields of one initializer are set."""

    def build() -> onnx.ModelProto:
        proto = network("residual")
        (tensor,) = [t for t in proto.graph.initializer if t.name == name]
        for field, value in fields.items():
            if isinstance(value, list):
                del getattr(tensor, field)[:]
                getattr(tensor, field).extend(value)
            else:
                setattr(tensor, field, value)
        return proto

    return build


def _node(op: str, **changes: object) -> Build:
    """The residual network, where the first node of that operator is changed."""

    def build() -> onnx.ModelProto:
        proto = network("residual")
        node = next(n for n in proto.graph.node if n.op_type == op)
        for key, value in changes.items():
            if key in ("input", "output"):
                del getattr(node, key)[:]
                getattr(node, key).extend(value)
            else:
                node.attribute.append(helper.make_attribute(key, value))
        return proto

    return build


def _external(location: str, **more: str) -> Build:
    def build() -> onnx.ModelProto:
        proto = network("residual")
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **more}.items():
            tensor.external_data.add(key=key, value=value)
        return proto

    return build


def _sparse() -> onnx.ModelProto:
    proto = network("residual")
    sparse = proto.graph.sparse_initializer.add(dims=[HUGE])
    sparse.values.CopyFrom(helper.make_tensor("huge", TensorProto.FLOAT, [1], [1.0]))
    sparse.indices.CopyFrom(helper.make_tensor("at", TensorProto.INT64, [1], [0]))
    return proto


def _cycle() -> onnx.ModelProto:
    proto = network("residual")
    node = next(n for n in proto.graph.node if n.op_type == "BatchNormalization")
    node.input[0] = next(n for n in proto.graph.node if n.op_type == "Add").output[0]
    proto.graph.node[0].output[0] = "unread"
    return proto


REFUSED: dict[str, tuple[Build, str]] = {
    "claims 128 GB": (_tensor("w0", dims=[HUGE]), f"needs {4 * HUGE} bytes"),
    "claims fewer": (_tensor("w0", dims=[1]), "needs 4 bytes"),
    "negative dimension": (_tensor("w0", dims=[-4, 3, 3, 3]), "negative dimension"),
    "no type": (_tensor("w0", data_type=0), "unknown type 0"),
    "type of no version": (_tensor("w0", data_type=9999), "unknown type"),
    "sparse claims 128 GB": (_sparse, "store it dense"),
    "cycle": (_cycle, "cycle through node"),
    "dangling input": (_node("Relu", input=["nowhere"]), "reads 'nowhere', which no node produces"),
    "made twice": (_node("Relu", output=["a"]), "a second time"),
    "attribute of another type": (_node("Conv", group="four"), "'group' is STRING, expected INT"),
    "too few inputs": (_node("Conv", input=["x"]), "has 1 inputs, expected 2 to 3"),
    "external, above the folder": (_external("../secret.bin"), "outside the model's folder"),
    "external, absolute": (_external("/etc/passwd"), "outside the model's folder"),
    "external, through a link": (_external("link.bin"), "outside the model's folder"),
    "external, the folder": (_external("."), "outside the model's folder"),
    "external, missing": (_external("none.bin"), "is missing"),
    "external claims 128 GB": (_external("near.bin", length=str(4 * HUGE)), "cut short"),
    "external, negative": (_external("near.bin", offset="-8", length="8"), "ends before byte"),
    "external, no number": (_external("near.bin", length="many"), "broken offset or length"),
    "external, too little": (_external("near.bin"), "needs 432 bytes, the file has 64"),
}
"""Kind -> (file, what the one line of error says); `inspect` and every pass refuse these."""


def _grown(op: str, sizes: list[int]) -> Build:
    """A small network whose bias has a size that a chain of constants asks for."""

    def build() -> onnx.ModelProto:
        proto = network("residual")
        gemm = next(n for n in proto.graph.node if n.op_type == "Gemm")
        shape = helper.make_tensor("sizes", TensorProto.INT64, [len(sizes)], sizes)
        proto.graph.initializer.append(shape)
        source = ["sizes"] if op == "ConstantOfShape" else ["bias", "sizes"]
        proto.graph.node.insert(0, helper.make_node(op, source, ["grown"], "grow"))
        gemm.input[2] = "grown"
        return proto

    return build


def _chain() -> onnx.ModelProto:
    """1,500 Identity nodes between an initializer and the layer that reads it."""
    proto = network("residual")
    conv = proto.graph.node[0]
    names = ["w0", *(f"w0.{at}" for at in range(1500))]
    made = [helper.make_node("Identity", [a], [b]) for a, b in itertools.pairwise(names)]
    conv.input[1] = names[-1]
    nodes = [*made, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def _wide() -> onnx.ModelProto:
    """1,500 BatchNorms that all read one tensor: a message for each must not name all the others."""
    proto = network("residual")
    for at in range(1500):
        node = helper.make_node("BatchNormalization", ["a", "g", "b", "m", "v"], [f"wide{at}"], f"wide{at}")
        proto.graph.node.append(node)
    return proto


def _weights(name: str, *values: float) -> Build:
    """One channel of a parameter has other values; a BatchNorm's variance is `v`."""

    def build() -> onnx.ModelProto:
        proto = network("residual")
        (tensor,) = [t for t in proto.graph.initializer if t.name == name]
        array = onnx.numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[: len(values)] = values
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
        return proto

    return build


def _empty() -> onnx.ModelProto:
    """A convolution of no channels."""
    proto = network("residual")
    for name, shape in (("w0", (0, 3, 3, 3)), ("w1", (4, 0, 3, 3))):
        (tensor,) = [t for t in proto.graph.initializer if t.name == name]
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
    return proto


def _metadata(key: str, value: str) -> Build:
    def build() -> onnx.ModelProto:
        proto = network("residual")
        proto.metadata_props.add(key=f"onnxcompress.{key}", value=value)
        return proto

    return build


def _terminal() -> onnx.ModelProto:
    """Names that would clear the screen, and the title of its window."""
    proto = network("residual")
    for node in proto.graph.node:
        node.name = f"\x1b[2J\x1b]0;pwned\x07{node.op_type}"
    return proto


def _open_image() -> onnx.ModelProto:
    proto = network("residual")
    for dim in proto.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = 2**31
    return proto


STRANGE: dict[str, Build] = {
    "NaN in a weight": _weights("w0", float("nan")),
    "infinite weight": _weights("w1", float("inf"), float("-inf")),
    "zero variance": _weights("v", 0.0),
    "negative variance": _weights("v", -1.0),
    "NaN variance": _weights("v", float("nan")),
    "weights near the end of float32": _weights("g", 3e38, -3e38),
    "zero-size tensors": _empty,
    "an absurd image": _open_image,
    "ConstantOfShape of 128 GB": _grown("ConstantOfShape", [HUGE]),
    "Expand to 128 GB": _grown("Expand", [HUGE // 5, 5]),
    "Tile to 128 GB": _grown("Tile", [HUGE // 5]),
    "1,500 Identity in a row": _chain,
    "1,500 readers of one tensor": _wide,
    "record of no JSON": _metadata("statistics", "{"),
    "record of another kind": _metadata(
        "statistics", '{"n": {"mean": 7, "std": null, "source": []}, "r": 1}'
    ),
    "record nested deep": _metadata("statistics", "[" * 100_000),
    "provenance of another kind": _metadata("provenance", '[1, {"pass": {"a": []}}, null]'),
    "provenance nested deep": _metadata("provenance", "[" * 100_000),
    "names that command a terminal": _terminal,
}
"""Kind -> file that is readable; commands do right, leave things alone with a reason, or refuse."""


RECIPES = {
    "a tag that runs code": "passes: !!python/object/apply:os.system ['touch pwned']",
    "an alias bomb": "a: &a [x,x]\nb: &b [*a,*a]\npasses: [*b]",
    "nested deep": "passes: " + "[" * 5000,
    "no text": "\udcff\udcfe",
    "another document": "--- 1\n--- 2",
    "a pass that is none": "passes: [os.system]",
    "a path for a number": "passes: [prune: {sparsity: /etc/passwd}]",
}


def npz(name: str) -> bytes:
    """An archive of images that is none."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        if name == "pickled objects":
            np.lib.format.write_array(file := io.BytesIO(), np.array([{"a": 1}], object), allow_pickle=True)
            archive.writestr("x.npy", file.getvalue())
        elif name == "claims 128 GB":
            header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': (32, {2**31}, 2, 1)}}\n".encode()
            archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        elif name == "zip bomb":
            with archive.open("x.npy", "w") as member:
                for _ in range(1 << 10):
                    member.write(bytes(1 << 20))
        elif name == "header of no Python":
            archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000)
        elif name == "cut short":
            np.lib.format.write_array(file := io.BytesIO(), np.zeros((4, 8, 8, 3), np.uint8))
            archive.writestr("x.npy", file.getvalue()[:-100])
    return out.getvalue()


NPZ = ("pickled objects", "claims 128 GB", "zip bomb", "header of no Python", "cut short")


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG whose header says that size, whatever it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


IMAGES = {
    "no image": b"MZ this is a program",
    "a decompression bomb": png(40_000, 40_000),
    "an absurd size": png(2**31 - 1, 2**31 - 1),
    "cut short": png(8, 8, bytes(3)),
    "empty": b"",
    "text": b"P6 99999999 99999999 255\n",
}

JSON = {
    "no JSON": b"{",
    "another kind": b"[1, 2]",
    "nested deep": b"[" * 100_000,
    "absurd numbers": b'{"of": {}, "blocks": [{"exit": 1e999, "latency_share": []}]}',
    "no text": b"\xff\xfe\x00",
}


def lay(folder: Path, build: Build) -> None:
    """The file as in.onnx, and what it may point at: near.bin, link.bin, and beyond it secret.bin."""
    (folder / "in.onnx").write_bytes(build().SerializeToString())
    (folder / "near.bin").write_bytes(bytes(64))
    (folder.parent / "secret.bin").write_bytes(bytes(432))
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
