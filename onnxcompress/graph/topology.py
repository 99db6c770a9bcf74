"""Topological order, data flow and trunk of a graph, computed once. Linear in the number of nodes."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from onnxcompress.graph.order import node_reads, sorted_nodes
from onnxcompress.graph.query import is_op, producer, read_inputs
from onnxcompress.graph.shape_inference import tensor_shapes, tensor_types
from onnxcompress.model import Model, Shape

FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.BFLOAT16,
)
STEPPED = ("Round", "Floor", "Ceil", "Sign")
"""Operators whose slope is 0 wherever it exists."""


class Topology:
    """Order and data flow of a graph as it is now; create a new one after a change.

    Attributes:
        order: Nodes in topological order.
        index: Position in `order` by id of the node.
        dynamic: Ids of the tensors that depend on a graph input, by value or by shape.
        data: Ids of the tensors that depend on the values of an input: reached from one without passing a
            Shape, a Size, or the operand of a CastLike that only gives its type.
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
        """Look up where a tensor is produced.

        Args:
            tensor: The tensor.

        Returns:
            Position in `order` of the node that produces it; -1 for inputs and initializers.
        """
        node = producer(tensor)
        return -1 if node is None else self.index[id(node)]

    def shape(self, tensor: gs.Tensor) -> Shape | None:
        """Look up a tensor's inferred shape.

        Args:
            tensor: The tensor.

        Returns:
            The shape; None where even the rank is unknown.
        """
        return tensor_shapes(self.model).get(tensor.name)

    def trunk(self) -> list[gs.Tensor]:
        """Find the tensors through which every data path from the inputs to the outputs goes.

        A tensor is on the trunk exactly if, once it is computed, nothing computed before it is needed.

        Returns:
            The tensors in order.
        """
        if self._trunk is None:
            last: dict[int, int] = {}
            live = self._live()
            for place, node in enumerate(self.order):
                if id(node) in live and not is_op(node, "Shape", "Size"):  # these need no data
                    last.update((id(tensor), place) for tensor in node_reads(node))
            ends = {id(t): len(self.order) for t in self.model.graph.outputs}
            trunk: list[gs.Tensor] = []
            farthest = -1  # last node that needs something computed so far, except the newest tensor
            inputs = read_inputs(self.model)
            if len(inputs) == 1:
                trunk.append(inputs[0])
            pending = max((max(last.get(id(t), -1), ends.get(id(t), -1)) for t in inputs), default=-1)
            for place, node in enumerate(self.order):
                farthest = max(farthest, pending)
                pending = -1
                outputs = [t for t in node.outputs if id(t) in self.data and not t.is_empty()]
                for tensor in outputs:
                    pending = max(pending, last.get(id(tensor), -1), ends.get(id(tensor), -1))
                plain = "Sequence" not in node.op or node.op == "SequenceAt"
                if plain and len(outputs) == 1 and farthest <= place and pending > place:
                    trunk.append(outputs[0])
            self._trunk = trunk
        return self._trunk

    def _live(self) -> set[int]:
        """Return the ids of the nodes that outputs depend on: exporters leave others."""
        needed, live = {id(t) for t in self.model.graph.outputs}, set[int]()
        for node in reversed(self.order):
            if any(id(t) in needed for t in node.outputs):
                live.add(id(node))
                needed.update(map(id, node_reads(node)))
        return live

    def made_of(self, name: str) -> set[str]:
        """List the tensors whose values go into a tensor.

        Args:
            name: The name of the tensor.

        Returns:
            Their names, its own included.
        """
        found = {name}
        for node in reversed(self.order):
            if any(t.name in found for t in node.outputs):
                found.update(t.name for t in _data_reads(node))
        return found

    def between(self, entry: gs.Tensor, exit: gs.Tensor) -> tuple[gs.Node, ...]:
        """List the nodes between two neighbouring tensors of the trunk.

        Args:
            entry: The earlier tensor.
            exit: The later tensor.

        Returns:
            Nodes that depend on a graph input, the producer of `exit` included, in order.
        """
        start, end = self.position(entry), self.position(exit)
        return tuple(
            n for n in self.order[start + 1 : end + 1] if any(id(t) in self.dynamic for t in n.outputs)
        )

    def feature(self) -> gs.Tensor | None:
        """Find the features before the global pool: the last spatial tensor of the trunk.

        Source: PRACTISE, arXiv 2202.07861, §3.2.

        Returns:
            A tensor of rank 4 (3 or 5 in 1-d and 3-d networks) with a spatial extent above 1, or None.
        """
        for tensor in reversed(self.trunk()):
            shape, maker = self.shape(tensor), producer(tensor)
            if maker is None or is_op(maker, *STEPPED) or not self.is_float(tensor):
                continue  # it can be matched with nothing, or has no gradient
            if shape is not None and len(shape) >= 3 and any(d != 1 for d in shape[2:]):
                return tensor
        return None

    def is_float(self, tensor: gs.Tensor) -> bool:
        """Return whether a tensor may hold floats: that of an unknown type may.

        Args:
            tensor: The tensor.

        Returns:
            Whether it may.
        """
        return tensor_types(self.model).get(tensor.name) in (None, *FLOATS)

    def last_floats(self, tensor: gs.Tensor) -> gs.Tensor:
        """Go back from classes, masks or rounded pixels to the floats that they are made of.

        Args:
            tensor: A tensor, such as an output of the network.

        Returns:
            The last tensor of floats on the way to it; the tensor itself where it is one.
        """
        found = tensor
        while not self.is_float(found):
            maker = producer(found)
            if maker is None or not maker.inputs:
                return tensor
            found = maker.inputs[0]
        return found


def _data_reads(node: gs.Node) -> list[gs.Tensor]:
    """List the inputs of which a node reads the values and not only shape or type."""
    if is_op(node, "Shape", "Size"):
        return []
    return list(node.inputs[:1]) if is_op(node, "CastLike") else node_reads(node)
