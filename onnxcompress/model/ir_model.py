"""Models of `onnx_ir` as protos. They need onnx_ir, which may not be installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def is_ir_model(model: object) -> bool:
    """Return whether an object is a model of onnx_ir, without importing it.

    Args:
        model: Any object.

    Returns:
        True for an `onnx_ir.Model`.
    """
    return type(model).__module__.partition(".")[0] == "onnx_ir"


def proto_of(model: ir.Model) -> onnx.ModelProto:
    """Serialize a model, with its external weights in memory.

    Args:
        model: The model; it is not changed.

    Returns:
        The proto.
    """
    import onnx_ir as ir

    tensors = [value.const_value for value in model.graph.initializers.values()]
    if any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors):
        model = ir.external_data.load_to_model(model.clone())
    return ir.to_proto(model)
