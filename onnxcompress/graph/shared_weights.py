"""Give linear layers that share a weight copies of their own, which can then be changed one by one.

    w --> layer 1, layer 2          w --> layer 1, w_copy --> layer 2

The outputs stay the same. Copies are made where the user asks for them, or where all of them are small: the
file grows by them. Does not handle: weights behind Identity, Cast or Transpose.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxcompress.account import Change
from onnxcompress.graph.edit import lift_weights, set_input, unique_name
from onnxcompress.graph.linear_layer import LINEAR_OPS
from onnxcompress.graph.query import is_op, is_output, read, value_readers
from onnxcompress.model import Model

SMALL = 0.01
"""Bytes of all copies, over those of all initializers, up to which they are made unasked."""


def copy_shared_weights(model: Model, *, asked: bool) -> list[Change]:
    """Copy weights that several linear layers read, or layers and other nodes, in place.

    Args:
        model: The model.
        asked: Copy them also where they are not small.

    Returns:
        The copies, for the account of a pass.
    """
    lift_weights(model, *LINEAR_OPS)
    constants = [t for t in model.graph.tensors().values() if isinstance(t, gs.Constant)]
    extra = {id(t): _extra_reads(model, t) for t in constants}
    shared = [t for t in constants if extra[id(t)]]
    added = sum(len(extra[id(t)]) * t._values.nbytes for t in shared)
    if not shared or not (asked or added <= SMALL * sum(t._values.nbytes for t in constants)):
        return []
    for tensor in shared:
        for node, index in extra[id(tensor)]:
            set_input(node, index, gs.Constant(unique_name(model, f"{tensor.name}_copy"), read(tensor)))
    model.touch()
    return [Change(t.name, f"shared weight copied {len(extra[id(t)])} times") for t in shared]


def _extra_reads(model: Model, tensor: gs.Constant) -> list[tuple[gs.Node, int]]:
    """List the inputs of linear layers at which a copy must replace the weight for none to share it."""
    readers = list({id(node): node for node in value_readers(tensor)}.values())
    reads = [(n, i) for n in readers for i, t in enumerate(n.inputs) if t is tensor]
    of_layers = [
        (n, i) for n, i in reads if is_op(n, *LINEAR_OPS) and i == _weight_at(n) and not model.in_body(n)
    ]
    alone = len(of_layers) == len(reads) and not is_output(model, tensor)
    return of_layers[1:] if alone else of_layers


def _weight_at(node: gs.Node) -> int:
    return 0 if node.op == "MatMul" and isinstance(node.inputs[0], gs.Constant) else 1
