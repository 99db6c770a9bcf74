"""onnxcompress inside other toolkits."""
