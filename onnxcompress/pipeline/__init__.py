"""Chains of passes: in Python, from a recipe and to one, resumable."""

from onnxcompress.pipeline.pipeline import Pipeline, Run, Step

__all__ = ["Pipeline", "Run", "Step"]
