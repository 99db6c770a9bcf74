"""An ONNX model as the passes see it: a graphsurgeon graph, and all that graphsurgeon would lose.

    file --split--> skeleton --import_onnx--> graph     (weights stay in the file until they are read)
                        \\-----------------> envelope  (metadata, value infos, functions, doc strings, …)
    graph + envelope --export--> skeleton --join--> file

graphsurgeon's round trip drops metadata_props, model_version, domain, doc strings of nodes, initializers
listed as inputs, and attributes of types it does not know. So each node, initializer and value info keeps
its original proto, and the export starts from that and writes only what a pass changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnxcompress.errors import ModelError
from onnxcompress.model import protobuf_stream, tensor_storage
from onnxcompress.model.envelope import sync_values, without_contents
from onnxcompress.model.gs_import import import_graph
from onnxcompress.model.origins import export_node, node_origins, tensor_origins
from onnxcompress.model.tensor_storage import StoredValues
from onnxcompress.model.validation import check_graph
from onnxcompress.version import __version__

PROVENANCE = "onnxcompress.provenance"
"""Key in metadata_props: JSON list of {pass, options, version, input_sha256, inputs}, oldest first."""

Shape = tuple[int | str | None, ...]

Analysis = TypeVar("Analysis")


class Model:
    """A model in memory. Create it with `load` or `Model.from_proto`; write it with `save`."""

    def __init__(
        self, proto: onnx.ModelProto, stored: dict[int, LazyValues | np.ndarray], name: str
    ) -> None:
        """`proto` may lack the raw data of the initializers whose index is in `stored`."""
        self.name = name
        external = [v for v in stored.values() if isinstance(v, StoredValues) and v.external]
        self.external_data = bool(external)
        self.external_files = {v.file.path for v in external}
        self.input_digest: Callable[[], str] | None = None
        self._analyses: dict[Callable[[Model], Any], Any] = {}
        self.constants: dict[str, np.ndarray | None] = {}
        self._names: set[str] | None = None
        self._removed: set[int] = set()
        self._graph = import_graph(proto, name)
        self._inner = {id(n): n for g in self._graph.subgraphs(recursive=True) for n in g.nodes}
        self._nodes = node_origins(self.graph, proto)
        self._tensors = tensor_origins(self.graph, proto, stored)
        self._envelope = onnx.ModelProto()
        self._envelope.CopyFrom(without_contents(proto))

    @staticmethod
    def from_proto(proto: onnx.ModelProto, name: str = "model") -> Model:
        """Wrap a complete ModelProto. It is read, never changed; later changes to it are not seen."""
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise ModelError(
                    f"{name}: initializer {tensor.name!r} lies in external data; load the file instead"
                )
        tensor_storage.check_tensors(proto, name, {})
        check_graph(proto, name)
        own = onnx.ModelProto()
        own.CopyFrom(proto)
        model = Model(own, {}, name)
        model.input_digest = lambda: hashlib.sha256(own.SerializeToString(deterministic=True)).hexdigest()
        return model

    @property
    def graph(self) -> gs.Graph:
        """The main graph as it is now."""
        if self._removed:
            self._graph.nodes[:] = [n for n in self._graph.nodes if id(n) not in self._removed]
            self._removed.clear()
        return self._graph

    @property
    def graph_outputs(self) -> Sequence[gs.Tensor]:
        """The outputs of the main graph, without a look at its nodes."""
        return list(self._graph.outputs)

    @property
    def names(self) -> set[str]:
        """Names that a tensor of the model has, or had since the last `touch`: add those you give."""
        if self._names is None:
            self._names = set(self.graph.tensors()) | self.sparse_names
            self._names |= {t.name for t in self.graph.inputs}
            self._names |= {origin.constant.name for origin in self._tensors}
            for subgraph in self.graph.subgraphs(recursive=True):
                self._names |= set(subgraph.tensors())
        return self._names

    def in_body(self, node: gs.Node) -> bool:
        """Whether the node is inside the body of an If, Loop or Scan. Bodies are never edited."""
        return id(node) in self._inner

    @property
    def opset(self) -> int:
        """Version of the default operator set; 1 where the file names none."""
        versions = [o.version for o in self._envelope.opset_import if o.domain in ("", "ai.onnx")]
        return max(versions, default=1)

    @property
    def ir_version(self) -> int:
        return int(self._envelope.ir_version)

    @property
    def sparse_names(self) -> set[str]:
        """Names of the sparse initializers."""
        return {sparse.values.name for sparse in self._envelope.graph.sparse_initializer}

    @property
    def functions(self) -> Sequence[onnx.FunctionProto]:
        """The model's local functions, as in the file."""
        return list(self._envelope.functions)

    @property
    def producer(self) -> str:
        return f"{self._envelope.producer_name} {self._envelope.producer_version}".strip()

    @property
    def metadata(self) -> dict[str, str]:
        """A copy of the model's metadata_props."""
        return {p.key: p.value for p in self._envelope.metadata_props}

    def set_metadata(self, key: str, value: str | None) -> None:
        """Set one entry of metadata_props, or remove it where `value` is None."""
        if self.metadata.get(key) == value:
            return
        self.input_digest = None  # what would be saved is no longer what was read
        entries = self._envelope.metadata_props
        for at in [i for i, p in enumerate(entries) if p.key == key][::-1]:
            if value is None:
                del entries[at]
            else:
                entries[at].value = value
                return
        if value is not None:
            entries.add(key=key, value=value)

    def touch(self) -> None:
        """Say that the graph changed: what was derived from it is forgotten."""
        self.remove(())
        self._names = None

    def remove(self, nodes: Iterable[gs.Node]) -> None:
        """Take nodes that are connected to nothing any more out of the graph.

        They leave its list when that is next looked at, all at once: many removals cost one scan.
        """
        self._removed.update(id(node) for node in nodes)
        self._analyses.clear()
        self.constants.clear()
        self.input_digest = None

    def analysis(self, compute: Callable[[Model], Analysis]) -> Analysis:
        """What `compute` says of the graph as it is now, computed once until the graph changes.

        Args:
            compute: A function, or a class, of the model alone, such as `infer_shapes` or `Topology`.

        Returns:
            What it returned for this graph; the same object to all who ask, so it is read only.
        """
        if compute not in self._analyses:
            self._analyses[compute] = compute(self)
        found: Analysis = self._analyses[compute]
        return found

    def copy(self) -> Model:
        """An independent model; unchanged weights are shared, not copied."""
        skeleton, tensors = self._export()
        stored: dict[int, LazyValues | np.ndarray] = {}
        for index, (proto, values) in enumerate(tensors):
            skeleton.graph.initializer.append(proto)
            if values is not None:
                stored[index] = values
        twin = Model(skeleton, stored, self.name)
        twin.external_data = self.external_data
        twin.input_digest = self.input_digest
        return twin

    def become(self, other: Model) -> None:
        """Take the contents of another model, which is not to be used any more; the name stays.

        For what comes of a library that returns a model of its own. Weights that lay in external data do
        so again when it is saved.
        """
        kept = {key: getattr(self, key) for key in ("name", "external_data", "external_files")}
        self.__dict__.update(other.__dict__ | kept)
        self.touch()

    def provenance(self) -> list[dict[str, Any]]:
        """What was done to this model so far, oldest first."""
        try:
            entries = json.loads(self.metadata.get(PROVENANCE, "[]"))
        except (ValueError, RecursionError):  # RecursionError: nested too deep
            return []
        named = isinstance(entries, list) and all(isinstance(e, dict) and "pass" in e for e in entries)
        return entries if named else []

    def add_provenance(
        self, name: str, options: dict[str, Any], digest: str, inputs: Any | None = None
    ) -> None:
        """Append to the provenance; `digest` is the SHA-256 of what went in, `inputs` what was learned from
        (JSON: source, count and seed of each)."""
        entry = {"pass": name, "options": options, "version": __version__, "input_sha256": digest}
        if inputs is not None:
            entry["inputs"] = inputs
        self.set_metadata(PROVENANCE, json.dumps([*self.provenance(), entry]))

    def digest(self) -> str:
        """SHA-256 of the model as it was read; after a change, of what `save` would write."""
        if self.input_digest is not None:
            return self.input_digest()
        sha = _Hasher()
        self._write(sha)
        return sha.hexdigest()

    def to_proto(self) -> onnx.ModelProto:
        """The complete model as a ModelProto, weights in memory. Raises ModelError from 2 GB on."""
        proto, tensors = self._export()
        for tensor, values in tensors:
            if values is not None:
                tensor.raw_data = tensor_storage.raw_bytes(values)
            proto.graph.initializer.append(tensor)
        return proto

    def skeleton(self) -> onnx.ModelProto:
        """The model with large initializers turned into graph inputs: small, valid, for analysis."""
        proto, tensors = self._export()
        listed = {i.name for i in proto.graph.input}
        for tensor, values in tensors:
            if values is None:
                proto.graph.initializer.append(tensor)
            elif tensor.name not in listed:
                proto.graph.input.append(
                    onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                )
        return proto

    def _export(self) -> tuple[onnx.ModelProto, list[tensor_storage.Stored]]:
        proto = onnx.ModelProto()
        proto.CopyFrom(self._envelope)
        proto.graph.node.extend(self.node_proto(node) for node in self.graph.nodes)
        tensors = self._export_tensors()
        sync_values(proto, self.graph, {tensor.name for tensor, _ in tensors})
        if proto.ir_version < 4:  # IR 3: an initializer must be listed as an input, too
            listed = {i.name for i in proto.graph.input}
            proto.graph.input.extend(
                onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
                for t, _ in tensors
                if t.name not in listed
            )
        return proto, tensors

    def node_proto(self, node: gs.Node) -> onnx.NodeProto:
        """The node of the main graph as it is written now."""
        return export_node(node, self._nodes.get(id(node)))

    def _export_tensors(self) -> list[tensor_storage.Stored]:
        outputs = {t.name for t in self.graph.outputs}
        known: set[str] = set()
        tensors: list[tensor_storage.Stored] = []
        for origin in self._tensors:
            constant = origin.constant
            known.add(constant.name)
            if constant.outputs or not origin.used or constant.name in outputs:
                tensors.append(tensor_storage.export(constant, origin.proto, origin.values))
        for node in self.graph.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and tensor.name not in known:
                    known.add(tensor.name)
                    if not isinstance(tensor._values, SparseValues):
                        tensors.append(tensor_storage.export(tensor, None, None))
        return tensors

    def _write(self, file: Any) -> None:
        proto, tensors = self._export()
        tensor_storage.write(file, proto, tensors)


def load(path: str | os.PathLike[str]) -> Model:
    """Read an ONNX file; weights, inside the file or external, stay on disk until they are read.

    Raises ModelError where the file is missing, broken, cut short, or its external data is missing
    or lies outside the file's folder.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"{file}: {'a folder; name an ONNX file' if file.is_dir() else 'no such file'}")
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
    tensor_storage.inline_nested(proto, file)
    tensor_storage.check_tensors(proto, file.name, places)
    model = Model(proto, tensor_storage.stored_values(proto, file, places), file.name)
    model.input_digest = lambda: tensor_storage.file_digest(file)
    return model


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write the model whole or not at all; beyond 2 GB, or where the input had it so, weights go to
    `<path>.data` beside it.

    Raises ModelError where the folder cannot be written.
    """
    proto, tensors = model._export()
    tensor_storage.save(Path(path), proto, tensors, external=model.external_data)


class _Hasher:
    """A file that is only hashed."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._sha.update(data)

    def writelines(self, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            self._sha.update(piece)

    def hexdigest(self) -> str:
        return self._sha.hexdigest()
