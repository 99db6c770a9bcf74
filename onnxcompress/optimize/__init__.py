"""What needs torch: running a graph differentiably, and optimizing its parameters."""
