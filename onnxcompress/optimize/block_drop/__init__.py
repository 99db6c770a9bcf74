"""Choose the residual blocks to drop for a latency target, and repair the remaining network."""
