"""The published fine-tuning, which this tool is compared with: its networks are what they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import find_blocks
from onnxcompress.graph.query import is_op
from onnxcompress.model import Model, load
from onnxcompress.optimize.executor import Executor
from tests.benchmarks.practise_finetuning import published_finetuning, to_training, with_adapters

MODELS = Path(__file__).parents[2] / "models"


def image_batch(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def outputs(model: Model, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return Executor.from_model(model).run({"input": x}, ["logits"])["logits"].numpy()


@pytest.mark.parametrize("name", ["resnet20-fashion", "mobilenetv2-fashion"])
def test_before_training_adapters_change_nothing_but_the_blocks_are_gone(name: str) -> None:
    model = load(MODELS / f"{name}.onnx")
    names = ["blocks.1", "blocks.2", "blocks.5"]
    adapted, dropped = with_adapters(model, names), model.copy()
    drop_blocks(dropped, [find_blocks(model)[n].exit for n in names])
    x = image_batch(2)
    assert np.allclose(outputs(adapted, x), outputs(dropped, x), atol=1e-4)
    assert not np.allclose(outputs(adapted, x), outputs(model, x), atol=1e-2)
    assert norms(adapted) == norms(dropped) < norms(model)


def test_training_moves_weights_and_running_statistics_and_leaves_inference_mode() -> None:
    model = load(MODELS / "mobilenetv2-fashion.onnx")
    tuned = published_finetuning(model, ["blocks.1"], image_batch(8), steps=2)
    norms = [node for node in tuned.graph.nodes if is_op(node, "BatchNormalization")]
    before = {t.name: t.values for t in model.graph.tensors().values() if hasattr(t, "values")}
    for node in norms:
        assert not node.attrs["training_mode"]
        assert len(node.outputs) == 1
        for tensor in node.inputs[1:]:
            assert not np.array_equal(tensor.values, before[tensor.name])
    assert np.isfinite(outputs(tuned, image_batch(2))).all()


def test_batch_norm_in_training_mode_normalizes_by_the_batch() -> None:
    model = load(MODELS / "mobilenetv2-fashion.onnx")
    norms = to_training(model, "input", str(norm_output(model)))
    x = image_batch(16)
    executor = Executor.from_model(model, training=True)
    node = norms[0]
    names = [node.inputs[0].name, *(t.name for t in node.outputs)]
    made = executor.run({"input": x}, names)
    raw, y = (made[name].float() for name in names[:2])
    mean, spread = raw.mean((0, 2, 3)), raw.var((0, 2, 3), correction=0)
    gamma, beta, old_mean, old_spread = (torch.from_numpy(t.values.copy()) for t in node.inputs[1:])
    shape = (1, -1, 1, 1)
    wanted = (raw - mean.reshape(shape)) / (spread + node.attrs["epsilon"]).sqrt().reshape(shape)
    assert torch.allclose(y, wanted * gamma.reshape(shape) + beta.reshape(shape), atol=1e-3)
    assert torch.allclose(made[names[2]], 0.9 * old_mean + 0.1 * mean, atol=1e-4)
    assert torch.allclose(made[names[3]], 0.9 * old_spread + 0.1 * spread, rtol=1e-3, atol=1e-5)


def norms(model: Model) -> int:
    return sum(is_op(node, "BatchNormalization") for node in model.graph.nodes)


def norm_output(model: Model) -> str:
    """The output of the network's first BatchNormalization."""
    node = next(node for node in model.graph.nodes if is_op(node, "BatchNormalization"))
    return str(node.outputs[0].name)
