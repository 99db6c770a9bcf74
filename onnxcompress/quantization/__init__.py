"""Quantization of a graph: what is quantized where, with which grid, and how it is written as QDQ."""
