"""Half precision: weights and tensors in float16, but for the nodes that measurably suffer from it."""

from onnxcompress.passes.fp16.fp16 import HalfPrecision

__all__ = ["HalfPrecision"]
