"""Find which tensors share a channel, and which channels must be scaled or removed together."""
