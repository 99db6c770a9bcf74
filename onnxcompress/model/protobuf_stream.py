"""Read and write ONNX files without ever holding their weights in memory.

An ONNX file is one protobuf message, and nearly all of it is the `raw_data` of initializers. `split`
walks the outermost fields of the message and returns the *skeleton*: the file's bytes without the raw
data of large initializers, and where in the file each of them lies. `join` writes the reverse. Parsing a
100 MB network therefore costs its few hundred kilobytes of structure; a weight is read when it is needed.

The path through the message (onnx.proto): ModelProto.graph = 7, GraphProto.initializer = 5,
TensorProto.raw_data = 9, each length-delimited (wire type 2).
Does not handle: large constants elsewhere (Constant nodes, subgraphs); they stay in the skeleton.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from onnxcompress.errors import ModelError

KEPT = 16 << 20
"""Bytes of a file without its large weights up to which it is kept: commands look at files often."""
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
LARGE = 1024
"""Initializers with at least this many bytes of raw data stay in the file."""

Buffer = mmap.mmap | bytes


def _varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ModelError(f"broken ONNX file: the varint at byte {at} does not end")


def _fields(data: Buffer, at: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (field number, wire type, start of field, start of payload, end of payload)."""
    while at < end:
        start = at
        key, at = _varint(data, at, end)
        number, kind = key >> 3, key & 7
        if kind == 0:
            _, stop = _varint(data, at, end)
        elif kind == 1:
            stop = at + 8
        elif kind == 5:
            stop = at + 4
        elif kind == 2:
            length, at = _varint(data, at, end)
            stop = at + length
        else:
            raise ModelError(f"not an ONNX file: unknown wire type {kind} at byte {start}")
        if stop > end:
            raise ModelError(
                f"the ONNX file is cut short: a field at byte {start} needs {stop - end} bytes more"
            )
        yield number, kind, start, at, stop
        at = stop


def encode_varint(value: int) -> bytes:
    """Encode a number as a protobuf varint.

    Args:
        value: A number, at least 0.

    Returns:
        The bytes, seven bits in each, the lowest first.
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _header(number: int, length: int) -> bytes:
    return encode_varint(number << 3 | 2) + encode_varint(length)


def _split_tensor(data: Buffer, at: int, end: int) -> tuple[bytes, tuple[int, int] | None]:
    """Separate a tensor into its bytes without large raw data, and (offset, length) of that data."""
    parts, place = [], None
    for number, kind, start, payload, stop in _fields(data, at, end):
        if number == RAW_DATA and kind == 2 and stop - payload >= LARGE:
            place = (payload, stop - payload)
        else:
            parts.append(data[start:stop])
    return b"".join(parts), place


def split(path: Path) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """Read an ONNX file without the raw data of its large initializers; once, until the file changes.

    Args:
        path: The file.

    Returns:
        The skeleton, a serialized ModelProto, and {index of the initializer: (offset, length)}, the
        place of the omitted data in the file, in bytes.

    Raises:
        ModelError: The file is empty, cut short or not a protobuf message.
        OSError: The file cannot be read.
    """
    status = path.stat()
    skeleton, places = _split_file(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    if len(skeleton) > KEPT:
        _split_file.cache_clear()
    return skeleton, dict(places)


@lru_cache(maxsize=4)
def _split_file(path: Path, version: tuple[int, ...]) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """Read a file in the version that its device, inode, size and time of change tell from others."""
    with path.open("rb") as file:
        if version[2] == 0:
            raise ModelError(f"{path}: the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _split_model(data)


def _split_model(data: mmap.mmap) -> tuple[bytes, dict[int, tuple[int, int]]]:
    model: list[bytes] = []
    places: dict[int, tuple[int, int]] = {}
    index = 0
    for number, kind, start, payload, stop in _fields(data, 0, len(data)):
        if number != GRAPH or kind != 2:
            model.append(data[start:stop])
            continue
        graph: list[bytes] = []
        for inner, inner_kind, inner_start, inner_payload, inner_stop in _fields(data, payload, stop):
            if inner != INITIALIZER or inner_kind != 2:
                graph.append(data[inner_start:inner_stop])
                continue
            tensor, place = _split_tensor(data, inner_payload, inner_stop)
            if place:
                places[index] = place
            graph.append(_header(INITIALIZER, len(tensor)) + tensor)
            index += 1
        body = b"".join(graph)
        model.append(_header(GRAPH, len(body)) + body)
    return b"".join(model), places


Payload = tuple[int, Callable[[], Iterable[bytes | memoryview]]]
"""Length of raw data in bytes, and a function that yields it in pieces."""


def join(
    file: BinaryIO, model: bytes, graph: bytes, tensors: Iterable[tuple[bytes, Payload | None]]
) -> None:
    """Write a ModelProto, streaming the raw data of its initializers.

    Args:
        file: The file to write to.
        model: A serialized ModelProto without a graph.
        graph: A serialized GraphProto without initializers.
        tensors: Serialized TensorProtos without raw data, each with the raw data to add, if any.
    """
    entries = []
    for tensor, payload in tensors:
        raw = _header(RAW_DATA, payload[0]) if payload else b""
        size = len(tensor) + len(raw) + (payload[0] if payload else 0)
        entries.append((_header(INITIALIZER, size) + tensor + raw, payload))
    total = len(graph) + sum(len(head) + (load[0] if load else 0) for head, load in entries)
    file.write(model + _header(GRAPH, total) + graph)
    for head, payload in entries:
        file.write(head)
        if payload:
            file.writelines(payload[1]())
