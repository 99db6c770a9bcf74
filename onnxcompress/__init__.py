"""Compress exported CNNs on the ONNX file itself: no training code, no dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcompress.exporting import export

__all__ = ["__version__", "export"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`export` is imported when it is asked for: with it come onnx and numpy."""
    if name == "export":
        from onnxcompress.exporting import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
