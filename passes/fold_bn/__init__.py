"""Fold BatchNorm into the linear layer before it, or after it, and record what it knew of the data."""

from onnxcompress.passes.fold_bn.fold_bn import FoldBatchNorm

__all__ = ["FoldBatchNorm"]
