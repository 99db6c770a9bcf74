"""A model file in memory and on disk: what a pass may change, and all that a round trip must keep."""

from onnxcompress.model.model import PROVENANCE, Model, Shape, load, save

__all__ = ["PROVENANCE", "Model", "Shape", "load", "save"]
