"""Write models: export initializers, stream their weights, and rename files only when they are complete."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcompress.errors import ModelError
from onnxcompress.model import protobuf_stream
from onnxcompress.model.stored_values import PIECE, StoredValues

PROTOBUF_LIMIT = (1 << 31) - 1
"""No protobuf message may be longer, in bytes."""
ALIGNMENT = 4096
"""Bytes to which tensors in external data are aligned, so that onnxruntime can map them into memory."""

Stored = tuple[onnx.TensorProto, LazyValues | np.ndarray | None]
"""A TensorProto and its raw data, where that is not in the TensorProto itself."""


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file.

    Args:
        path: The file.

    Returns:
        The digest in hexadecimal.
    """
    with path.open("rb") as file:
        sha = hashlib.sha256()
        while piece := file.read(PIECE):
            sha.update(piece)
    return sha.hexdigest()


def raw_bytes(values: LazyValues | np.ndarray) -> bytes:
    """Encode values as the raw data of a TensorProto.

    Args:
        values: An array, or values that are still in a file.

    Returns:
        Little-endian bytes; 4-bit types have two elements in a byte.

    Raises:
        ModelError: The file that holds the values was cut short.
    """
    if isinstance(values, StoredValues):
        return values.file.read(values.offset, values.length)
    array = values if isinstance(values, np.ndarray) else values.load()
    return _packed(array).tobytes()


def _packed(array: np.ndarray) -> np.ndarray:
    """Encode an array as raw data, shape (bytes,), uint8: little endian, two 4-bit elements a byte."""
    if array.dtype.name in ("int4", "uint4", "int2", "uint2", "float4_e2m1fn"):
        return np.frombuffer(onnx.numpy_helper.from_array(array).raw_data, np.uint8)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8)


def export(constant: gs.Constant, origin: onnx.TensorProto | None, before: LazyValues | None) -> Stored:
    """Write a constant as a TensorProto, its large raw data apart.

    An unchanged tensor keeps its original proto, and so its encoding, doc string and metadata.

    Args:
        constant: The constant as it is now.
        origin: Its original proto; None for a constant that a pass added.
        before: Its original values.

    Returns:
        The TensorProto, and the raw data to add to it, if any.
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
    """Whether a small tensor that was loaded into memory still equals what the file held."""
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
    """Write one ONNX file, streaming the weights.

    Args:
        file: The file to write to.
        proto: The model without initializers; it is emptied.
        tensors: Its initializers.

    Raises:
        ModelError: A file that holds weights was cut short.
    """
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    model = proto.SerializeToString(deterministic=True)
    entries = (
        (t.SerializeToString(deterministic=True), None if v is None else _payload(v)) for t, v in tensors
    )
    protobuf_stream.join(file, model, graph, list(entries))


def save(path: Path, proto: onnx.ModelProto, tensors: list[Stored], *, external: bool) -> None:
    """Write a model to a temporary file beside `path`, then rename it: no partial file ever appears.

    With external data both files are complete before the first one is renamed.

    Args:
        path: The ONNX file to write.
        proto: The model without initializers; it is emptied.
        tensors: Its initializers.
        external: Put the weights into `<path>.data`; from 2 GB on this happens anyway.

    Raises:
        ModelError: A file cannot be written, or one that holds weights was cut short.
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
    """Write files through temporary ones beside them; all are complete before the first one is renamed.

    Args:
        fills: Paths, each with a function that writes the content to an open file.

    Raises:
        ModelError: A file cannot be written.
    """
    written: list[tuple[Path, Path]] = []
    path = fills[0][0]
    try:
        for path, fill in fills:
            if is_device(path) or (path.exists() and not path.is_file()):  # a rename would replace it
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


def is_device(path: Path) -> bool:
    """Return whether a path is one of the system's names for streams and devices, whatever it leads to.

    Args:
        path: The path of a file.

    Returns:
        Whether it is, such as `/dev/stdout`.
    """
    folder = str(path.absolute().parent)
    return folder in ("/dev", "/dev/fd") or folder.startswith("/proc/")


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
    """Fill a temporary file beside `path`; it enters `written` first, so that a failure removes it."""
    if not path.parent.is_dir():
        raise ModelError(f"{path}: cannot be written (no folder {str(path.parent)!r})")
    umask = os.umask(0)
    os.umask(umask)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    written.append((Path(name), path))
    with os.fdopen(handle, "wb", buffering=PIECE) as file:
        fill(file)
    os.chmod(name, 0o666 & ~umask)


def digest(proto: onnx.ModelProto, tensors: list[Stored]) -> str:
    """Compute the SHA-256 of the ONNX file that `write` would produce.

    Args:
        proto: The model without initializers; it is emptied.
        tensors: Its initializers.

    Returns:
        The digest in hexadecimal.
    """
    hasher: Any = _Hasher()
    write(hasher, proto, tensors)
    return str(hasher.hexdigest())


class _Hasher:
    """A writable file that only computes the SHA-256 of what is written."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._sha.update(data)

    def writelines(self, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            self._sha.update(piece)

    def hexdigest(self) -> str:
        return self._sha.hexdigest()
