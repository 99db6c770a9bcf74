"""Where torch computes, how much goes there at once, and with which precision.

Weights of convolutions lie in channels-last order. On a GPU: images and weights lie there once, products
are in bfloat16 where its tensor cores have it, and no step waits for the device (no `.item()`, no copy
back). What does not fit its memory goes there in smaller batches, and what cannot be there goes to the CPU;
either is said as a CompressWarning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from onnxcompress.errors import CompressWarning, RuntimeUnavailable
from onnxcompress.runtime.session import cuda_devices

FEWEST = 4
"""Images at once below which no smaller batch is tried."""
RESIDENT = 0.25
"""Share of a GPU's free memory that images may take to lie there for good."""
T = TypeVar("T")


def pick_device(name: str) -> str:
    """`auto`: the GPU where torch has one. Raises RuntimeUnavailable for a GPU that is not there."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RuntimeUnavailable(
            "--device cuda: torch sees no GPU; use --device auto, or install its CUDA build"
        )
    if name == "auto" and not available and cuda_devices():
        text = f"torch {torch.__version__} cannot use the GPU that the driver shows: optimizing on the CPU"
        warnings.warn(f"{text}; install torch's CUDA build", CompressWarning, stacklevel=2)
    return "cuda" if name != "cpu" and available else "cpu"


def fitting(what: str, batch: int, work: Callable[[int], T]) -> T:
    """`work(batch)`, begun anew with half the batch each time that the GPU's memory does not hold it.

    Raises RuntimeUnavailable where not even a few images fit.
    """
    while True:
        try:
            return work(batch)
        except torch.OutOfMemoryError as error:
            if batch // 2 < FEWEST:
                raise RuntimeUnavailable(
                    f"{what}: the GPU's memory does not hold {batch} images at once; use --device cpu"
                ) from error
        batch //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        text = f"{what}: more than {batch} images at once do not fit the GPU's memory"
        warnings.warn(text, CompressWarning, stacklevel=2)


def resident(images: Tensor, device: str | torch.device) -> Tensor:
    """The images on the device for good; on the CPU where they would take too much of its memory."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if images.nbytes > RESIDENT * free:
            return images
    return images.to(device)


def sent(values: Tensor, device: str | torch.device) -> Tensor:
    """On the device, without waiting for what that computes now."""
    return values.to(device, non_blocking=True)


def autocast(device: torch.device, *, cached: bool = True) -> torch.autocast:
    """Mixed precision in bfloat16 where it pays: on a GPU, and on a CPU with the instructions for it.

    cached: weights are cast once each; a CUDA graph that is captured must cast them anew.
    """
    if device.type == "cuda":
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        pays = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return torch.autocast(device.type, torch.bfloat16, enabled=pays, cache_enabled=cached)


def laid_out(values: Tensor) -> Tensor:
    """Weights and maps of images in the order in which convolutions are fastest; others as they are."""
    return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values
