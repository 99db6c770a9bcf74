"""Self-gated activations, y = x g(x) with a gate g from 0 to 1: HardSwish, GELU, Mish, SiLU as two nodes.

They are the identity for large x, and nearly 0 below some value.
HardSwish written as Add, Clip, Mul and Div is brought into that form first (`graph.hard_sigmoid`).
Does not handle: GELU written out.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxcompress.graph.query import is_op, producer, value_readers

ACTIVATIONS = ("HardSwish", "Gelu", "Mish", "Swish")
GATES = ("Sigmoid", "HardSigmoid")


def gated_output(tensor: gs.Tensor) -> gs.Tensor | None:
    """Find the output of the self-gated activation that alone reads a tensor.

    Args:
        tensor: The tensor x.

    Returns:
        The tensor x g(x); None where something else reads x.
    """
    readers = value_readers(tensor)
    if len(readers) == 1 and is_op(readers[0], *ACTIVATIONS):
        return readers[0].outputs[0]
    products = [node for node in readers if _is_product(node, tensor)]
    if len(readers) != 2 or len(products) != 1:
        return None
    gate = next(t for t in products[0].inputs if t is not tensor)
    return products[0].outputs[0] if value_readers(gate) == products else None


def is_gated(tensor: gs.Tensor) -> bool:
    """Tell whether a tensor is the output of a self-gated activation.

    Args:
        tensor: The tensor.

    Returns:
        Whether a node of that kind gives it.
    """
    node = producer(tensor)
    return is_op(node, *ACTIVATIONS) or any(_is_product(node, t) for t in (node.inputs if node else ()))


def _is_product(node: gs.Node | None, tensor: gs.Tensor) -> bool:
    """Return whether the node multiplies the tensor by a gate that it opens itself."""
    if not is_op(node, "Mul"):
        return False
    others = [t for t in node.inputs if t is not tensor]
    gate = producer(others[0]) if len(others) == 1 else None
    return is_op(gate, *GATES) and gate.inputs[0] is tensor
