"""Conversions between ONNX element types, numpy arrays and torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from onnxcompress.model.model_like import type_name
from onnxcompress.optimize.executor.ops.registry import Site

_P = onnx.TensorProto
TORCH_TYPES: dict[int, torch.dtype] = {
    _P.FLOAT: torch.float32,
    _P.DOUBLE: torch.float64,
    _P.FLOAT16: torch.float16,
    _P.BFLOAT16: torch.bfloat16,
    _P.INT8: torch.int8,
    _P.INT16: torch.int16,
    _P.INT32: torch.int32,
    _P.INT64: torch.int64,
    _P.UINT8: torch.uint8,
    _P.UINT16: torch.uint16,
    _P.UINT32: torch.uint32,
    _P.UINT64: torch.uint64,
    _P.BOOL: torch.bool,
}
"""Element types that torch computes with: floats of 8 bits and less, and 2- and 4-bit integers are not."""


def tensor_from(array: Any) -> Tensor | None:
    """Copy an array to a tensor on the CPU.

    Args:
        array: A numpy array, or anything that converts to one.

    Returns:
        The tensor; None where torch does not have the type (strings, int4, …).
    """
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        bits = torch.from_numpy(np.array(array.view(np.int16), order="C"))
        return bits.view(torch.bfloat16)
    if array.dtype.kind not in "fiub" or array.dtype.name not in _NUMPY_NAMES:
        return None
    return torch.from_numpy(np.array(array, order="C"))


_NUMPY_NAMES = frozenset(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)) | {
    "bool",
    "float16",
    "float32",
    "float64",
}


def type_at(site: Site, element_type: int) -> torch.dtype:
    """Look up the torch type that an ONNX element type means at a node.

    Args:
        site: The node.
        element_type: A `TensorProto.DataType`.

    Returns:
        The torch type; for floating types the executor's, where it has one.

    Raises:
        UnsupportedOp: Torch does not have the type.
    """
    dtype = TORCH_TYPES.get(int(element_type))
    if dtype is None:
        name = type_name(int(element_type))
        raise site.unsupported(f"it needs element type {name}, which torch cannot compute with")
    if dtype.is_floating_point and site.dtype is not None:
        return site.dtype
    return dtype


def convert(x: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Move a tensor to a device and, if it is floating, to a type.

    Args:
        x: The tensor, or a list of tensors.
        device: The device; None: where it is.
        dtype: The floating type; None: the type that it has.

    Returns:
        The tensor, or the list of tensors.
    """
    if isinstance(x, list):
        return [convert(part, device, dtype) for part in x]
    if dtype is not None and x.is_floating_point():
        return x.to(device=device, dtype=dtype)
    return x if device is None else x.to(device=device)
