"""Where torch computes, how much goes there at once, and with which precision.

Weights of convolutions lie in channels-last order. On a GPU: images and weights lie there once, products
are in bfloat16 where its tensor cores have it, and no step waits for the device (no `.item()`, no copy
back). What does not fit its memory goes there in smaller batches, and what cannot be there goes to the CPU;
a CompressWarning says so.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from contextlib import suppress
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
    """Choose where torch computes.

    Args:
        name: `cpu`, `cuda`, or `auto`: the GPU where torch has one.

    Returns:
        `cpu` or `cuda`.

    Raises:
        RuntimeUnavailable: `cuda` was asked for and torch sees no GPU.
    """
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
    """Run `work(batch)`, again with half the batch each time that the GPU's memory does not hold it.

    Args:
        what: The stage, for messages.
        batch: Images at once in the first attempt.
        work: Computes with the given number of images at once.

    Returns:
        What `work` returns.

    Raises:
        RuntimeUnavailable: Not even a few images fit.
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
    """Move images to the device for good, unless they would take too much of its memory.

    Args:
        images: The images, (N, …).
        device: The device.

    Returns:
        The images on the device, or as they were.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if images.nbytes > RESIDENT * free:
            return images
    return images.to(device)


def sent(values: Tensor, device: str | torch.device) -> Tensor:
    """Move values to a device without waiting for what it computes now.

    Args:
        values: The values.
        device: The device.

    Returns:
        The values on the device.
    """
    return values.to(device, non_blocking=True)


def release_memory() -> None:
    """Give memory that was freed back to the system, where the C library does not do so by itself (glibc).

    Results that stay lie between tensors that were freed, and keep these pages in the process.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library, or another system
        ctypes.CDLL(None).malloc_trim(0)


def autocast(device: torch.device, *, cached: bool = True) -> torch.autocast:
    """Create a context of mixed precision: bfloat16 where the device has instructions for it.

    Args:
        device: Where torch computes.
        cached: Whether weights are cast once each; while a CUDA graph is captured they must be cast anew.

    Returns:
        The context, disabled where bfloat16 does not pay.
    """
    if device.type == "cuda":
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        pays = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return torch.autocast(device.type, torch.bfloat16, enabled=pays, cache_enabled=cached)


def laid_out(values: Tensor) -> Tensor:
    """Put a tensor of four axes into the channels-last order, in which convolutions are fastest.

    Args:
        values: Weights or feature maps.

    Returns:
        The tensor in that order; one of another rank as it is.
    """
    return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values
