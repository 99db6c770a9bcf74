"""Order, data flow and trunk of a graph, computed once and asked often. Linear in nodes."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxcompress.graph.order import node_reads, sorted_nodes
from onnxcompress.graph.query import is_op, producer
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model, Shape


class Topology:
    """Facts about a graph as it is now; make a new one after a change.

    `order`    nodes in topological order
    `index`    id(node) -> place in it
    `dynamic`  ids of the tensors that depend on a graph input, by value or by shape
    `data`     ids of those that carry data: reached from an input without passing a Shape or Size, or the
               operand of a CastLike that only gives its type
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.order = sorted_nodes(model)
        self.index = {id(node): i for i, node in enumerate(self.order)}
        self.dynamic = {id(t) for t in model.graph.inputs}
        self.data = set(self.dynamic)
        for node in self.order:
            for ids, reads in ((self.dynamic, node_reads(node)), (self.data, _data_reads(node))):
                if any(id(t) in ids for t in reads):
                    ids.update(id(t) for t in node.outputs)
        self._trunk: list[gs.Tensor] | None = None

    def position(self, tensor: gs.Tensor) -> int:
        """Place of the node that makes the tensor; -1 for inputs and initializers."""
        node = producer(tensor)
        return -1 if node is None else self.index[id(node)]

    def shape(self, tensor: gs.Tensor) -> Shape | None:
        """Shape by inference; None where even the rank is unknown."""
        return tensor_shapes(self.model).get(tensor.name)

    def trunk(self) -> list[gs.Tensor]:
        """Tensors through which every data path from the inputs to the outputs goes, in order.

        A tensor is one exactly if, once it is made, nothing else that was made before is still needed.
        """
        if self._trunk is None:
            last: dict[int, int] = {}
            for place, node in enumerate(self.order):
                if not is_op(node, "Shape", "Size"):  # who reads only a shape needs no data
                    last.update((id(tensor), place) for tensor in node_reads(node))
            ends = {id(t): len(self.order) for t in self.model.graph.outputs}
            found: list[gs.Tensor] = []
            farthest = -1  # until where something made so far, but for the newest tensor, is needed
            made = list(self.model.graph.inputs)
            if len(made) == 1:
                found.append(made[0])
            pending = max((max(last.get(id(t), -1), ends.get(id(t), -1)) for t in made), default=-1)
            for place, node in enumerate(self.order):
                farthest = max(farthest, pending)
                pending = -1
                outputs = [t for t in node.outputs if id(t) in self.data and not t.is_empty()]
                for tensor in outputs:
                    pending = max(pending, last.get(id(tensor), -1), ends.get(id(tensor), -1))
                plain = "Sequence" not in node.op or node.op == "SequenceAt"
                if plain and len(outputs) == 1 and farthest <= place and pending > place:
                    found.append(outputs[0])
            self._trunk = found
        return self._trunk

    def between(self, entry: gs.Tensor, exit: gs.Tensor) -> tuple[gs.Node, ...]:
        """Nodes with data between two neighbouring tensors of the trunk, the exit's own included."""
        start, end = self.position(entry), self.position(exit)
        return tuple(
            n for n in self.order[start + 1 : end + 1] if any(id(t) in self.dynamic for t in n.outputs)
        )

    def feature(self) -> gs.Tensor | None:
        """The features before the global pool: the last spatial tensor of the trunk (PRACTISE §3.2).

        Rank 4 (or 3 and 5 in 1-d and 3-d networks) with a spatial extent above 1; None if there is none.
        """
        for tensor in reversed(self.trunk()):
            shape = self.shape(tensor)
            if shape is not None and len(shape) >= 3 and any(d != 1 for d in shape[2:]):
                return tensor
        return None


def _data_reads(node: gs.Node) -> list[gs.Tensor]:
    """Those of which the node reads more than shape or type."""
    if is_op(node, "Shape", "Size"):
        return []
    return list(node.inputs[:1]) if is_op(node, "CastLike") else node_reads(node)
