"""Which residual blocks go for a latency, and the repair of what is left."""
