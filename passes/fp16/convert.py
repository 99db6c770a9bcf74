"""Convert some nodes of a float32 model to float16, and put Casts between them and the others.

Each float32 tensor t has a version in the type that the node before it computes (native), and one in the
other type where a reader wants that:

    native    half: outputs of converted nodes; initializers and Constants that only half readers want,
              and no body of an If, Loop or Scan;
              inputs where the ends become float16. float: everything else
    wanted    half: inputs of converted nodes that their schema allows; float: all other inputs; graph
              outputs: float, or half where the ends become float16. Shape and Size take what there is

The native version keeps the name t; the other one is a Cast behind it, placed before its first reader. A
graph output keeps its name in the type that is wanted, whatever its maker's is then called; so does, as
float, a tensor that a body reads. Tensors whose type is not known (other domains) are left alone: nodes
that read one stay float32 (`fp16.candidates`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

import numpy as np
import onnx
from onnx import AttributeProto, helper, numpy_helper

from onnxcompress.graph.query import DEFAULT_DOMAINS
from onnxcompress.model.sparse_tensors import dense
from onnxcompress.passes.fp16.candidates import FLOAT, HALF, candidates, captured, element_types

SMALLEST, LARGEST = 5.96e-8, 65504.0
"""Magnitudes of float16; values that are not zero stay so, and finite values stay finite."""
OUTPUT_TYPES = ("to", "output_dtype")
"""Attributes with the type of the output: of Cast and of DequantizeLinear."""
SUFFIX: dict[int, str] = {HALF: "float16", FLOAT: "float32"}


def convert(proto: onnx.ModelProto, half: Collection[int], *, keep_io: bool) -> onnx.ModelProto:
    """Let some nodes compute in float16.

    Args:
        proto: The float32 model, its weights in memory; it stays as it is.
        half: Places of the nodes in its list, each one of `candidates`.
        keep_io: Whether graph inputs and outputs stay float32.

    Returns:
        A new model.
    """
    return _Conversion(proto, half, FLOAT if keep_io else HALF).made


class _Conversion:
    """One conversion; `ends` is the type that graph inputs and outputs are to have."""

    def __init__(self, proto: onnx.ModelProto, half: Collection[int], ends: int) -> None:
        self.made = onnx.ModelProto()
        self.made.CopyFrom(proto)
        self.graph, self.ends = self.made.graph, ends
        self.types = element_types(proto)
        self.half = {c.index: c for c in candidates(proto)[0] if c.index in half}
        bodies = captured(proto)
        self.kept = {o.name: ends for o in self.graph.output} | dict.fromkeys(bodies, FLOAT)
        """Tensors that keep their name, with the type that it stands for."""
        self.names = {n for node in proto.graph.node for n in (*node.input, *node.output)}
        self.names |= {*self.types, *bodies}
        self.labels = {node.name for node in proto.graph.node}
        self.wanted = self._wanted()
        self.native = self._native()
        self.called: dict[tuple[str, int], str] = {}
        self._values()
        self._ends()
        nodes = list(self._nodes())
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def _wants(self, at: int, place: int, node: onnx.NodeProto) -> int | None:
        """Return the type in which a node reads an input; None: either."""
        if node.op_type in ("Shape", "Size") and node.domain in DEFAULT_DOMAINS:
            return None
        return HALF if at in self.half and place in self.half[at].inputs else FLOAT

    def _wanted(self) -> dict[str, set[int]]:
        """Return the types in which each tensor is read."""
        found: dict[str, set[int]] = defaultdict(set)
        for at, node in enumerate(self.graph.node):
            for place, name in enumerate(node.input):
                kind = self._wants(at, place, node)
                if kind is not None and self.types.get(name) == FLOAT:
                    found[name].add(kind)
        for name, kind in self.kept.items():
            if self.types.get(name) == FLOAT:
                found[name].add(kind)
        return found

    def _native(self) -> dict[str, int]:
        """Return the type in which each float32 tensor is computed."""
        native: dict[str, int] = {name: FLOAT for name, kind in self.types.items() if kind == FLOAT}
        for end in self.graph.input:
            if end.name in native and self.kept.get(end.name, self.ends) == self.ends:
                native[end.name] = self.ends
        free = [t.name for t in self.graph.initializer]
        for at, node in enumerate(self.graph.node):
            if is_constant(node):
                free.append(node.output[0])
            elif at in self.half:
                native |= {node.output[i]: HALF for i in self.half[at].outputs}
        for name in free:
            if name in native:
                native[name] = HALF if self.wanted[name] == {HALF} else FLOAT
        return native

    def _name(self, tensor: str, kind: int) -> str:
        """Return the name of a tensor's version of this type."""
        plain = self.kept.get(tensor, self.native[tensor])
        if kind == plain:
            return tensor
        if (tensor, kind) not in self.called:
            self.called[tensor, kind] = _unique(f"{tensor}_{SUFFIX[kind]}", self.names)
        return self.called[tensor, kind]

    def _values(self) -> None:
        """Convert and rename initializers."""
        for tensor in self.graph.initializer:
            if self.native.get(tensor.name) == HALF:
                tensor.CopyFrom(half_tensor(numpy_helper.to_array(tensor), tensor))
            if tensor.name in self.native:
                tensor.name = self._name(tensor.name, self.native[tensor.name])

    def _ends(self) -> None:
        """Set the types of inputs, outputs and value infos."""
        for value in (*self.graph.input, *self.graph.output, *self.graph.value_info):
            if self.types.get(value.name) == FLOAT:
                kind = self.kept.get(value.name, self.native[value.name])
                value.type.tensor_type.elem_type = kind

    def _nodes(self) -> Iterator[onnx.NodeProto]:
        cast: set[str] = set()
        loose = {t: k for t, k in self.native.items() if self.kept.get(t, k) != k}
        computed = {name for node in self.graph.node for name in node.output}
        for name in loose.keys() - computed:
            yield from self._cast(name, loose[name], cast)
        for at, node in enumerate(self.graph.node):
            new = onnx.NodeProto()
            new.CopyFrom(node)
            for place, name in enumerate(node.input):
                if name in self.native:
                    kind = self._wants(at, place, node) or self.native[name]
                    if kind != self.native[name]:
                        yield from self._cast(name, self.native[name], cast)
                    new.input[place] = self._name(name, kind)
            for place, name in enumerate(node.output):
                if name in self.native:
                    new.output[place] = self._name(name, self.native[name])
            if at in self.half or (is_constant(node) and self.native.get(node.output[0]) == HALF):
                _halve_attributes(new)
            yield new
            for name in node.output:
                if name in loose:
                    yield from self._cast(name, loose[name], cast)

    def _cast(self, tensor: str, native: int, cast: set[str]) -> Iterator[onnx.NodeProto]:
        """Yield the Cast that makes the other version, the first time that it is asked for."""
        if tensor not in cast:
            cast.add(tensor)
            kind = FLOAT if native == HALF else HALF
            source, target = self._name(tensor, native), self._name(tensor, kind)
            label = _unique(f"{tensor}_to_{SUFFIX[kind]}", self.labels)
            yield helper.make_node("Cast", [source], [target], name=label, to=kind)


def is_constant(node: onnx.NodeProto) -> bool:
    """Return whether a node is ONNX's Constant.

    Args:
        node: The node.

    Returns:
        Whether it is.
    """
    return node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS


def half_tensor(values: np.ndarray, like: onnx.TensorProto) -> onnx.TensorProto:
    """Convert float32 values to a float16 tensor; none underflows to zero or overflows.

    Args:
        values: The values.
        like: The tensor whose name, doc string and metadata the new one gets.

    Returns:
        The tensor.
    """
    with np.errstate(invalid="ignore"):
        small = np.where((values != 0) & (np.abs(values) < SMALLEST), np.copysign(SMALLEST, values), values)
        near = np.where(np.isfinite(small), np.clip(small, -LARGEST, LARGEST), small)
    made: onnx.TensorProto = numpy_helper.from_array(near.astype(np.float16), like.name)
    if like.doc_string:
        made.doc_string = like.doc_string
    made.metadata_props.extend(like.metadata_props)
    return made


def _halve_attributes(node: onnx.NodeProto) -> None:
    """Convert a node's attributes from float32 to float16: types of outputs, values of constants."""
    for attribute in node.attribute:
        if attribute.name in OUTPUT_TYPES and attribute.i == FLOAT:
            attribute.i = HALF
    if node.op_type == "ConstantOfShape":
        given = [numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"]
        del node.attribute[:]
        values = given[0] if given else np.zeros(1, np.float32)
        node.attribute.append(helper.make_attribute("value", half_tensor(values, onnx.TensorProto())))
    elif is_constant(node):
        (attribute,) = node.attribute
        values, like = _constant_values(attribute)
        node.attribute[0].CopyFrom(helper.make_attribute("value", half_tensor(values, like)))


def _constant_values(attribute: AttributeProto) -> tuple[np.ndarray, onnx.TensorProto]:
    """Return the float32 values of a Constant's attribute, and the tensor whose metadata they keep."""
    if attribute.type == AttributeProto.SPARSE_TENSOR:
        return dense(attribute.sparse_tensor), attribute.sparse_tensor.values
    if attribute.type == AttributeProto.TENSOR:
        return numpy_helper.to_array(attribute.t), attribute.t
    return np.array(helper.get_attribute_value(attribute), np.float32), onnx.TensorProto()


def _unique(base: str, taken: set[str]) -> str:
    name, number = base, 0
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    taken.add(name)
    return name
