"""Infer the shapes of all tensors by ONNX shape inference, without reading weights.

Exporters compute pads and target shapes with long chains of Shape, Gather, Slice, Concat. onnx's own
inference gives up at some of them, and then at everything behind them. Chains that depend on no input are
therefore replaced by their value first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcompress.errors import ModelError, one_line
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.graph.order import sorted_nodes
from onnxcompress.graph.query import is_op, producer
from onnxcompress.model import Model, Shape

ROUNDS = 50
"""Limit on rounds; each resolves one more computed shape, and ShuffleNetV2 has one in each unit."""

KEEP_SHAPE = {
    ("ai.onnx.ml", "Scaler"): "Cast",
    ("ai.onnx.ml", "Normalizer"): "Cast",
    ("ai.onnx.ml", "Imputer"): "Identity",
    ("ai.onnx.ml", "Binarizer"): "Identity",
    ("com.microsoft", "Gelu"): "Identity",
    ("com.microsoft", "FastGelu"): "Identity",
    ("com.microsoft", "QuickGelu"): "Identity",
    ("com.microsoft", "BiasGelu"): "Identity",
}
"""Operators of other domains whose output has the shape of the first input: with its type, or floats."""


def tensor_shapes(model: Model) -> dict[str, Shape]:
    """Infer the shapes of all tensors once per state of the graph (`infer_shapes`).

    Args:
        model: The model.

    Returns:
        Shapes by tensor name; not to be changed.

    Raises:
        ModelError: The graph's shapes contradict each other.
    """
    return model.analysis(_inferred).shapes


@dataclass(frozen=True)
class Inferred:
    """Shapes and element types of a graph's tensors, by name."""

    shapes: dict[str, Shape]
    """A dimension is a number, a symbol's name, or None."""
    types: dict[str, int]
    """Element types, of onnx.TensorProto."""


def tensor_types(model: Model) -> dict[str, int]:
    """Look up the element types of all tensors, inferred once for a graph.

    Args:
        model: The model.

    Returns:
        Element types of onnx.TensorProto by tensor name, as far as they can be inferred.

    Raises:
        ModelError: The graph's shapes contradict each other.
    """
    return model.analysis(_inferred).types


def _inferred(model: Model) -> Inferred:
    return infer(model, model.assumed)


def infer(model: Model, assumed: Mapping[str, Shape]) -> Inferred:
    """Infer the shapes and the element types of all tensors.

    Values that follow from assumed sizes are used here and forgotten: the graph computes them anew for
    each size.

    Args:
        model: The model.
        assumed: Shapes of inputs with sizes in place of dimensions that the file leaves open, by name; see
            `Model.assume`.

    Returns:
        Shapes and types. A tensor whose rank is unknown is absent.

    Raises:
        ModelError: The graph's shapes contradict each other.
    """
    found = Inferred({}, {})
    for _ in range(ROUNDS):
        found = _infer_once(model, assumed)
        if not _learn_sizes(model, found.shapes):
            break
    if assumed:
        model.constants.clear()
    return found


def _learn_sizes(model: Model, shapes: dict[str, Shape]) -> bool:
    """Turn sizes that the graph reads from tensors of known shape into constants."""
    learned = False
    for node in model.graph.nodes:
        source = producer(node.inputs[0]) if is_op(node, "Gather", "Slice") else node
        if source is None or not is_op(source, "Shape"):
            continue
        if model.constants.get(node.outputs[0].name) is not None:
            continue
        shape = shapes.get(source.inputs[0].name)
        value = None if shape is None or source.attrs else _picked(model, node, shape)
        if value is not None:
            if not learned:
                for name in [n for n, v in model.constants.items() if v is None]:
                    del model.constants[name]
            model.constants[node.outputs[0].name] = value
            learned = True
    return learned


def _picked(model: Model, node: gs.Node, shape: Shape) -> np.ndarray | None:
    """Evaluate Shape, Gather(Shape) or Slice(Shape), where the dimensions that it selects are known."""
    unknown = -(1 << 40)
    sizes = np.array([d if isinstance(d, int) else unknown for d in shape], np.int64)
    if node.op == "Gather":
        index = constant_value(model, node.inputs[1])
        if index is None or not ((-len(sizes) <= index) & (index < len(sizes))).all():
            return None
        picked = np.asarray(sizes[index])
    elif node.op == "Slice":
        if len(node.inputs) < 3:
            return None
        bounds = [constant_value(model, t) for t in node.inputs[1:]]
        numbers = [int(b.item()) for b in bounds if b is not None and b.size == 1]
        if len(numbers) < len(bounds) or (len(numbers) > 2 and numbers[2] != 0) or 0 in numbers[3:]:
            return None
        picked = sizes[numbers[0] : numbers[1] : numbers[3] if len(numbers) > 3 else 1]
    else:
        picked = sizes
    return None if picked is None or (picked == unknown).any() else picked


def _infer_once(model: Model, assumed: Mapping[str, Shape]) -> Inferred:
    proto = model.skeleton()
    _fill_in(proto.graph, assumed)
    folded = {}
    for node in model.graph.nodes:
        for tensor in node.outputs:
            value = constant_value(model, tensor)
            if value is not None and node.op != "Constant":
                folded[tensor.name] = value
    nodes = {id(n): one for n, one in zip(model.graph.nodes, proto.graph.node, strict=True)}
    order = [nodes[id(n)] for n in sorted_nodes(model)]  # inference reads the nodes in order, once
    keep = [n for n in order if not any(o in folded for o in n.output)]
    del proto.graph.node[:]
    proto.graph.node.extend(map(_stand_in, keep))
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in folded.items())
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{model.name}: the graph's shapes contradict ({one_line(error)})") from error
    shapes: dict[str, Shape] = {t.name: tuple(t.dims) for t in inferred.graph.initializer}
    types = {t.name: int(t.data_type) for t in inferred.graph.initializer}
    for field in (inferred.graph.value_info, inferred.graph.input, inferred.graph.output):
        for info in field:
            if info.type.tensor_type.elem_type:
                types[info.name] = int(info.type.tensor_type.elem_type)
            if info.type.tensor_type.HasField("shape"):
                shapes[info.name] = _dims(info.type.tensor_type.shape)
    return Inferred(shapes, types)


def _stand_in(node: onnx.NodeProto) -> onnx.NodeProto:
    """Return what onnx's inference takes in place of a node of another domain that keeps the shape."""
    op = KEEP_SHAPE.get((node.domain, node.op_type))
    if op is None:
        return node
    new = onnx.helper.make_node(op, node.input[:1], node.output)
    if op == "Cast":
        new.attribute.append(onnx.helper.make_attribute("to", onnx.TensorProto.FLOAT))
    return new


def _fill_in(graph: onnx.GraphProto, assumed: Mapping[str, Shape]) -> None:
    """Write assumed sizes into the inputs, with a batch of 1 where it is open: more can be inferred so."""
    for info in graph.input:
        for dim, size in zip(info.type.tensor_type.shape.dim, assumed.get(info.name, ()), strict=False):
            dim.dim_value = size if isinstance(size, int) else 1


def _dims(shape: onnx.TensorShapeProto) -> Shape:
    return tuple(
        (d.dim_value if d.dim_value >= 0 else None) if d.HasField("dim_value") else (d.dim_param or None)
        for d in shape.dim
    )
