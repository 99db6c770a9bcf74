"""Layers refitted so that their outputs stay those of the original network."""
