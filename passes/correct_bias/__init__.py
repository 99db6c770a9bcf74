"""Bias correction: what rounded or removed weights change in a layer's mean output, its bias takes back."""

from onnxcompress.passes.correct_bias.correct_bias import CorrectBias

__all__ = ["CorrectBias"]
