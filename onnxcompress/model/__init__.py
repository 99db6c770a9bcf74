"""Models in memory and on disk: the graph that passes change, and all that a round trip must preserve."""

from onnxcompress.model.model import Model, Shape
from onnxcompress.model.onnx_file import load, save
from onnxcompress.model.provenance import PROVENANCE

__all__ = ["PROVENANCE", "Model", "Shape", "load", "save"]
