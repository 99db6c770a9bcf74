"""Adapters that run the passes of onnxcompress inside other toolkits."""
