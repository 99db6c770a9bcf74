"""Prune weights after training, without data: unstructured, 2:4 or N:M."""

from onnxcompress.passes.prune.prune import Prune

__all__ = ["Prune"]
