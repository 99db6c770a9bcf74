"""Quantize weights and activations after training, without data, to QDQ that runtimes fuse."""

from onnxcompress.passes.quantize.quantize import Quantize

__all__ = ["Quantize"]
