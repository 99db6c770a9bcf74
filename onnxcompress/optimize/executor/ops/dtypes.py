"""Between ONNX element types, numpy arrays and torch tensors."""

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
"""The types torch has; the 8-bit and smaller floats and the 2- and 4-bit integers are left out."""


def tensor_from(array: Any) -> Tensor | None:
    """A CPU tensor with a copy of the values; None where torch has no such type (strings, int4, …)."""
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
    """The torch type that an ONNX element type means at this node.

    Raises UnsupportedOp where torch has no such type.
    """
    dtype = TORCH_TYPES.get(int(element_type))
    if dtype is None:
        name = type_name(int(element_type))
        raise site.unsupported(f"it needs element type {name}, which torch cannot compute with")
    if dtype.is_floating_point and site.dtype is not None:
        return site.dtype
    return dtype


def convert(x: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """A tensor (or a list of them) on the device, and in the type if floating (None: as it is)."""
    if isinstance(x, list):
        return [convert(part, device, dtype) for part in x]
    if dtype is not None and x.is_floating_point():
        return x.to(device=device, dtype=dtype)
    return x if device is None else x.to(device=device)
