"""Accept a model in any form that a caller may have: a Model, a ModelProto, its bytes, or a path.

Does not handle: inputs of type string, sequence or bfloat16.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError

from onnxcompress.errors import ModelError
from onnxcompress.model import Model, Shape, load, protobuf_stream, save
from onnxcompress.model.envelope import attributes
from onnxcompress.model.onnx_file import check_file

ModelLike = Model | onnx.ModelProto | bytes | str | os.PathLike[str]

_IN_MEMORY_LIMIT = 1_900_000_000
"""Models with more bytes of weights go to onnxruntime through a file: protobuf ends at 2 GB."""
_DTYPES = {
    "float": np.float32, "double": np.float64, "float16": np.float16, "bool": np.bool_,
    "int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64,
    "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
}  # fmt: skip


@dataclass(frozen=True)
class InputSpec:
    """Name, type and shape of a model's input."""

    name: str
    dtype: np.dtype[Any]
    shape: Shape | None
    """A symbolic dimension is a name, an unknown one None; None: the rank is unknown, too."""
    read: bool = True
    """Whether anything depends on it; a runtime wants it fed all the same."""

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether the input accepts arrays of a shape.

        Args:
            shape: Shape of an array, such as (N, C, H, W).

        Returns:
            True where the rank and all fixed dimensions agree, or the input's shape is unknown.
        """
        if self.shape is None:
            return True
        pairs = zip(self.shape, shape, strict=False)
        return len(self.shape) == len(shape) and all(not isinstance(d, int) or d == g for d, g in pairs)


def label(model: ModelLike) -> str:
    """Name the model for a message.

    Args:
        model: A model in any form.

    Returns:
        The file name, the path as given, or the name of the graph; "model" where there is none.
    """
    if isinstance(model, Model):
        return model.name
    if isinstance(model, onnx.ModelProto):
        return model.graph.name or "model"
    return "model" if isinstance(model, bytes) else os.fspath(model)


def display_names(models: Sequence[ModelLike]) -> list[str]:
    """Give each of several models a different name.

    Args:
        models: Models in any form.

    Returns:
        Their file names; whole paths where two file names are equal; else labels with a number behind.
    """
    labels = [label(m) for m in models]
    short = [os.path.basename(text) or text for text in labels]
    for names in (short, labels):
        if len(set(names)) == len(names):
            return names
    return [f"{text} ({number})" for number, text in enumerate(labels, 1)]


def dims(shape: Sequence[int | str | None]) -> str:
    """Format a shape for a message.

    Args:
        shape: Dimensions: a number, the name of a symbol, or None where unknown.

    Returns:
        Such as `1x3x224x224`, `?` for unknown dimensions; `scalar` for rank 0.
    """
    return "x".join("?" if d is None else str(d) for d in shape) or "scalar"


def model_bytes(model: ModelLike) -> int:
    """Measure the model's size as a file, including external data.

    Args:
        model: A model in any form.

    Returns:
        Bytes.

    Raises:
        ModelError: The file is missing or not a readable ONNX model.
    """
    if isinstance(model, bytes):
        return len(model)
    if isinstance(model, onnx.ModelProto):
        return int(model.ByteSize())
    if isinstance(model, Model):
        return int(model.to_proto().ByteSize())
    path = Path(model)
    proto = _proto(path)
    places = {
        entry.value
        for tensor in proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    beside = (path.parent / place for place in places)
    return path.stat().st_size + sum(p.stat().st_size for p in beside if p.is_file())


def as_model(model: ModelLike) -> Model:
    """Convert a model in any form to a Model.

    Args:
        model: A model in any form; a Model is returned as it is.

    Returns:
        The model.

    Raises:
        ModelError: The file is missing, or the model is broken.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, bytes | onnx.ModelProto):
        return Model.from_proto(_proto(model), label(model))
    return load(model)


def metadata_of(model: ModelLike) -> dict[str, str]:
    """Read the model's metadata_props.

    Args:
        model: A model in any form.

    Returns:
        Values by key.

    Raises:
        ModelError: The file is missing or not a readable ONNX model.
    """
    if isinstance(model, Model):
        return model.metadata
    return {p.key: p.value for p in _proto(model).metadata_props}


def input_specs(model: ModelLike) -> list[InputSpec]:
    """Describe the inputs that must be fed, in order: graph inputs that are not initializers.

    Args:
        model: A model in any form; a Model with the sizes that are assumed for it (`Model.assume`).

    Returns:
        A specification of each input.

    Raises:
        ModelError: The model cannot be read, or an input has a type that is not handled.
    """
    if isinstance(model, Model):
        specs = model.analysis(_specs_in_file)
        return [replace(s, shape=model.assumed.get(s.name, s.shape)) for s in specs]
    return _proto_specs(_proto(model), only=None)


def _specs_in_file(model: Model) -> list[InputSpec]:
    real = {t.name for t in model.graph.inputs if not isinstance(t, gs.Constant)}
    return _proto_specs(model.skeleton(), only=real)


@contextlib.contextmanager
def runnable(model: ModelLike) -> Iterator[str | bytes]:
    """Provide the model in a form that onnxruntime loads, for the duration of the context.

    Args:
        model: A model in any form.

    Yields:
        A path, or the bytes of a model that fits in one protobuf message.

    Raises:
        ModelError: The file is missing, or a ModelProto has 2 GB or more.
    """
    if isinstance(model, bytes):
        yield model
    elif isinstance(model, str | os.PathLike):
        check_file(model)
        yield os.fspath(model)
    elif isinstance(model, onnx.ModelProto):
        try:
            data = model.SerializeToString()
        except (EncodeError, ValueError) as error:  # 2 GB and more
            raise ModelError(f"{label(model)}: too large for memory; give its path") from error
        yield data
    elif weight_bytes(model) < _IN_MEMORY_LIMIT:
        yield model.to_bytes()
    else:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = os.path.join(folder, "model.onnx")
            save(model, path)
            yield path


def weight_bytes(model: Model) -> int:
    """Sum the bytes of all initializers, without reading them.

    Args:
        model: The model.

    Returns:
        Bytes.
    """
    tensors = model.graph.tensors().values()
    return sum(int(t._values.nbytes) for t in tensors if isinstance(t, gs.Constant))


def _proto(model: onnx.ModelProto | bytes | str | os.PathLike[str]) -> onnx.ModelProto:
    """Parse the model; of a file, everything but the data of large initializers."""
    if isinstance(model, onnx.ModelProto):
        return model
    if not isinstance(model, bytes):
        check_file(model)
    try:
        data = model if isinstance(model, bytes) else protobuf_stream.split(Path(model))[0]
        return onnx.ModelProto.FromString(data)
    except (OSError, DecodeError, ModelError) as error:
        raise ModelError(f"{label(model)}: not a readable ONNX model ({error})") from error


def _proto_specs(proto: onnx.ModelProto, only: set[str] | None) -> list[InputSpec]:
    weights = {t.name for t in proto.graph.initializer}
    read = _names_read(proto.graph) | {o.name for o in proto.graph.output}
    specs, fixed = [], _fixed_sizes(proto)
    for value in proto.graph.input:
        if value.name in weights or (only is not None and value.name not in only):
            continue
        tensor = value.type.tensor_type
        shape: Shape | None = None
        if tensor.HasField("shape"):
            shape = tuple(
                d.dim_value if d.dim_value > 0 else fixed.get(d.dim_param, d.dim_param or None)
                for d in tensor.shape.dim
            )
        kind = type_name(tensor.elem_type).lower()
        specs.append(InputSpec(value.name, _dtype(kind, value.name), shape, value.name in read))
    return specs


def _fixed_sizes(proto: onnx.ModelProto) -> dict[str, int]:
    """Return the sizes of symbols that the file leaves open although it computes with one size alone.

    These are the rows of what a Gemm gives where its bias has as many rows: they cannot be broadcast.
    """
    dims = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input}
    dims |= {t.name: list(t.dims) for t in proto.graph.initializer}
    rows = {
        node.input[0]: dims[node.input[2]][0]
        for node in proto.graph.node
        if node.op_type == "Gemm"
        and len(dims.get("".join(node.input[2:]), ())) == 2
        and not any(a.name == "transA" and a.i for a in node.attribute)
    }
    rows = {name: size for name, size in rows.items() if size > 1}
    if not rows:
        return {}
    graph = onnx.shape_inference.infer_shapes(proto).graph
    first = {v.name: v.type.tensor_type.shape.dim[:1] for v in (*graph.input, *graph.value_info)}
    return {d.dim_param: size for name, size in rows.items() for d in first.get(name, ()) if d.dim_param}


def _names_read(graph: onnx.GraphProto) -> set[str]:
    """Names that nodes of the graph read, or nodes in bodies inside it."""
    found = {name for node in graph.node for name in node.input}
    for attribute in attributes(graph):
        for body in (attribute.g, *attribute.graphs):
            found |= {name for node in body.node for name in node.input} | {o.name for o in body.output}
    return found


def type_name(element_type: int) -> str:
    """Name an ONNX element type.

    Args:
        element_type: A number of TensorProto.DataType.

    Returns:
        ONNX's name, such as FLOAT; the number itself where ONNX has no such type.
    """
    kinds = onnx.TensorProto.DataType
    return kinds.Name(element_type) if element_type in kinds.values() else str(element_type)


def _dtype(kind: str, name: str) -> np.dtype[Any]:
    if kind not in _DTYPES:
        raise ModelError(
            f"input {name!r}: type {kind} is not handled; expected one of {', '.join(_DTYPES)}"
        )
    return np.dtype(_DTYPES[kind])
