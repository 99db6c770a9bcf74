"""Bring constants to the form in which `fp16` converts them: dense float32, read by the nodes themselves.

float16 --Cast--> weight                    a file that stores halves and computes in float32
int32 --DequantizeLinear--> bias            of a quantized network (`quantized`)
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcompress.graph.constant_folding import constant_attribute
from onnxcompress.graph.edit import make_dense, remove_nodes, replace_uses, unique_name
from onnxcompress.graph.query import is_captured, is_op, is_output, producer, read
from onnxcompress.model import Model
from onnxcompress.passes.fp16.quantized import fold_biases


def make_plain(model: Model) -> None:
    """Bring the constants that nodes read to dense float32, in place.

    Args:
        model: The model.
    """
    make_dense(model)
    casts = stored_halves(model)
    for cast, half in casts:
        name = unique_name(model, f"{cast.outputs[0].name}_float")
        replace_uses(model, cast.outputs[0], gs.Constant(name, half.astype(np.float32)))
    remove_nodes(model, [cast for cast, _ in casts])
    model.touch()
    fold_biases(model)


def stored_halves(model: Model) -> list[tuple[gs.Node, np.ndarray]]:
    """List the float16 constants that are computed with in float32.

    Args:
        model: The model.

    Returns:
        The Cast of each to float32, and its values.
    """
    casts = [
        n for n in model.graph.nodes if is_op(n, "Cast") and n.attrs.get("to") == onnx.TensorProto.FLOAT
    ]
    free = [n for n in casts if not is_output(model, n.outputs[0]) and not is_captured(model, n.outputs[0])]
    values = [(n, _constant(n.inputs[0])) for n in free]
    return [(n, v) for n, v in values if v is not None and v.dtype == np.float16]


def _constant(tensor: gs.Tensor) -> np.ndarray | None:
    if isinstance(tensor, gs.Constant):
        return read(tensor)
    maker = producer(tensor)
    return constant_attribute(maker) if maker is not None and is_op(maker, "Constant") else None
