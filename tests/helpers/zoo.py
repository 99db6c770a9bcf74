"""Real networks for the tests: built here with random weights, exported by both of torch's exporters.

Nothing is downloaded. `path("resnet18-ts-bn")` exports on first use and keeps the file under
`.cache/zoo/<key>/`; the key changes with this file and with the versions of the exporters.
Two processes may ask for the same file at once: one exports, the other waits.

    ts      torch.onnx.export(dynamo=False)          bn      BatchNormalization kept, inference mode
    dynamo  torch.onnx.export(dynamo=True)           folded  what the exporter does by default

The dynamo exporter folds BN into Conv in its optimizer, not in its translation: `optimize=False`
keeps BN, and with it all else the optimizer would clean up: a zero bias computed at each Conv, say,
or SplitToSequence and SequenceAt where torch has `chunk`.
Both files of an exporter hold the same weights, so their outputs agree.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.paths import ROOT

if TYPE_CHECKING:
    import torch

NAMES = (
    "resnet20_cifar",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "wide_resnet50_2",
    "resnext50_32x4d",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
    "densenet121",
    "vgg16_bn",
    "shufflenet_v2_x1_0",
)
KINDS = ("ts-bn", "ts-folded", "dynamo-bn", "dynamo-folded")
VARIANTS = tuple(f"{name}-{kind}" for name in NAMES for kind in KINDS)
LARGER = {"resnet34", "resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d", "vgg16_bn"}
"""ResNet-18 and RegNet have the same kinds of layers and blocks; VGG-16 has a hundred million weights."""
BOTH = {"resnet20_cifar", "shufflenet_v2_x1_0"}
"""Exported by dynamo and with folded norms, too, in a plain run: small, and different in kind."""

PROJECTIONS = {  # blocks whose shortcut strides, pads or widens: it stays when the branch goes
    "resnet20_cifar": 2,
    "resnet18": 3,
    "resnet34": 3,
    "resnet50": 4,  # layer1 widens 64 to 256
    "resnet101": 4,
    "wide_resnet50_2": 4,
    "resnext50_32x4d": 4,
    "regnet_y_400mf": 4,
}
EXPECTED_BLOCKS = {  # parts that can be dropped; test_zoo.py counts them in the torch modules
    "resnet20_cifar": 9,
    "resnet18": 8,  # 2+2+2+2
    "resnet34": 16,  # 3+4+6+3
    "resnet50": 16,  # 3+4+6+3
    "resnet101": 33,  # 3+4+23+3
    "wide_resnet50_2": 16,
    "resnext50_32x4d": 16,
    "mobilenet_v2": 10,  # 17 inverted residuals; 7 stages begin without a shortcut
    "mobilenet_v3_large": 10,  # 15, less 5: 3 of stride 2, and 2 of stride 1 that widen
    "efficientnet_b0": 9,  # 16 MBConv; 7 stages begin without a shortcut
    "regnet_y_400mf": 16,  # 1+3+6+6
    "convnext_tiny": 18,  # 3+3+9+3, all with an identity shortcut; downsampling lies between
    "densenet121": 0,  # every layer widens the concatenation
    "vgg16_bn": 9,  # 13 convs, less 4 that widen: plain Conv-BN-ReLU on the trunk
    "shufflenet_v2_x1_0": 13,  # 4+8+4 units, less 3 of stride 2; half the channels pass untouched
}
CLASSES = 10
ZOO = ROOT / ".cache" / "zoo"


def parameters(values: Sequence[str]) -> list[Any]:
    """A test's parameters, NAMES or VARIANTS; those that a plain run leaves out are marked `larger`."""

    def larger(name: str, *how: str) -> bool:
        return name in LARGER or (("dynamo" in how or "folded" in how) and name not in BOTH)

    return [pytest.param(v, marks=pytest.mark.larger if larger(*v.split("-")) else ()) for v in values]


def path(variant: str) -> Path:
    """The ONNX file of one of VARIANTS, exported now if it is not in the cache. KeyError if unknown."""
    from filelock import FileLock

    if variant not in VARIANTS:
        raise KeyError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    folder = _folder()
    file = folder / f"{variant}.onnx"
    if not file.exists():
        name, exporter, _ = variant.split("-")
        with FileLock(folder / f"{name}-{exporter}.lock"):
            if not file.exists():
                with one_thread():
                    (_export_ts if exporter == "ts" else _export_dynamo)(name, folder)
    return file


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: two test processes on two cores otherwise wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def image_size(name: str) -> int:
    """Height and width of the input, in pixels: small, to be fast."""
    return 32 if name == "resnet20_cifar" else 64


def images(name: str, batch: int, seed: int = 0) -> torch.Tensor:
    """Standard normal inputs (batch, 3, size, size), float32."""
    import torch

    size = image_size(name)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def build(name: str) -> torch.nn.Module:
    """The network in inference mode, with the same weights at every call; (N, 3, s, s) -> (N, 10)."""
    import torch

    with one_thread(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        net = architecture(name).eval()
        _randomize_norms(net)
        _randomize_weights(net, images(name, 4, seed=1))
    return net


def architecture(name: str) -> torch.nn.Module:
    """The network as torchvision builds it, with CLASSES classes."""
    import torch

    if name == "resnet20_cifar":
        return _resnet20_cifar()
    # The stub lets torchvision run without its compiled detection operators, which no network here uses.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("stub"))
    from torchvision import models

    net: torch.nn.Module = getattr(models, name)(num_classes=CLASSES)
    if name == "vgg16_bn":  # its pool cannot make 7x7 of 2x2 in ONNX; its Linear layers take 500 MB
        net.avgpool = torch.nn.Identity()
        net.classifier = torch.nn.Linear(512 * 2 * 2, CLASSES)
    return net


def _resnet20_cifar() -> torch.nn.Module:
    """ResNet-20 for 32x32 inputs, shortcuts without parameters (He et al. 2016, option A)."""
    from torch import Tensor, nn
    from torch.nn import functional

    def conv(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.stride, self.extra = stride, (outputs - inputs) // 2
            first, second = conv(inputs, outputs, stride), conv(outputs, outputs, 1)
            self.branch = nn.Sequential(*first, nn.ReLU(), *second)

        def forward(self, x: Tensor) -> Tensor:
            short = x
            if self.extra:
                short = x[:, :, :: self.stride, :: self.stride]
                short = functional.pad(short, (0, 0, 0, 0, self.extra, self.extra))
            return functional.relu(self.branch(x) + short)

    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [Block(a, b, b // a) for a, b in pairwise(widths)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)]
    return nn.Sequential(*conv(3, 16, 1), nn.ReLU(), *blocks, *head)


def _randomize_weights(net: torch.nn.Module, x: torch.Tensor) -> None:
    """Scale each layer to unit output variance on `x` (layer after layer), then draw the biases.

    Without it the signal fades in deep networks, and the output no longer depends on the input.
    """
    from torch import Tensor, nn

    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]

    def scale(layer: Any, _: Any, out: Tensor) -> Tensor:
        layer.weight /= out.std()
        return out / out.std()

    for layer in layers:
        if layer.bias is not None:
            layer.bias.zero_()
    for key, parameter in net.named_parameters():
        if key.endswith("layer_scale"):  # 1e-6 at first: the blocks would do nothing
            parameter.uniform_(0.2, 0.6)
    hooks = [layer.register_forward_hook(scale) for layer in layers]
    net(x)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        if layer.bias is not None:
            layer.bias.normal_(0, 0.1)


def _randomize_norms(net: torch.nn.Module) -> None:
    """Nothing about a normalization layer may be 0 or 1, or a wrong fold would pass unseen."""
    from torch import nn

    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


def _export_ts(name: str, folder: Path) -> None:
    import torch

    net, x = build(name), images(name, 2)
    kept = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    for kind, options in {"ts-bn": kept, "ts-folded": {}}.items():
        part = folder / f"{name}-{kind}.part"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this exporter is deprecated, and still in wide use
            torch.onnx.export(
                net,
                (x,),
                str(part),
                dynamo=False,
                input_names=["input"],
                output_names=["output"],
                dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
                **options,  # type: ignore[arg-type]
            )
        part.replace(folder / f"{name}-{kind}.onnx")


def _export_dynamo(name: str, folder: Path) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            build(name),
            (images(name, 2),),
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    for kind in ("dynamo-bn", "dynamo-folded"):
        if kind == "dynamo-folded":
            program.optimize()
        part = folder / f"{name}-{kind}.part"
        program.save(str(part), external_data=False)
        part.replace(folder / f"{name}-{kind}.onnx")


@cache
def _folder() -> Path:
    """The cache of this version of the zoo. Other versions are removed once a day old: not before,
    since another run may be using them.
    """
    from filelock import FileLock

    state = [Path(__file__).read_bytes()]
    state += [version(p).encode() for p in ("torch", "torchvision", "onnx", "onnxscript")]
    folder = ZOO / hashlib.sha256(b"\0".join(state)).hexdigest()[:16]
    if not folder.exists():
        ZOO.mkdir(parents=True, exist_ok=True)
        with FileLock(ZOO / "lock"):
            yesterday = time.time() - 86400
            for old in [p for p in ZOO.iterdir() if p.is_dir() and p.stat().st_mtime < yesterday]:
                shutil.rmtree(old, ignore_errors=True)
            folder.mkdir(exist_ok=True)
    return folder
