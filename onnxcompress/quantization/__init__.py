"""Quantization of a graph: what is quantized, with which grid, and how it is written as QDQ."""
