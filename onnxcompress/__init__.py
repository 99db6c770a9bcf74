"""Compress exported CNNs on the ONNX file itself: no training code, no dataset.

    import onnxcompress as oc
    oc.fold_bn("in.onnx", "out.onnx")
    fast = oc.drop_blocks("in.onnx", images="photos", preprocess="imagenet", latency_reduction=20)
    fast.save("fast.onnx")

There is a function for each command (`onnxcompress.api`); nothing is imported before one is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from onnxcompress.version import __version__

__all__ = ["__version__", "export"]


def __getattr__(name: str) -> Any:
    if name == "export":
        found = import_module("onnxcompress.torch_export").export
    else:
        found = import_module("onnxcompress.api").call(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found
