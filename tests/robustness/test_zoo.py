"""The zoo itself: its files are valid, are what their names say, and compute what torch computes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from tests.helpers import zoo

if TYPE_CHECKING:
    import torch

if find_spec("torchvision") is None:  # importorskip would import it without the zoo's stub
    pytest.skip("needs torchvision", allow_module_level=True)
pytestmark = pytest.mark.zoo

BATCHES = (1, 3)
BLOCK_TYPES = {  # classes of torchvision, and `Block` of the zoo's own ResNet-20
    *("BasicBlock", "Bottleneck", "Block", "InvertedResidual", "MBConv"),
    *("ResBottleneckBlock", "CNBlock", "_DenseLayer"),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with zoo.one_thread():
        yield


@pytest.mark.parametrize("variant", zoo.parameters(zoo.VARIANTS))
def test_file_is_valid_and_keeps_or_folds_batchnorm_as_named(variant: str) -> None:
    file = zoo.path(variant)
    onnx.checker.check_model(str(file), full_check=True)
    norms = [n for n in onnx.load(file).graph.node if n.op_type == "BatchNormalization"]
    assert all(_attributes(norm).get("training_mode", 0) == 0 for norm in norms)
    name, _, kind = variant.split("-")
    has_norms = name != "convnext_tiny"  # it has LayerNorm only
    folds_all = name != "densenet121"  # there BN stands before ReLU and Conv: some cannot fold
    assert bool(norms) == (has_norms and (kind == "bn" or not folds_all))


@pytest.mark.parametrize("variant", zoo.parameters(zoo.VARIANTS))
def test_output_matches_torch(variant: str) -> None:
    session = _session(variant)
    for batch, expected in _torch_outputs(variant.split("-")[0]).items():
        x = zoo.images(variant.split("-")[0], batch).numpy()
        (actual,) = session.run(["output"], {"input": x})
        assert actual.shape == (batch, zoo.CLASSES)
        assert np.isfinite(actual).all()
        assert np.abs(actual - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", zoo.parameters(zoo.NAMES))
def test_output_depends_on_the_input(name: str) -> None:
    outputs = _torch_outputs(name)[3]
    assert outputs.std(axis=0).mean() >= 0.01 * np.abs(outputs).mean()


@pytest.mark.parametrize("name", zoo.parameters(zoo.NAMES))
def test_expected_blocks_are_those_whose_input_and_output_shapes_agree(name: str) -> None:
    import torch

    net, x = zoo.architecture(name).eval(), zoo.images(name, 1)
    same: list[bool] = []

    def compare(_: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        same.append(isinstance(inputs[0], torch.Tensor) and inputs[0].shape == output.shape)

    types = {"Conv2d"} if name == "vgg16_bn" else BLOCK_TYPES
    for module in net.modules():
        if type(module).__name__ in types:
            module.register_forward_hook(compare)
    with torch.no_grad():
        net(x)
    assert same
    assert sum(same) == zoo.EXPECTED_BLOCKS[name] - zoo.PROJECTIONS.get(name, 0)


def test_two_builds_have_the_same_weights() -> None:
    import torch

    first, second = (zoo.build("resnet20_cifar").state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_unknown_variant_is_named() -> None:
    with pytest.raises(KeyError, match="no variant 'resnet18'"):
        zoo.path("resnet18")


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


@cache
def _torch_outputs(name: str) -> dict[int, npt.NDArray[np.float32]]:
    import torch

    net = zoo.build(name)
    with torch.no_grad():
        return {batch: net(zoo.images(name, batch)).numpy() for batch in BATCHES}


def _session(variant: str) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(zoo.path(variant), options, providers=["CPUExecutionProvider"])
