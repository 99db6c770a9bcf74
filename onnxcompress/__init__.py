"""Compress exported CNNs on the ONNX file itself: no training code, no dataset."""

__version__ = "0.1.0"
