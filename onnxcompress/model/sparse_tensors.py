"""Sparse tensors of a file: initializers, and what `sparse_value` of a Constant holds.

graphsurgeon reads typed fields only, so raw data becomes zeros, gives every type as float64, and drops
attributes that are sparse tensors. Here both encodings of values and of indices are read, and both layouts:
(number of values,) indices into the flattened tensor, or (number of values, rank) coordinates.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import SparseValues

VALUE = "sparse_value"
"""Attribute of Constant."""


class SparseInitializer(SparseValues):  # type: ignore[misc]
    """Values of a sparse tensor, read when they are needed."""

    def load(self) -> np.ndarray:
        """The tensor written out, in its own type."""
        return dense(self.tensor)


def dense(sparse: onnx.SparseTensorProto) -> np.ndarray:
    """The tensor written out: zeros but for its values. It must have passed `checking.check_sparse`."""
    values, indices = map(onnx.numpy_helper.to_array, (sparse.values, sparse.indices))
    out = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 2:
        out[tuple(indices.T)] = values
    else:
        out.reshape(-1)[indices] = values
    return out


def adopt(graph: gs.Graph, proto: onnx.GraphProto) -> None:
    """Let a graph that graphsurgeon made of `proto` read its sparse tensors from here."""
    for one in (graph, *graph.subgraphs(recursive=True)):
        for tensor in one.tensors().values():
            if isinstance(tensor, gs.Constant) and isinstance(tensor._values, SparseValues):
                tensor._values = SparseInitializer(tensor._values.tensor)
    for node, original in zip(graph.nodes, proto.node, strict=True):
        for attribute in original.attribute:
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
                name = attribute.sparse_tensor.values.name
                node.attrs[attribute.name] = gs.Constant(name, SparseInitializer(attribute.sparse_tensor))
