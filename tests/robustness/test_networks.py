"""The parts that everything stands on, on all exported networks: files, folding, the executor.

Tolerances are relative to the largest output; onnxruntime runs with its graph optimizations off.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxcompress.evaluation.equivalence import difference_of
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model, load, save
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.runtime.inference import run
from tests.helpers import zoo

torch = pytest.importorskip("torch")

TOLERANCE = 1e-5


@pytest.mark.zoo
@pytest.mark.parametrize("variant", zoo.parameters(zoo.VARIANTS))
def test_a_real_network_survives_everything(variant: str) -> None:
    """One test for one file: loading and running a network is what costs."""
    from onnxcompress.optimize.executor import Executor

    path = zoo.path(variant)
    name = variant.split("-")[0]
    x = zoo.images(name, 2)
    model = load(path)
    assert len(tensor_shapes(model)) > len(model.graph.nodes) // 2
    original = onnx.load(str(path))
    assert model.to_proto() == original  # shape inference changed nothing
    source, output = model.graph.inputs[0].name, model.graph.outputs[0].name
    feeds = {source: x.numpy()}
    wanted = run(original, feeds)
    with torch.no_grad():
        got = Executor.from_model(model).run({source: x}, [output])
    assert difference_of(wanted, {output: got[output].numpy()}).max_rel < TOLERANCE
    result = FoldBatchNorm().apply(model)
    if variant.endswith("-bn") and name != "convnext_tiny":
        assert result.modified
        assert difference_of(wanted, run(model, feeds)).max_rel < TOLERANCE
        left = sum(n.op == "BatchNormalization" for n in model.graph.nodes)
        assert (left == 0) == (name != "densenet121")


def test_save_and_load_are_the_identity_on_disk(tmp_path: Path) -> None:
    for variant in ("resnet20_cifar-ts-bn", "resnet20_cifar-dynamo-folded"):
        path = zoo.path(variant)
        save(load(path), tmp_path / "copy.onnx")
        assert onnx.load(str(tmp_path / "copy.onnx")) == onnx.load(str(path))


def test_a_float16_network_folds() -> None:
    """Half precision has 11 bits: folding may move an output by a few units in the last place."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float16[N,3,8,8] x) => (float16[N,4,8,8] y)
    { c = Conv<pads = [1, 1, 1, 1]>(x, w) y = BatchNormalization(c, s, o, m, v) }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    values = {"w": rng.normal(0, 0.2, (4, 3, 3, 3)), "s": rng.uniform(0.5, 2, 4), "o": rng.normal(0, 1, 4)}
    values |= {"m": rng.normal(0, 1, 4), "v": rng.uniform(0.5, 2, 4)}
    for name, value in values.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float16), name))
    feeds = {"x": rng.normal(0, 1, (2, 3, 8, 8)).astype(np.float16)}
    model = Model.from_proto(proto)
    assert FoldBatchNorm().apply(model).modified
    assert difference_of(run(proto, feeds), run(model, feeds)).max_rel < 4 * 2**-11
