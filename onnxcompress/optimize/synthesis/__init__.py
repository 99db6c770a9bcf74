"""Synthesize inputs from recorded statistics, and align a network's tensors with these statistics."""
