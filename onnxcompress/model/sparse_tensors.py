"""Read the sparse tensors of a file: initializers, and `sparse_value` attributes of Constant nodes.

graphsurgeon reads typed fields only, so raw data becomes zeros, turns every type into float64, and drops
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
        """Expand the tensor to a dense array in its own type.

        Returns:
            The array.
        """
        return dense(self.tensor)


def dense(sparse: onnx.SparseTensorProto) -> np.ndarray:
    """Expand a sparse tensor to a dense array.

    Args:
        sparse: The tensor; it must have passed `validation.check_sparse`.

    Returns:
        The array, zero but for the tensor's values.
    """
    values, indices = map(onnx.numpy_helper.to_array, (sparse.values, sparse.indices))
    out = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 2:
        out[tuple(indices.T)] = values
    else:
        out.reshape(-1)[indices] = values
    return out


def adopt(graph: gs.Graph, proto: onnx.GraphProto) -> None:
    """Make the sparse tensors of an imported graph readable (see the module's docstring).

    Args:
        graph: The graph that graphsurgeon imported from `proto`; it is changed.
        proto: The original graph.
    """
    for body in (graph, *graph.subgraphs(recursive=True)):
        for tensor in body.tensors().values():
            if isinstance(tensor, gs.Constant) and isinstance(tensor._values, SparseValues):
                tensor._values = SparseInitializer(tensor._values.tensor)
    for node, original in zip(graph.nodes, proto.node, strict=True):
        for attribute in original.attribute:
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
                name = attribute.sparse_tensor.values.name
                node.attrs[attribute.name] = gs.Constant(name, SparseInitializer(attribute.sparse_tensor))
