"""Nodes in topological order, and the tensors that a node reads."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxcompress.errors import ModelError
from onnxcompress.graph.query import producer
from onnxcompress.model import Model


def node_reads(node: gs.Node) -> list[gs.Tensor]:
    """Inputs of a node, and what its bodies capture from outside."""
    reads = [t for t in node.inputs if not t.is_empty()]
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            inner = {id(t) for n in value.nodes for t in n.outputs}
            for one in value.nodes:
                reads += [t for t in node_reads(one) if id(t) not in inner]
    return reads


def sorted_nodes(model: Model) -> list[gs.Node]:
    """Nodes in topological order (Kahn), in the file's own order where that is one."""
    nodes = list(model.graph.nodes)
    made: set[int] = set()
    if _is_sorted(nodes, made):
        return nodes
    makers = {id(t): n for n in nodes for t in n.outputs}
    order: list[gs.Node] = []
    state: dict[int, int] = {}
    for root in nodes:
        stack = [root]
        while stack:
            node = stack[-1]
            if state.get(id(node)) == 2:
                stack.pop()
                continue
            missing = [
                m
                for t in node_reads(node)
                if (m := makers.get(id(t))) is not None and state.get(id(m)) != 2
            ]
            if state.get(id(node)) == 1 and missing:
                raise ModelError(f"{model.name}: the graph has a cycle through node {node.name!r}")
            state[id(node)] = 1
            if missing:
                stack.extend(missing)
            else:
                state[id(node)] = 2
                order.append(node)
                stack.pop()
    return order


def _is_sorted(nodes: list[gs.Node], made: set[int]) -> bool:
    for node in nodes:
        if any(producer(t) is not None and id(t) not in made for t in node.inputs if not t.is_empty()):
            return False
        made.update(id(t) for t in node.outputs)
    return True
