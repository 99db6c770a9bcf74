"""Passes of onnxcompress among those of `onnx_ir`, in an `onnx_ir.passes.Sequential`, say.

    ir.Model --serialize--> ModelProto --pass--> ModelProto --deserialize--> new ir.Model

Each pass costs one such round trip; put a Pipeline into one adapter to have it once for all of its passes.
Weights come into memory, external ones, too. Importing this module needs onnx_ir, which nothing else does.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.passes.base import Pass, PassResult, apply_to_proto


class IrPass(ir.passes.FunctionalPass):
    """A pass of onnxcompress as a functional pass of onnx_ir. `last` is what it did in its last call."""

    def __init__(self, one: Pass) -> None:
        self.one = one
        self.last: PassResult | None = None

    def __repr__(self) -> str:
        """What onnx_ir names in its errors."""
        return f"IrPass({self.one.name})"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """A new model; raises CompressError as the pass does."""
        proto, self.last = apply_to_proto(self.one, ir.to_proto(_with_weights(model)))
        return ir.passes.PassResult(ir.from_proto(proto), self.last.modified)


def _with_weights(model: ir.Model) -> ir.Model:
    """The model, or a copy with its external weights in memory."""
    tensors = [v.const_value for v in model.graph.initializers.values()]
    if not any(isinstance(t, ir.ExternalTensor) for t in tensors):
        return model
    return ir.external_data.load_to_model(model.clone())
