"""Compress exported CNNs on the ONNX file itself: no training code, no dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxcompress.version import __version__

if TYPE_CHECKING:
    from onnxcompress.torch_export import export

__all__ = ["__version__", "export"]


def __getattr__(name: str) -> Any:
    """`export` is imported when it is asked for: with it come onnx and numpy."""
    if name == "export":
        from onnxcompress.torch_export import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
