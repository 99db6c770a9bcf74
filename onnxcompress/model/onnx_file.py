"""Load and save ONNX files."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from onnxcompress.errors import ModelError
from onnxcompress.model import protobuf_stream, tensor_storage
from onnxcompress.model.model import Model
from onnxcompress.model.stored_values import check_tensors, inline_nested, stored_values
from onnxcompress.model.validation import check_graph


def check_file(path: str | os.PathLike[str]) -> None:
    """Check that a path names a file.

    Args:
        path: The path of an ONNX file.

    Raises:
        ModelError: There is none, or it is a folder.
    """
    if not Path(path).is_file():
        kind = "a folder; name an ONNX file" if Path(path).is_dir() else "no such file"
        raise ModelError(f"{os.fspath(path)}: {kind}")


def load(path: str | os.PathLike[str]) -> Model:
    """Read an ONNX file; weights, inside the file or external, stay on disk until they are needed.

    Args:
        path: The file.

    Returns:
        The model.

    Raises:
        ModelError: The file is missing, broken or cut short, or its external data is missing or outside the
            file's folder.
    """
    file = Path(path)
    check_file(file)
    try:
        skeleton, places = protobuf_stream.split(file)
        proto = onnx.ModelProto()
        proto.ParseFromString(skeleton)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from error
    except (DecodeError, ModelError) as error:
        raise ModelError(f"{file}: not a readable ONNX model ({error})") from error
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{file}: not an ONNX model (it has no graph)")
    check_graph(proto, file.name)
    nested = inline_nested(proto, file)
    check_tensors(proto, file.name, places)
    model = Model(proto, stored_values(proto, file, places), file.name)
    model.external_files |= nested
    model.input_digest = lambda: tensor_storage.file_digest(file)
    return model


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model to a file, completely or not at all.

    Weights go to `<path>.data` beside it from 2 GB on, and where the model was read from external data.

    Args:
        model: The model.
        path: The ONNX file to write.

    Raises:
        ModelError: The folder cannot be written, or a file that holds weights was cut short.
    """
    proto, tensors = model._new_export()
    tensor_storage.save(Path(path), proto, tensors, external=model.external_data)


def check_target(source: Path | None, target: Path) -> None:
    """Refuse an output file before the work that could not be written after it.

    Args:
        source: The input; None: it has no file.
        target: The output.

    Raises:
        ModelError: The output is the input, no regular file, or not writable.
    """
    if source is not None and target.exists() and source.exists() and os.path.samefile(source, target):
        raise ModelError(f"{target}: the output would replace the input; name another file")
    if tensor_storage.is_device(target) or (
        target.exists() and not target.is_file() and not target.is_dir()
    ):
        raise ModelError(f"{target}: no regular file; for standard output write -")
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise ModelError(f"{target}: cannot be written; name a file in an existing, writable folder")


def check_external(model: Model, target: Path) -> None:
    """Refuse to overwrite a file that holds the input's weights.

    Args:
        model: The input.
        target: The output.

    Raises:
        ModelError: The output, or its external data, is such a file.
    """
    for file in (target, target.with_name(target.name + ".data")):
        if any(file.exists() and os.path.samefile(file, used) for used in model.external_files):
            raise ModelError(f"{file}: it holds the input's weights; name another file or folder")
