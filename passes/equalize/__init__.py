"""Cross-layer equalization: give the rows of a layer and the columns of its readers equal ranges."""

from onnxcompress.passes.equalize.equalize import Equalize

__all__ = ["Equalize"]
