"""Where the checkout lies."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
"""The shipped networks and images."""
RESIDUAL = [MODELS / f"{name}-fashion.onnx" for name in ("mobilenetv2", "resnet20")]
"""The shipped networks with residual blocks."""
