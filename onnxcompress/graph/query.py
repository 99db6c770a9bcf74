"""Queries and edits on a graphsurgeon graph that the passes share.

A tensor's consumers include nodes inside the bodies of If, Loop and Scan that capture it: an edit that
looks at consumers is therefore safe for subgraphs, too. Bodies themselves are never edited.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcompress.model import Model

NAMED = 8
"""Nodes that a message names, before it counts."""
DEFAULT_DOMAINS = (None, "", "ai.onnx")


def is_op(node: gs.Node | None, *ops: str) -> TypeGuard[gs.Node]:
    """Whether the node is one of these operators of the default domain."""
    return node is not None and node.op in ops and node.domain in DEFAULT_DOMAINS


def node_label(node: gs.Node) -> str:
    """The node's name; where it has none, that of its first output."""
    return str(node.name or next((t.name for t in node.outputs if t.name), node.op))


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes the tensor; None for inputs and initializers."""
    return tensor.inputs[0] if tensor.inputs else None


def consumers(tensor: gs.Tensor) -> list[gs.Node]:
    """Nodes that read the tensor, each once, those inside subgraphs included."""
    seen: dict[int, gs.Node] = {id(node): node for node in tensor.outputs}
    return list(seen.values())


def is_output(model: Model, tensor: gs.Tensor) -> bool:
    return any(tensor is output for output in model.graph_outputs)


def only_consumer(model: Model, tensor: gs.Tensor) -> gs.Node | None:
    """The one node that reads the tensor, where nothing else sees it."""
    readers = list(tensor.outputs)
    return readers[0] if len(readers) == 1 and not is_output(model, tensor) else None


def reader_names(tensor: gs.Tensor, *but: gs.Node | None) -> str:
    """Who reads the tensor, for a message: some by name, many counted."""
    some = [n for n in tensor.outputs[: NAMED + len(but)] if all(n is not one for one in but)]
    more = len(tensor.outputs) - NAMED - len(but)
    return ", ".join(sorted({node_label(n) for n in some})) + (f" and {more} more" if more > 0 else "")


def value_readers(tensor: gs.Tensor) -> list[gs.Node]:
    """Nodes that read more of the tensor than its shape; twice where they read it twice."""
    return [node for node in tensor.outputs if not is_op(node, "Shape", "Size")]


def read(tensor: gs.Constant) -> np.ndarray:
    """Values of an initializer, without keeping them in memory if they lie in a file."""
    values = tensor._values
    return np.asarray(values.load() if isinstance(values, LazyValues) else values)


def attribute(node: gs.Node, key: str, default: Any = None) -> Any:
    return node.attrs.get(key, default)


def input_at(node: gs.Node, index: int) -> gs.Tensor | None:
    """The input at an index; None where it is left out."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def per_channel(constant: np.ndarray, rank: int, channels: int) -> np.ndarray | None:
    """(channels,) float64: a constant that broadcasts as one number for each channel, or for all."""
    padded = (1,) * (rank - constant.ndim) + constant.shape
    if len(padded) != rank or padded[0] != 1 or padded[1] not in (1, channels) or set(padded[2:]) - {1}:
        return None
    return np.array(np.broadcast_to(constant.reshape(-1).astype(np.float64), (channels,)))
