"""Export from torch: BatchNorm is kept, the file computes what torch does, the network stays as it was."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import onnxcompress
from onnxcompress import torch_export
from onnxcompress.errors import InputError, ModelError, OptionError
from onnxcompress.evaluation.equivalence import difference_of
from onnxcompress.model import load
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.fold_bn.fold_bn import FoldBatchNormFigures
from onnxcompress.runtime.inference import run
from onnxcompress.statistics.record import known_statistics, read_record
from tests.helpers import zoo

torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision")
TOLERANCE = 2e-5


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def small(last: nn.Module | None = None) -> nn.Sequential:
    """A network of a few layers, with a BatchNorm behind an activation, too."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2)]
    return nn.Sequential(*convs, *([last] if last else []), nn.Flatten(), nn.Linear(36, 2))


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet20_cifar", 0),
        pytest.param("mobilenet_v2", 0, marks=torchvision),
        pytest.param("densenet121", 62, marks=torchvision),  # before ReLU, behind a Concat
    ],
)
def test_a_real_network_keeps_its_norms(name: str, left: int, tmp_path: Path) -> None:
    net, path = zoo.build(name), tmp_path / "net.onnx"
    size = zoo.image_size(name)
    with zoo.one_thread(), torch.no_grad():
        onnxcompress.export(net, torch.randn(1, 3, size, size), path, preprocess=f"imagenet size={size}")
        onnx.checker.check_model(str(path), full_check=True)
        model = load(path)
        assert len(known_statistics(model)) == norms(net)
        assert model.metadata["preprocessing"].startswith("mean=0.485,0.456,0.406 std=0.229,0.224,0.225")
        for batch in (1, 3):
            x = zoo.images(name, batch)
            got = run(path, {"input": x.numpy()})
            assert difference_of({"output": net(x).numpy()}, got).max_rel < TOLERANCE
    result = FoldBatchNorm().apply(model)
    assert result.measured == FoldBatchNormFigures(norms(net) - left, left, norms(net))
    assert len(read_record(model)) == norms(net)


def test_the_network_stays_as_it_was(tmp_path: Path) -> None:
    net = small().train()
    net[3].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    onnxcompress.export(net, torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    assert [module.training for module in net.modules()] == [True] * 4 + [False] + [True] * 3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def broken(*_: Any) -> onnx.ModelProto:
    raise TypeError("export() got an unexpected keyword argument 'dynamo'")


@pytest.mark.slow
def test_without_torchscript_dynamo_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    if int(torch.__version__.split(".")[1]) < 9 and torch.__version__.startswith("2."):
        pytest.skip("the dynamo mode of this torch does not go with today's onnxscript")
    monkeypatch.setattr(torch_export, "_torchscript", broken)
    net, path = small(), tmp_path / "net.onnx"
    onnxcompress.export(net, torch.randn(1, 3, 8, 8), path)
    model = load(path)
    ops = [node.op for node in model.graph.nodes]
    assert ops.count("BatchNormalization") == 2
    assert not {"Expand", "CastLike"} & set(ops)  # the zero biases that the exporter computes are constants
    assert not any(node.metadata_props for node in onnx.load(path).graph.node)
    x = torch.randn(5, 3, 8, 8)
    assert (
        difference_of({"output": net.eval()(x).detach().numpy()}, run(path, {"input": x.numpy()})).max_rel
        < TOLERANCE
    )


def test_a_mode_that_folds_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_export._torchscript

    def folding(*given: Any) -> onnx.ModelProto:
        proto = right(*given)
        for node in proto.graph.node:
            if node.op_type == "BatchNormalization":
                node.op_type = "Identity"
                del node.input[1:], node.attribute[:]
        return proto

    monkeypatch.setattr(torch_export, "_torchscript", folding)
    monkeypatch.setattr(torch_export, "_dynamo", broken)
    with pytest.raises(ModelError, match="0 of 2 BatchNorms were kept") as caught:
        onnxcompress.export(small(), torch.randn(1, 3, 8, 8), tmp_path / "net.onnx")
    assert "dynamo: export() got an unexpected" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class Outputs(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"features": x, "heads": (x.mean(dim=(2, 3)), x.mean())}


def test_several_outputs_a_fixed_batch_and_an_opset(tmp_path: Path) -> None:
    net, path, x = nn.Sequential(small()[:2], Outputs()), tmp_path / "net.onnx", torch.randn(2, 3, 8, 8)
    onnxcompress.export(net, x, path, opset=15, dynamic_batch=False)
    model = load(path)
    assert model.opset == 15
    assert model.graph.inputs[0].shape == [2, 3, 8, 8]
    with torch.no_grad():
        wanted = [net.eval()(x)["features"], *net(x)["heads"]]
    for got, expected in zip(run(path, {"input": x.numpy()}).values(), wanted, strict=True):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)
    onnxcompress.export(net, x, path)
    batches = [t.shape[0] for t in load(path).graph.outputs if t.shape]
    assert batches == ["batch", "batch"]  # the mean over all is a scalar


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class BatchSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (2 if len(x) > 2 else 1)


@pytest.mark.parametrize("odd", [Noise(), BatchSize()])
def test_a_file_that_computes_something_else_is_not_written(
    odd: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_export, "_dynamo", broken)  # it fails too, after seconds
    with pytest.raises(ModelError, match=r"is off by .* draw random numbers, or branch"):
        onnxcompress.export(small(odd), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line_and_come_before_the_work(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", torch.randn(2, 3, 8, 8)
    with pytest.raises(ModelError, match=r"module '1': this BatchNorm keeps no running statistics"):
        onnxcompress.export(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), x, path
        )
    with pytest.raises(InputError, match="the network fails on the example of shape 2x3x12x12"):
        onnxcompress.export(small(), torch.randn(2, 3, 12, 12), path)
    with pytest.raises(InputError, match="must be a float32 batch"):
        onnxcompress.export(small().double(), x.double(), path)
    with pytest.raises(OptionError, match="no preset 'imagnet'; did you mean 'imagenet'"):
        onnxcompress.export(small(), x, path, preprocess="imagnet")
    with pytest.raises(ModelError, match="existing folder"):
        onnxcompress.export(small(), x, tmp_path / "missing" / "net.onnx")
    assert not path.exists()


def test_importing_the_package_stays_light() -> None:
    code = (
        "import onnxcompress as o, sys; assert not {'numpy', 'onnx', 'torch'} & set(sys.modules); o.nothing"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "has no attribute 'nothing'" in done.stderr
