"""Weights that stay on disk: in the ONNX file or in external data beside it, read when they are needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcompress.errors import ModelError
from onnxcompress.model.envelope import nested_tensors, sparse_tensors
from onnxcompress.model.validation import check_sparse, check_tensor

PIECE = 1 << 22
"""Bytes copied at a time."""


class DataFile:
    """A file kept open, so that its weights stay readable after another file takes its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")

    def read(self, offset: int, length: int) -> bytes:
        """Read part of the file.

        Args:
            offset: Where to begin, in bytes.
            length: How many bytes to read.

        Returns:
            Exactly `length` bytes.

        Raises:
            ModelError: The file ends before that.
        """
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
    """Values of an initializer whose raw data lies in a file, loaded when they are needed."""

    def __init__(
        self, tensor: onnx.TensorProto, file: DataFile, offset: int, length: int, external: bool
    ) -> None:
        super().__init__(tensor)
        self.file, self.offset, self.length, self.external = file, offset, length, external

    def load(self) -> np.ndarray:
        """Read the values.

        Returns:
            A new array in the tensor's shape and type.

        Raises:
            ModelError: The file ends too early, or the data does not fill the shape.
        """
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
        """Read the raw data in pieces.

        Yields:
            At most PIECE bytes at a time.

        Raises:
            ModelError: The file ends too early.
        """
        for at in range(0, self.length, PIECE):
            yield self.file.read(self.offset + at, min(PIECE, self.length - at))


def stored_values(
    proto: onnx.ModelProto, path: Path, places: dict[int, tuple[int, int]]
) -> dict[int, LazyValues | np.ndarray]:
    """Create lazy values for the initializers whose data is outside the proto.

    Args:
        proto: The skeleton of the file.
        path: The file.
        places: (offset, length) in the file by index of the initializer, from `protobuf_stream.split`.

    Returns:
        Values by index of the initializer, those in external data included.

    Raises:
        ModelError: External data is missing, cut short, or outside the file's folder.
    """
    opened = cache(DataFile)  # each file is opened once
    stored: dict[int, LazyValues | np.ndarray] = {}
    for index, tensor in enumerate(proto.graph.initializer):
        if index in places:
            stored[index] = StoredValues(tensor, opened(path), *places[index], external=False)
        elif tensor.data_location == onnx.TensorProto.EXTERNAL:
            stored[index] = _external(tensor, path, opened)
    return stored


def check_tensors(proto: onnx.ModelProto, name: str, places: dict[int, tuple[int, int]]) -> None:
    """Check all tensors of a model that are not in external data.

    Args:
        proto: The model.
        name: The model's name, as it begins a message.
        places: (offset, length) of raw data outside the proto, by index of the initializer.

    Raises:
        ModelError: A tensor is invalid, or has too little or too much data.
    """
    for index, tensor in enumerate(proto.graph.initializer):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            check_tensor(tensor, name, places[index][1] if index in places else None)
    for tensor in nested_tensors(proto.graph):
        check_tensor(tensor, name)
    for sparse in sparse_tensors(proto.graph):
        check_sparse(sparse, name)


def inline_nested(proto: onnx.ModelProto, path: Path) -> set[Path]:
    """Read external data of nested tensors (in attributes and bodies) into the proto.

    Args:
        proto: The model, changed in place.
        path: Its file.

    Returns:
        The files that were read.

    Raises:
        ModelError: External data is missing, cut short, or outside the file's folder.
    """
    files = set[Path]()
    for tensor in nested_tensors(proto.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            values = _external(tensor, path, DataFile)
            tensor.raw_data = values.file.read(values.offset, values.length)
            files.add(values.file.path)
    return files


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
