"""The operators that the executor can run, as one explicit table. Source: onnx's operator documentation."""

from __future__ import annotations

import onnx_graphsurgeon as gs

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

__all__ = [
    "DOMAINS",
    "TABLE",
    "ExecutionError",
    "Kernel",
    "Op",
    "Site",
    "UnsupportedOp",
    "supported_ops",
    "unsupported",
]


def supported_ops() -> frozenset[str]:
    """List the operators of the default domain that can be run.

    Returns:
        Their names.
    """
    return frozenset(TABLE)


def unsupported(graph: gs.Graph) -> list[str]:
    """List the nodes whose operators cannot be run.

    Uses of an operator that are refused (a training mode, an unusual type) are found only when they run.

    Args:
        graph: The graph.

    Returns:
        One line per node; empty where all operators can be run.
    """
    return [
        f"node {node.name!r}: {node.op} (domain {node.domain or 'ai.onnx'!r}, opset {graph.opset})"
        for node in graph.nodes
        if node.op not in TABLE or (node.domain or "") not in DOMAINS
    ]
