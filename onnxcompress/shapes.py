"""Shapes of all tensors, by ONNX shape inference on the model without its weights.

Exporters compute pads and target shapes with long chains of Shape, Gather, Slice, Concat; onnx's own
inference gives up at some of them, and with it on all that follows. Chains that no input reaches are
therefore replaced by their value first.
"""

from __future__ import annotations

import onnx

from onnxcompress.errors import ModelError
from onnxcompress.graph import constant_value
from onnxcompress.model import Model, Shape


def infer_shapes(model: Model) -> dict[str, Shape]:
    """Tensor name -> shape; a dimension is a number, a symbol's name, or None.

    Raises ModelError where the graph contradicts itself.
    """
    proto = model.skeleton()
    folded = {}
    for node in model.graph.nodes:
        for tensor in node.outputs:
            value = constant_value(model, tensor)
            if value is not None and node.op != "Constant":
                folded[tensor.name] = value
    keep = [n for n in proto.graph.node if not any(o in folded for o in n.output)]
    del proto.graph.node[:]
    proto.graph.node.extend(keep)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in folded.items())
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{model.name}: the graph's shapes contradict ({reason})") from error
    shapes: dict[str, Shape] = {t.name: tuple(t.dims) for t in inferred.graph.initializer}
    for field in (inferred.graph.value_info, inferred.graph.input, inferred.graph.output):
        for info in field:
            if info.type.tensor_type.HasField("shape"):
                shapes[info.name] = _dims(info.type.tensor_type.shape)
    return shapes


def _dims(shape: onnx.TensorShapeProto) -> Shape:
    return tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in shape.dim)
