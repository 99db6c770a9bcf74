"""Where weights lie: in the ONNX file, in external data beside it, or in memory; and writing them out."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcompress.errors import ModelError
from onnxcompress.model import protobuf_stream
from onnxcompress.model.envelope import nested_tensors, sparse_tensors
from onnxcompress.model.validation import check_sparse, check_tensor

PIECE = 1 << 22
"""Bytes copied at a time."""
PROTOBUF_LIMIT = (1 << 31) - 1
"""No protobuf message may be longer, in bytes."""
ALIGNMENT = 4096
"""Of a tensor in external data, in bytes: what onnxruntime can map into memory."""

Stored = tuple[onnx.TensorProto, LazyValues | np.ndarray | None]
"""A TensorProto and where its raw data is; None: in the TensorProto itself."""


class DataFile:
    """A file held open: what was loaded stays readable although its name is replaced meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._file.fileno(), length, offset) if length else b""
        while len(data) < length:  # one pread returns at most 2 GB
            more = os.pread(self._file.fileno(), length - len(data), offset + len(data))
            if not more:
                raise ModelError(
                    f"{self.path}: {length} bytes at {offset} expected, the file ends after "
                    f"{len(data)}; was it changed or cut short?"
                )
            data += more
        return data


class StoredValues(LazyValues):  # type: ignore[misc]
    """Lazy values of an initializer whose raw data lies in a file."""

    def __init__(
        self, tensor: onnx.TensorProto, file: DataFile, offset: int, length: int, external: bool
    ) -> None:
        super().__init__(tensor)
        self.file, self.offset, self.length, self.external = file, offset, length, external

    def load(self) -> np.ndarray:
        """The values as a new array in the tensor's shape and type."""
        proto = onnx.TensorProto(
            dims=self.tensor.dims, data_type=self.tensor.data_type, name=self.tensor.name
        )
        proto.raw_data = self.file.read(self.offset, self.length)
        try:
            return np.array(onnx.numpy_helper.to_array(proto))
        except ValueError as error:
            raise ModelError(
                f"initializer {self.tensor.name!r}: {self.length} bytes do not fill the shape "
                f"{list(self.tensor.dims)} ({error})"
            ) from error

    def pieces(self) -> Iterator[bytes]:
        for at in range(0, self.length, PIECE):
            yield self.file.read(self.offset + at, min(PIECE, self.length - at))


def stored_values(
    proto: onnx.ModelProto, path: Path, places: dict[int, tuple[int, int]]
) -> dict[int, LazyValues | np.ndarray]:
    """Lazy values for the initializers in `places` of the file and for those in external data."""
    files: dict[Path, DataFile] = {}

    def opened(file: Path) -> DataFile:
        return files.setdefault(file, files.get(file) or DataFile(file))

    stored: dict[int, LazyValues | np.ndarray] = {}
    for index, tensor in enumerate(proto.graph.initializer):
        if index in places:
            stored[index] = StoredValues(tensor, opened(path), *places[index], external=False)
        elif tensor.data_location == onnx.TensorProto.EXTERNAL:
            stored[index] = _external(tensor, path, opened)
    return stored


def check_tensors(proto: onnx.ModelProto, name: str, places: dict[int, tuple[int, int]]) -> None:
    """All tensors that are not in external data. Raises ModelError."""
    for index, tensor in enumerate(proto.graph.initializer):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            check_tensor(tensor, name, places[index][1] if index in places else None)
    for tensor in nested_tensors(proto.graph):
        check_tensor(tensor, name)
    for sparse in sparse_tensors(proto.graph):
        check_sparse(sparse, name)


def inline_nested(proto: onnx.ModelProto, path: Path) -> None:
    """Read external data of tensors that are no initializers (attributes, bodies) into the proto."""
    for tensor in nested_tensors(proto.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            values = _external(tensor, path, DataFile)
            tensor.raw_data = values.file.read(values.offset, values.length)


def _external(tensor: onnx.TensorProto, path: Path, opened: Any) -> StoredValues:
    entries = {e.key: e.value for e in tensor.external_data}
    where = f"{path}: initializer {tensor.name!r}"
    folder = path.parent.resolve()
    file = (folder / entries.get("location", "")).resolve()
    if not file.is_relative_to(folder) or file == folder:
        raise ModelError(f"{where}: external data {str(file)!r} lies outside the model's folder")
    if not file.is_file():
        raise ModelError(f"{where}: external data file {file.name!r} is missing; copy it beside")
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", file.stat().st_size - offset))
    except ValueError as error:
        raise ModelError(f"{where}: external data has a broken offset or length") from error
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        raise ModelError(f"{where}: external data ends before byte {offset + length}; cut short?")
    check_tensor(tensor, path.name, length)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    return StoredValues(tensor, opened(file), offset, length, external=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        sha = hashlib.sha256()
        while piece := file.read(PIECE):
            sha.update(piece)
    return sha.hexdigest()


def raw_bytes(values: LazyValues | np.ndarray) -> bytes:
    if isinstance(values, StoredValues):
        return values.file.read(values.offset, values.length)
    array = values if isinstance(values, np.ndarray) else values.load()
    return _packed(array).tobytes()


def _packed(array: np.ndarray) -> np.ndarray:
    """The bytes of raw_data, shape (bytes,), uint8: little endian, two int4 a byte."""
    if array.dtype.name in ("int4", "uint4", "int2", "uint2", "float4_e2m1fn"):
        return np.frombuffer(onnx.numpy_helper.from_array(array).raw_data, np.uint8)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8)


def export(constant: gs.Constant, origin: onnx.TensorProto | None, before: LazyValues | None) -> Stored:
    """The TensorProto of a constant without its large raw data, and that data.

    An unchanged tensor keeps its original proto, so its encoding, doc string and metadata.
    """
    values = constant._values
    if origin is not None and (values is before or _equal(values, before)):
        proto = onnx.TensorProto()
        proto.CopyFrom(origin)
        proto.name = constant.name
        return proto, before if isinstance(before, StoredValues | np.ndarray) else None
    proto = onnx.TensorProto(name=constant.name)
    if origin is not None:
        if origin.doc_string:
            proto.doc_string = origin.doc_string
        proto.metadata_props.extend(origin.metadata_props)
    if isinstance(values, LazyValues):
        proto.dims.extend(values.tensor.dims)
        proto.data_type = values.tensor.data_type
    else:
        proto.dims.extend(values.shape)
        proto.data_type = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    if isinstance(values, StoredValues):
        return proto, values
    if isinstance(values, np.ndarray) and values.dtype == object:
        proto.data_type = onnx.TensorProto.STRING
        proto.string_data.extend(_text(values))
        return proto, None
    if isinstance(values, np.ndarray) and values.nbytes >= protobuf_stream.LARGE:
        return proto, values
    proto.raw_data = raw_bytes(values)
    return proto, None


def _equal(values: Any, before: LazyValues | None) -> bool:
    """Whether a small tensor that something loaded still holds what the file held."""
    if not isinstance(values, np.ndarray) or before is None or isinstance(before, np.ndarray):
        return False
    if values.dtype == object:  # strings: bytes in the file, text once loaded
        same = list(before.tensor.string_data) == _text(values)
        return same and tuple(before.shape) == values.shape
    if values.nbytes >= protobuf_stream.LARGE or before.nbytes != values.nbytes:
        return False
    return bool(values.dtype == before.dtype and values.tobytes() == before.load().tobytes())


def _text(values: np.ndarray) -> list[bytes]:
    return [v if isinstance(v, bytes) else str(v).encode() for v in values.flat]


def _payload(values: LazyValues | np.ndarray) -> protobuf_stream.Payload:
    if isinstance(values, StoredValues):
        return values.length, values.pieces
    array = values if isinstance(values, np.ndarray) else values.load()
    packed = _packed(array)
    return packed.nbytes, lambda: [packed.data]


def write(file: BinaryIO, proto: onnx.ModelProto, tensors: list[Stored]) -> None:
    """Write one ONNX file, streaming the weights. `proto` is used up."""
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    model = proto.SerializeToString(deterministic=True)
    entries = (
        (t.SerializeToString(deterministic=True), None if v is None else _payload(v)) for t, v in tensors
    )
    protobuf_stream.join(file, model, graph, list(entries))


def save(path: Path, proto: onnx.ModelProto, tensors: list[Stored], *, external: bool) -> None:
    """Write to `path` through a temporary file in its folder, then rename: whole or not at all.

    With external data both files are complete before the first gets its name.
    """
    size = proto.ByteSize() + sum(
        t.ByteSize() + (_payload(v)[0] if v is not None else 0) + 32 for t, v in tensors
    )
    if external or size > PROTOBUF_LIMIT:
        data = path.with_name(path.name + ".data")
        inside: list[Stored] = [(t, None) for t, _ in tensors]
        write_files(
            [
                (data, lambda file: _write_external(file, data.name, tensors)),
                (path, lambda file: write(file, proto, inside)),
            ]
        )
    else:
        write_files([(path, lambda file: write(file, proto, tensors))])


def write_files(fills: Sequence[tuple[Path, Callable[[BinaryIO], None]]]) -> None:
    """Fill files in turn, through temporary ones beside them; all are complete before the first is renamed.

    Raises ModelError where one cannot be written.
    """
    written: list[tuple[Path, Path]] = []
    path = fills[0][0]
    try:
        for path, fill in fills:
            if path.exists() and not path.is_file():  # renaming would replace a device or a pipe
                kind = "a folder" if path.is_dir() else "no regular file"
                raise ModelError(f"{path}: cannot be written (it is {kind})")
            _write_beside(path, fill, written)
        for temporary, path in written:
            os.replace(temporary, path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)


def _write_external(file: BinaryIO, name: str, tensors: list[Stored]) -> None:
    for tensor, values in tensors:
        if values is None:
            continue
        length, pieces = _payload(values)
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", file.tell()), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        file.writelines(pieces())


def _write_beside(path: Path, fill: Callable[[BinaryIO], None], written: list[tuple[Path, Path]]) -> None:
    """Fill a temporary file in the folder of `path`; it is noted in `written` before anything can fail."""
    if not path.parent.is_dir():
        raise ModelError(f"{path}: cannot be written (no folder {str(path.parent)!r})")
    umask = os.umask(0)
    os.umask(umask)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    written.append((Path(name), path))
    with os.fdopen(handle, "wb", buffering=PIECE) as file:
        fill(file)
    os.chmod(name, 0o666 & ~umask)
