"""Mean and standard deviation of each channel: what a file knows of its training data."""
