"""Sessions, providers and latency in onnxruntime."""
