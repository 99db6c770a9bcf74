"""torchvision's networks as small files: large weights are drawn when they are read.

A weight is drawn from its name alone (He's normal distribution), so that a file without them means the same
network on every machine. The BatchNorms have the statistics that those weights give on noise: without them
activations would grow by each block, beyond float16 and any integer grid.
"""

from __future__ import annotations

import sys
import types
import zlib
from pathlib import Path

import numpy as np
import onnx

NETWORKS = ("resnet34", "resnet50", "mobilenet_v2")
DRAWN = 4096
"""Elements from which on a weight is left out of the file."""


def export(folder: Path, size: int) -> None:
    """Write NAME.onnx for each network, of `size` × `size` images and any batch. Needs torchvision."""
    import torch

    from onnxcompress import export as export_net

    # The stub lets torchvision run without its compiled detection operators, which no network here uses.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("stub"))
    from torchvision import models

    folder.mkdir(parents=True, exist_ok=True)
    for name in NETWORKS:
        file = folder / f"{name}.onnx"
        net = getattr(models, name)()
        with torch.no_grad():
            for key, value in net.named_parameters():
                if value.numel() >= DRAWN:
                    value.copy_(torch.from_numpy(drawn(key, tuple(value.shape))))
        _settle(net, size)
        export_net(net.eval(), torch.zeros(1, 3, size, size), file, preprocess="imagenet")
        proto = onnx.load(file)
        left = sum(_left_out(tensor) for tensor in proto.graph.initializer)
        onnx.save(proto, file)
        print(f"{file}: {file.stat().st_size / 1e3:.0f} kB, {left} weights to be drawn", flush=True)


def read(file: Path) -> onnx.ModelProto:
    """The network with all its weights."""
    proto = onnx.load(file)
    for tensor in proto.graph.initializer:
        if not tensor.raw_data and tensor.data_type == onnx.TensorProto.FLOAT and _size(tensor) >= DRAWN:
            tensor.raw_data = drawn(tensor.name, tuple(tensor.dims)).tobytes()
    return proto


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32, normal, deviation √(2 / inputs of an output)."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    deviation = np.sqrt(2 / np.prod(shape[1:]))
    return np.asarray(deviation * rng.standard_normal(shape), np.float32)


def _settle(net: object, size: int) -> None:
    """Give the BatchNorms the statistics of noise."""
    import torch

    assert isinstance(net, torch.nn.Module)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain mean over the batches
    net.train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(2):
            net(torch.randn(16, 3, min(size, 96), min(size, 96), generator=generator))


def _left_out(tensor: onnx.TensorProto) -> bool:
    """Take the values out of the file, where they can be drawn again."""
    if tensor.data_type != onnx.TensorProto.FLOAT or _size(tensor) < DRAWN:
        return False
    if not np.array_equal(onnx.numpy_helper.to_array(tensor), drawn(tensor.name, tuple(tensor.dims))):
        return False
    tensor.ClearField("raw_data")
    return True


def _size(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims))
