"""Run an ONNX graph in torch as a pure, differentiable function of its initializers."""

from onnxcompress.optimize.executor.executor import Executor

__all__ = ["Executor"]
