"""The operators that the executor can run, as one explicit table. Source: onnx's operator documentation."""

from __future__ import annotations

from onnxcompress.optimize.executor.ops import (
    convert,
    elementwise,
    index,
    linear,
    norm,
    pooling,
    reduce,
    resize,
    shape,
)
from onnxcompress.optimize.executor.ops.registry import ExecutionError, Kernel, Op, Site, UnsupportedOp

TABLE: dict[str, Op] = {
    **convert.OPS,
    **elementwise.OPS,
    **index.OPS,
    **linear.OPS,
    **norm.OPS,
    **pooling.OPS,
    **reduce.OPS,
    **resize.OPS,
    **shape.OPS,
}
"""Operators of the default domain (ai.onnx), opset 7 and later, by name."""

DOMAINS = ("", "ai.onnx")

__all__ = ["DOMAINS", "TABLE", "ExecutionError", "Kernel", "Op", "Site", "UnsupportedOp"]
