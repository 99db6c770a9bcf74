"""Fold BatchNorm into the linear layer before or after it, and record the statistics that it holds."""

from onnxcompress.passes.fold_bn.fold_bn import FoldBatchNorm

__all__ = ["FoldBatchNorm"]
