"""Passes of onnxcompress as passes of `onnx_ir`, for example in an `onnx_ir.passes.Sequential`.

    ir.Model --serialize--> ModelProto --pass--> ModelProto --deserialize--> new ir.Model

Each adapter costs one such round trip; wrap a Pipeline in one adapter to pay it once for all of its passes.
All weights are loaded into memory, external ones, too. Importing this module needs onnx_ir, which nothing
else does.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.account import Figures
from onnxcompress.model.ir_model import proto_of
from onnxcompress.passes.base import Pass, PassResult
from onnxcompress.passes.proto import apply_to_proto


class IrPass(ir.passes.FunctionalPass):
    """A pass of onnxcompress as a functional pass of onnx_ir; `last` is the result of its last call."""

    def __init__(self, pass_: Pass) -> None:
        self.pass_ = pass_
        self.last: PassResult[Figures | None] | None = None

    def __repr__(self) -> str:
        """Name the pass as onnx_ir shows it in its errors."""
        return f"IrPass({self.pass_.name})"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the pass to a copy of the model.

        Args:
            model: The model; it is not changed.

        Returns:
            The new model, and whether the pass changed anything.

        Raises:
            CompressError: The pass cannot handle the model.
        """
        proto, self.last = apply_to_proto(self.pass_, proto_of(model))
        return ir.passes.PassResult(ir.from_proto(proto), self.last.modified)
