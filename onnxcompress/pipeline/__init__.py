"""Chains of passes, built in Python or from a recipe, with a cache from which they resume."""

from onnxcompress.pipeline.chain import Step
from onnxcompress.pipeline.pipeline import Pipeline, Run

__all__ = ["Pipeline", "Run", "Step"]
