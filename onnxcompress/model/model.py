r"""Hold an ONNX model for the passes: a graphsurgeon graph, and everything that graphsurgeon would lose.

    file --split--> skeleton --import_onnx--> graph     (weights stay in the file until they are read)
                        \-----------------> envelope  (metadata, value infos, functions, doc strings, …)
    graph + envelope --export--> skeleton --join--> file

graphsurgeon's round trip drops metadata_props, model_version, domain, doc strings of nodes, initializers
listed as inputs, and attributes of types it does not know. So each node, initializer and value info keeps
its original proto, and the export starts from that and writes only what a pass changed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcompress.errors import ModelError
from onnxcompress.model import tensor_storage
from onnxcompress.model.envelope import open_unset_sizes, without_contents
from onnxcompress.model.export import (
    Exported,
    KeptExport,
    copy_exported,
    current,
    export,
    graph_parts,
    with_inputs,
    with_values,
)
from onnxcompress.model.file_metadata import FileMetadata
from onnxcompress.model.gs_import import import_graph
from onnxcompress.model.origins import (
    export_node,
    node_origins,
    sparse_origins,
    tensor_names,
    tensor_origins,
)
from onnxcompress.model.stored_values import StoredValues, check_tensors
from onnxcompress.model.validation import check_graph

Shape = tuple[int | str | None, ...]
Derived = TypeVar("Derived")


class Model(FileMetadata):
    """An ONNX model in memory: `load` or `Model.from_proto` creates it, `save` writes it."""

    def __init__(
        self, proto: onnx.ModelProto, stored: dict[int, LazyValues | np.ndarray], name: str
    ) -> None:
        """Import a ModelProto; it may lack the raw data of the initializers whose index is in `stored`."""
        open_unset_sizes(proto.graph)
        self.name = name
        external = [v for v in stored.values() if isinstance(v, StoredValues) and v.external]
        self.external_data = bool(external)
        self.external_files = {v.file.path for v in external}
        self.input_digest: Callable[[], str] | None = None
        self._analyses: dict[Callable[[Model], Any], Any] = {}
        self._kept_export: KeptExport | None = None
        self._parsed: dict[tuple[str, str | None], Any] = {}
        self.assumed: dict[str, Shape] = {}
        """Shapes of inputs with sizes in place of dimensions that the file leaves open; see `assume`."""
        self.constants: dict[str, np.ndarray | None] = {}
        self._names: set[str] | None = None
        self._removed: set[int] = set()
        self._graph = import_graph(proto, name)
        self._inner = {id(n): n for g in self._graph.subgraphs(recursive=True) for n in g.nodes}
        self._nodes = node_origins(self.graph, proto)
        self._tensors = tensor_origins(self.graph, proto, stored)
        self._sparse = sparse_origins(self.graph)
        self._envelope = onnx.ModelProto()
        self._envelope.CopyFrom(without_contents(proto))

    @staticmethod
    def from_proto(proto: onnx.ModelProto, name: str = "model") -> Model:
        """Copy a complete ModelProto; later changes to it have no effect on the model.

        Args:
            proto: The model, weights included.
            name: The model's name in messages.

        Returns:
            The model.

        Raises:
            ModelError: The proto is invalid, or its weights are in external data.
        """
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise ModelError(
                    f"{name}: initializer {tensor.name!r} lies in external data; load the file instead"
                )
        check_tensors(proto, name, {})
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
        """The outputs of the main graph; cheaper than `graph.outputs` after removals."""
        return list(self._graph.outputs)

    @property
    def names(self) -> set[str]:
        """Names of all tensors, past ones since the last `touch` included; add each name that you give."""
        if self._names is None:
            self._names = tensor_names(self.graph, self._tensors) | self.sparse_names
        return self._names

    def in_body(self, node: gs.Node) -> bool:
        """Return whether a node is inside the body of an If, Loop or Scan. Bodies are never edited.

        Args:
            node: Any node of the model.

        Returns:
            False for nodes of the main graph.
        """
        return id(node) in self._inner

    def touch(self) -> None:
        """Discard everything derived from the graph, after a change to it."""
        self.remove(())
        self._names = None

    def remove(self, nodes: Iterable[gs.Node]) -> None:
        """Remove disconnected nodes from the graph, and discard everything derived from it.

        The list of nodes is filtered once, when it is next read, however many nodes were removed.

        Args:
            nodes: Nodes of the main graph without inputs and outputs.
        """
        self._removed.update(id(node) for node in nodes)
        self._analyses.clear()
        self.constants.clear()
        self.input_digest = None

    def assume(self, shapes: Mapping[str, Shape]) -> None:
        """Assume sizes for the dimensions that an input leaves open, in everything that is inferred.

        Graph and file stay as they are: an open dimension is written open. An open batch is taken as 1.

        Args:
            shapes: Shapes by name of the input; they replace earlier assumptions.
        """
        if self.assumed != dict(shapes):
            self.assumed = dict(shapes)
            self._analyses.clear()

    def analysis(self, compute: Callable[[Model], Derived]) -> Derived:
        """Compute a property of the graph, once until the graph changes.

        Args:
            compute: A function or class that takes the model alone, such as `infer_shapes` or `Topology`.

        Returns:
            What it returned for this graph; all callers share the object, so it must not be changed.
        """
        if compute not in self._analyses:
            self._analyses[compute] = compute(self)
        result: Derived = self._analyses[compute]
        return result

    def copy(self, edit: Callable[[onnx.ModelProto], None] | None = None) -> Model:
        """Copy the model; unchanged weights are shared.

        Args:
            edit: Changes the proto of the copy first, which lacks raw data of weights; it may add
                initializers.

        Returns:
            An independent model.
        """
        skeleton, tensors = self._export()
        stored: dict[int, LazyValues | np.ndarray] = {}
        for index, (proto, values) in enumerate(tensors):
            skeleton.graph.initializer.append(proto)
            if values is not None:
                stored[index] = values
        if edit is not None:
            edit(skeleton)
        twin = Model(skeleton, stored, self.name)
        twin.external_data = self.external_data
        twin.assumed = dict(self.assumed)
        twin.input_digest = self.input_digest
        twin._parsed = self._parsed
        if edit is None and self._kept_export is not None:  # what the copy exports need not be made again
            twin._kept_export = (graph_parts(twin.graph), self._kept_export[1])
        return twin

    def same_state(self, other: Model) -> bool:
        """Return whether this is a copy of another model, and neither was changed since.

        Args:
            other: The other model.

        Returns:
            Whether both write the same file, but for the metadata.
        """
        return self._export_now() is other._export_now()

    def become(self, other: Model) -> None:
        """Replace the contents by those of another model; name and use of external data stay.

        This is for libraries that return a model of their own.

        Args:
            other: The model to take over; it must not be used afterwards.
        """
        kept = {key: getattr(self, key) for key in ("name", "external_data", "external_files", "assumed")}
        self.__dict__.update(other.__dict__ | kept)
        self.touch()

    def digest(self) -> str:
        """Compute the SHA-256 of the model as it was read or, once changed, as `save` would write it.

        Returns:
            The digest in hexadecimal.
        """
        if self.input_digest is not None:
            return self.input_digest()
        return tensor_storage.digest(*self._new_export())

    def to_proto(self) -> onnx.ModelProto:
        """Export the complete model, with all weights in memory; from 2 GB on protobuf cannot serialize it.

        Returns:
            A new ModelProto.

        Raises:
            ModelError: A file that holds weights was cut short.
        """
        return with_values(*self._export())

    def to_bytes(self) -> bytes:
        """Serialize the complete model, with one copy of its weights in memory; it must be below 2 GB.

        Returns:
            A serialized ModelProto, as `save` writes it.

        Raises:
            ModelError: A file that holds weights was cut short.
        """
        buffer = io.BytesIO()
        tensor_storage.write(buffer, *self._export())
        return buffer.getvalue()

    def skeleton(self) -> onnx.ModelProto:
        """Export the model with its large initializers as graph inputs: a small, valid model to analyse.

        Returns:
            A new ModelProto.
        """
        return with_inputs(*self._export())

    def _new_export(self) -> Exported:
        """Export the model as `save` writes it: the graph, and its initializers apart."""
        return export(self._envelope, self.graph, self._nodes, self._tensors, self._sparse)

    def _export(self) -> Exported:
        """Copy the export of this state of the graph, which is made once; metadata are those of now."""
        return copy_exported(self._export_now(), self._envelope.metadata_props)

    def _export_now(self) -> Exported:
        """Return the export of this state of the graph; that it is of this state is checked each time."""
        self._kept_export = current(self._kept_export, self.graph, self._new_export)
        return self._kept_export[1]

    def node_proto(self, node: gs.Node) -> onnx.NodeProto:
        """Export a node of the main graph.

        Args:
            node: The node.

        Returns:
            The proto as `save` would write it.
        """
        return export_node(node, self._nodes.get(id(node)))
