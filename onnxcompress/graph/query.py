"""Queries on a graphsurgeon graph that the passes share.

The consumers of a tensor include nodes in the bodies of If, Loop and Scan that capture it: an edit that
looks at consumers is therefore safe for subgraphs, too. Bodies themselves are never edited.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcompress.errors import ModelError
from onnxcompress.model import Model

NAMED = 8
"""Nodes that a message names; more are counted."""
DEFAULT_DOMAINS = (None, "", "ai.onnx")
ARRANGING = (
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Identity",
    "Cast",
)
"""Operators that arrange the values of their first input."""


def is_op(node: gs.Node | None, *ops: str) -> TypeGuard[gs.Node]:
    """Return whether a node is one of these operators of the default domain.

    Args:
        node: A node, or None.
        *ops: Operator names.

    Returns:
        False for None and for operators of other domains.
    """
    return node is not None and node.op in ops and node.domain in DEFAULT_DOMAINS


def node_label(node: gs.Node) -> str:
    """Name a node for a message.

    Args:
        node: The node.

    Returns:
        Its name; where it has none, the name of its first output, or else its operator.
    """
    return str(node.name or next((t.name for t in node.outputs if t.name), node.op))


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """Find the node that computes a tensor.

    Args:
        tensor: The tensor.

    Returns:
        The node; None for graph inputs and initializers.
    """
    return tensor.inputs[0] if tensor.inputs else None


def consumers(tensor: gs.Tensor) -> list[gs.Node]:
    """List the nodes that read a tensor, including nodes inside subgraphs.

    Args:
        tensor: The tensor.

    Returns:
        Each node once.
    """
    seen: dict[int, gs.Node] = {id(node): node for node in tensor.outputs}
    return list(seen.values())


def read_inputs(model: Model) -> list[gs.Tensor]:
    """List the graph's inputs whose values matter: a node reads them, or they are outputs, too.

    Args:
        model: The model.

    Returns:
        The inputs, in the graph's order.
    """
    return [
        t
        for t in model.graph.inputs
        if not isinstance(t, gs.Constant) and (t.outputs or is_output(model, t))
    ]


class SeveralInputs(ModelError):
    """A network reads several inputs, where only one is handled."""


def data_input(model: Model) -> gs.Tensor:
    """Return the only input that the network reads.

    Args:
        model: The model.

    Returns:
        The input.

    Raises:
        SeveralInputs: The network reads several.
        ModelError: It reads none.
    """
    inputs = read_inputs(model)
    if len(inputs) != 1:
        names = ", ".join(t.name for t in inputs) or "none"
        kind = SeveralInputs if inputs else ModelError
        raise kind(
            f"{model.name}: only networks with one input are handled, this one reads {len(inputs)} "
            f"({names}); turn all but one into initializers with the values that they have in use"
        )
    return inputs[0]


def is_output(model: Model, tensor: gs.Tensor) -> bool:
    """Return whether a tensor is an output of the main graph.

    Args:
        model: The model.
        tensor: The tensor.

    Returns:
        True for the tensor itself, not for a copy of it.
    """
    return any(tensor is output for output in model.graph_outputs)


def is_captured(model: Model, tensor: gs.Tensor) -> bool:
    """Return whether the body of an If, Loop or Scan reads a tensor of the main graph.

    Args:
        model: The model.
        tensor: The tensor.

    Returns:
        Whether one does: it must keep its name and its values, since bodies are not edited.
    """
    return any(model.in_body(node) for node in tensor.outputs)


def sigmoid_outputs(model: Model) -> frozenset[str]:
    """Find the outputs that hold what a Sigmoid gives, alone or concatenated with other values.

    Args:
        model: The model.

    Returns:
        Their names.
    """
    found = set()
    for output in model.graph_outputs:
        pending, seen = [output], set[int]()
        while pending:
            node = producer(pending.pop())
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            if is_op(node, "Sigmoid"):
                found.add(str(output.name))
            elif is_op(node, "Concat"):
                pending += node.inputs
            elif is_op(node, *ARRANGING):
                pending.append(node.inputs[0])
    return frozenset(found)


def before_softmax(tensor: gs.Tensor) -> gs.Tensor:
    """Go back from probabilities to the scores that they are made of.

    Args:
        tensor: A tensor, such as an output of the network.

    Returns:
        What its softmax reads; the tensor where none makes it.
    """
    while is_op(maker := producer(tensor), "Softmax", "LogSoftmax", "Identity"):
        tensor = maker.inputs[0]
    return tensor


def only_consumer(model: Model, tensor: gs.Tensor) -> gs.Node | None:
    """Find the only reader of a tensor.

    Args:
        model: The model.
        tensor: The tensor.

    Returns:
        The node; None where the tensor is a graph output, or read more than once or inside a body.
    """
    readers = list(tensor.outputs)
    alone = len(readers) == 1 and not is_output(model, tensor) and not model.in_body(readers[0])
    return readers[0] if alone else None


def reader_names(tensor: gs.Tensor, *but: gs.Node | None) -> str:
    """List the readers of a tensor for a message.

    Args:
        tensor: The tensor.
        *but: Nodes to leave out.

    Returns:
        The names of up to NAMED readers, and how many more there are.
    """
    some = [n for n in tensor.outputs[: NAMED + len(but)] if all(n is not other for other in but)]
    more = len(tensor.outputs) - NAMED - len(but)
    return ", ".join(sorted({node_label(n) for n in some})) + (f" and {more} more" if more > 0 else "")


def value_readers(tensor: gs.Tensor) -> list[gs.Node]:
    """List the nodes that read the tensor's values and not only its shape.

    Args:
        tensor: The tensor.

    Returns:
        The nodes; a node that reads the tensor twice is listed twice.
    """
    return [node for node in tensor.outputs if not is_op(node, "Shape", "Size")]


def read(tensor: gs.Constant) -> np.ndarray:
    """Read the values of an initializer; those in a file are not kept in memory.

    Args:
        tensor: The initializer.

    Returns:
        Its values.

    Raises:
        ModelError: The file that holds them was cut short.
    """
    values = tensor._values
    return np.asarray(values.load() if isinstance(values, LazyValues) else values)


def attribute(node: gs.Node, key: str, default: Any = None) -> Any:
    """Read an attribute of a node.

    Args:
        node: The node.
        key: Name of the attribute.
        default: Value where the node does not have it.

    Returns:
        The attribute's value.
    """
    return node.attrs.get(key, default)


def auto_pad(node: gs.Node) -> str:
    """Read how a node pads its input: an empty text is the default, as in onnxruntime.

    Args:
        node: A convolution or a pooling.

    Returns:
        `NOTSET`, `VALID`, `SAME_UPPER` or `SAME_LOWER`.
    """
    return str(attribute(node, "auto_pad") or "NOTSET")


def input_at(node: gs.Node, index: int) -> gs.Tensor | None:
    """Look up an input of a node.

    Args:
        node: The node.
        index: Position of the input.

    Returns:
        The tensor; None where the node does not have this input.
    """
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def per_channel(constant: np.ndarray, rank: int, channels: int) -> np.ndarray | None:
    """Read a constant that broadcasts as one number per channel (axis 1), or as one number for all.

    Args:
        constant: Values of the constant.
        rank: Rank of the tensor that it is combined with.
        channels: Number of channels of that tensor.

    Returns:
        Shape (channels,), float64; None where the constant varies along another axis.
    """
    padded = (1,) * (rank - constant.ndim) + constant.shape
    if len(padded) != rank or padded[0] != 1 or padded[1] not in (1, channels) or set(padded[2:]) - {1}:
        return None
    return np.array(np.broadcast_to(constant.reshape(-1).astype(np.float64), (channels,)))
