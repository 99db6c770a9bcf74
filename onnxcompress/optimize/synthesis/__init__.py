"""Inputs made from recorded statistics, and tensors brought to them."""
