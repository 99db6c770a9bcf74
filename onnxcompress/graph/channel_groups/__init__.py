"""Which tensors share a channel, and which must be scaled or cut together."""
