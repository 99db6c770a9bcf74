"""Which operators of a QDQ model onnxruntime replaces by integer kernels.

onnxruntime replaces DequantizeLinear -> operator -> QuantizeLinear by integer kernels (QLinearConv, …) when
it loads a model. Here it writes its optimized graph, whose nodes are counted.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from onnxcompress.account import json_name
from onnxcompress.model import Model, save

INTEGER = ("QLinear", "QGemm", "ConvInteger", "MatMulInteger")
FLOATING = ("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "ConvTranspose", "Add",
            "Mul", "GlobalAveragePool", "AveragePool", "Concat")  # fmt: skip


@dataclass(frozen=True)
class OptimizedNodes:
    """The nodes of onnxruntime's optimized graph of a QDQ model."""

    fused: Mapping[str, int]
    """Integer operator -> number of nodes."""
    in_float: Mapping[str, tuple[str, ...]] = field(metadata=json_name("float"))
    """Operator -> names of its nodes that stay in floating point."""
    conversions: int
    """Number of QuantizeLinear and DequantizeLinear that are left."""


def fused_counts(model: Model) -> OptimizedNodes:
    """Count the integer and the floating-point nodes of onnxruntime's optimized graph.

    Args:
        model: A QDQ model.

    Returns:
        The nodes.

    Raises:
        ModelError: onnxruntime cannot load the model.
    """
    import onnxruntime as ort

    from onnxcompress.errors import ModelError, one_line

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "model.onnx"), Path(folder, "optimized.onnx")
        save(model, source)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 4
        try:
            ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ModelError(
                f"{model.name}: onnxruntime cannot load the result ({one_line(error)})"
            ) from error
        nodes = onnx.load(str(target), load_external_data=False).graph.node
    ops = Counter(node.op_type for node in nodes)
    return OptimizedNodes(
        fused={op: n for op, n in sorted(ops.items()) if op.startswith(INTEGER)},
        in_float={
            op: tuple(n.name or n.output[0] for n in nodes if n.op_type == op) for op in FLOATING if ops[op]
        },
        conversions=ops["QuantizeLinear"] + ops["DequantizeLinear"],
    )
