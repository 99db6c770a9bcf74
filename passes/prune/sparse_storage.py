"""Store a sparse weight as an initializer of its values, and another of the gaps between them.

    positions = CumSum(Cast(gaps))      weight = Reshape(ScatterElements(zeros, positions, values))

A value costs its own bytes and one of its gap (uint8; where a gap is longer, a zero is stored within it),
so that a float32 weight is smaller from a fifth of zeros on. All of it is constant: a runtime computes it
once, when the file is loaded, and runs the same dense layer as before.

Why not ONNX's SparseTensor: its positions are 64-bit integers (smaller from two thirds of zeros on);
onnxruntime 1.31 loads it, onnx 1.23's full check refuses it as the weight of a Conv.

Does not handle: opsets below 11 (CumSum): the model is converted before.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcompress.graph.edit import remove_unread, unique_name
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.model import Model

LONGEST = 255


def pack(model: Model, linear: Linear, weight: np.ndarray) -> int | None:
    """Store a layer's weight as sparse, in place.

    Args:
        model: The model.
        linear: The layer.
        weight: Its weight.

    Returns:
        Bytes that the weight takes; None where they would not be fewer, and the weight stays.
    """
    values, gaps = _coded(weight.reshape(-1))
    size = values.nbytes + gaps.nbytes
    if size >= weight.nbytes:
        return None
    node = linear.node
    old = node.inputs[linear.weight_at]
    name = str(old.name)

    def constant(what: str, array: np.ndarray) -> gs.Constant:
        return gs.Constant(unique_name(model, f"{name}_{what}"), array)

    def computed(op: str, what: str, inputs: list[gs.Tensor], kind: type, **attrs: object) -> gs.Variable:
        out = gs.Variable(unique_name(model, f"{name}_{what}"), np.dtype(kind))
        made.append(gs.Node(op, name=out.name, inputs=inputs, outputs=[out], attrs=attrs))
        return out

    made: list[gs.Node] = []
    zeros = computed("ConstantOfShape", "zeros", [constant("size", np.array([weight.size]))], np.float32)
    wide = computed("Cast", "steps", [constant("gaps", gaps)], np.int64, to=onnx.TensorProto.INT64)
    places = computed("CumSum", "places", [wide, constant("axis", np.array(0))], np.int64)
    filled = [zeros, places, constant("values", values)]
    flat = computed("ScatterElements", "flat", filled, np.float32, axis=0)
    shape = constant("shape", np.array(weight.shape))
    node.inputs[linear.weight_at] = computed("Reshape", "dense", [flat, shape], np.float32)
    at = model.graph.nodes.index(node)
    model.graph.nodes[at:at] = made
    remove_unread(model, [old])
    return size


def _coded(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values, and the gap before each."""
    places = np.flatnonzero(flat)
    gaps = np.diff(places, prepend=0)
    stops = [
        np.arange(place - gap + LONGEST, place, LONGEST)
        for place, gap in zip(places[gaps > LONGEST], gaps[gaps > LONGEST], strict=True)
    ]
    places = np.union1d(places, np.concatenate(stops)) if stops else places
    places = places.astype(np.int64) if places.size else np.zeros(1, np.int64)
    return flat[places], np.diff(places, prepend=0).astype(np.uint8)
