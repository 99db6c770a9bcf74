"""Where torch computes."""

from __future__ import annotations

import torch

from onnxcompress.errors import RuntimeUnavailable


def pick_device(name: str) -> str:
    """`auto`: the GPU where torch has one. Raises RuntimeUnavailable for a GPU that is not there."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RuntimeUnavailable(
            "--device cuda: torch sees no GPU; use --device auto, or install its CUDA build"
        )
    return "cuda" if name != "cpu" and available else "cpu"
