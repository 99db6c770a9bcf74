"""Nodes in topological order, and the tensors that a node reads."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import CycleError

import onnx_graphsurgeon as gs

from onnxcompress.errors import ModelError
from onnxcompress.model import Model


def node_reads(node: gs.Node) -> list[gs.Tensor]:
    """List the tensors that a node reads, and those that its bodies capture from outside.

    Args:
        node: A node; the bodies of If, Loop and Scan are its attributes.

    Returns:
        Tensors in the order of the inputs, those that are left out excluded.
    """
    reads = [t for t in node.inputs if not t.is_empty()]
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            inner = {id(t) for t in value.inputs} | {id(t) for n in value.nodes for t in n.outputs}
            for one in value.nodes:
                reads += [t for t in node_reads(one) if id(t) not in inner]
    return reads


def sorted_nodes(model: Model) -> list[gs.Node]:
    """Put the nodes in topological order: the file's own where it is one.

    Args:
        model: The model whose main graph is put in order; it stays as it is.

    Returns:
        All nodes of the main graph.

    Raises:
        ModelError: The graph has a cycle.
    """
    nodes = list(model.graph.nodes)
    maker_of = {id(tensor): place for place, node in enumerate(nodes) for tensor in node.outputs}
    waits = [[maker_of[id(t)] for t in node_reads(node) if id(t) in maker_of] for node in nodes]
    try:
        return [nodes[place] for place in topological_order(waits)]
    except CycleError as error:
        name = nodes[error.args[1][0]].name
        raise ModelError(f"{model.name}: the graph has a cycle through node {name!r}") from error


def topological_order(waits: Sequence[Sequence[int]]) -> list[int]:
    """Sort items topologically, each directly after the last of the items that it depends on.

    Runtimes that run a file's nodes in order then need little memory; `graphlib` would put all items
    without dependencies, such as the dequantized weights of every layer, in front.

    Args:
        waits: For each item, the indices of the items that it depends on.

    Returns:
        All indices in order; unchanged where the items are sorted already.

    Raises:
        CycleError: There is a cycle; the error's second argument has an index of it.
    """
    order: list[int] = []
    is_done: dict[int, bool] = {}
    for root in range(len(waits)):
        stack = [root]
        while stack:
            place = stack[-1]
            missing = [before for before in waits[place] if not is_done.get(before, False)]
            if missing and place in is_done:
                raise CycleError("a cycle", [place])
            if missing:
                is_done[place] = False
                stack.extend(missing)
                continue
            stack.pop()
            if not is_done.get(place, False):
                is_done[place] = True
                order.append(place)
    return order
