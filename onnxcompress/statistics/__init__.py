"""Mean and deviation of each channel: what a file knows of its training data."""
