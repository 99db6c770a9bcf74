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
OWN_DOMAIN = "onnxcompress"
"""Domain of operators that only graphs in memory have."""

__all__ = [
    "DOMAINS",
    "OWN_DOMAIN",
    "TABLE",
    "ExecutionError",
    "Kernel",
    "Op",
    "Site",
    "UnsupportedOp",
    "definition",
    "supported_ops",
    "unsupported",
]


def definition(domain: str, op: str) -> Op | None:
    """Look up how an operator is run.

    Args:
        domain: Its domain.
        op: Its name.

    Returns:
        The definition; None where it cannot be run.
    """
    if domain == OWN_DOMAIN:
        return convert.OWN_OPS.get(op)
    return TABLE.get(op) if domain in DOMAINS else None


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
        if definition(node.domain or "", node.op) is None
    ]
