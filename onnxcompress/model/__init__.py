"""Models in memory and on disk: what passes may change, and what a round trip must preserve."""

from onnxcompress.model.model import PROVENANCE, Model, Shape
from onnxcompress.model.onnx_file import load, save

__all__ = ["PROVENANCE", "Model", "Shape", "load", "save"]
