"""correct-bias: means over batches of unlike size, means of the record, integers with a zero point."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx.reference
import pytest
from scipy.special import ndtr

from onnxcompress.model import Model, load
from onnxcompress.optimize.calibration import InputRequest, Inputs, gather_inputs
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.correct_bias.input_means import BATCH, measured_means
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.progress import silent
from onnxcompress.statistics.record import known_statistics
from tests.helpers.folding import Arrays, graph, norm, weight
from tests.passes.test_correct_bias import linear

SIGNATURE = "(float[N,3,6,6] x) => (float[N,5,6,6] y)"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """16 dark images and 4 bright ones: means of batches of unlike size are unlike."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.integers(0, 64, (16, 6, 6, 3)), rng.integers(192, 256, (4, 6, 6, 3))])
    np.savez(tmp_path / "x.npz", x=x.astype(np.uint8))
    return tmp_path / "x.npz"


def test_means_are_over_images_whatever_the_batches(pictures: Path) -> None:
    model = Model.from_proto(graph(SIGNATURE, "y = Conv(x, w)", {"w": weight(5, 3, 1, 1)}))
    request = InputRequest(images=str(pictures), inputs="images", preprocess="unit")
    inputs = gather_inputs(model, request)
    found = measured_means(model, [linear(model)], inputs, silent)
    assert BATCH == 16
    (mean,) = found.values()
    assert isinstance(mean, np.ndarray)
    wanted = np.load(pictures)["x"].astype(np.float64).mean((0, 1, 2)) / 255
    np.testing.assert_allclose(mean.reshape(-1), wanted, rtol=1e-5)
    assert len(inputs.images) == 20


def test_layerwise_means_are_those_of_the_record(models: Path) -> None:
    """Whether or not BatchNorm was folded before; procedural images alone are further from them."""
    model = load(models / "resnet20-fashion.onnx")
    folded = model.copy()
    FoldBatchNorm().apply(folded)
    recorded = known_statistics(folded)
    inputs = gather_inputs(model, InputRequest(inputs="layerwise", synthetic=20))
    aligned, also, plain = (
        second_convolutions(net, replace(inputs, layerwise=layerwise))
        for net, layerwise in ((model, True), (folded, True), (folded, False))
    )
    gaps = []
    for block, means in aligned.items():
        np.testing.assert_allclose(means, also[block], rtol=1e-3, atol=1e-5)
        known = recorded[f"/blocks/{block}/conv1/bn/BatchNormalization_output_0"]
        z = known.mean / known.std
        rectified = known.mean * ndtr(z) + known.std * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
        gaps.append([np.abs(m - rectified).mean() / known.std.mean() for m in (means, plain[block])])
    near, far = np.mean(gaps, 0)
    assert near < 0.07
    assert near < 0.3 * far


def second_convolutions(model: Model, inputs: Inputs) -> dict[str, np.ndarray]:
    """Mean input of the tap in the middle, (channels,), of each block's second convolution."""
    outputs = {
        node.name.split("/")[2]: node.outputs[0].name
        for node in model.graph.nodes
        if "conv2/conv/Conv" in node.name
    }
    found = measured_means(model, [linear(model, name) for name in outputs.values()], inputs, silent)
    return {block: np.asarray(found[name])[:, 4] for block, name in outputs.items()}


def test_a_layer_whose_batchnorm_goes_into_it_has_layerwise_means() -> None:
    """The folded network has no such tensor: it is measured in the network as it is."""
    arrays: Arrays = {"w": weight(4, 3, 1, 1), "v": weight(5, 4, 1, 1), **norm(4, "a"), **norm(4, "b")}
    body = """
        c = Conv(x, w)
        n = BatchNormalization(c, ga, ba, ma, va)
        r = Relu(n)
        m = BatchNormalization(r, gb, bb, mb, vb)
        y = Conv(m, v)
    """
    model = Model.from_proto(graph(SIGNATURE, body, arrays))
    inputs = gather_inputs(model, InputRequest(inputs="layerwise", synthetic=8))
    found = measured_means(model, [linear(model, name) for name in ("c", "y")], inputs, silent)
    shapes = {name: np.asarray(means).shape for name, means in found.items()}
    assert shapes == {"c": (3, 1), "y": (4, 1)}


@pytest.mark.parametrize("zero", [0, 1000])
def test_an_integer_bias_with_a_zero_point_is_corrected(zero: int, pictures: Path, tmp_path: Path) -> None:
    """Means of the outputs are the reference's, but for half a step of the bias and images held out."""
    w, b = weight(5, 3, 1, 1), weight(5, seed=1)
    reference = graph(SIGNATURE, "y = Conv(x, w, b)", {"w": w, "b": b}, opset=21, ir=10)
    onnx.save(reference, tmp_path / "reference.onnx")
    step, scale = np.float32(np.abs(w).max() / 7), np.float32(1e-3)
    arrays = {
        "q": (np.round(w / step) + zero // 200).astype(np.int8), "s": step, "zq": np.int8(zero // 200),
        "sb": scale, "qb": (np.rint(b / scale) + zero).astype(np.int32), "zb": np.int32(zero),
    }  # fmt: skip
    body = "v = DequantizeLinear(q, s, zq) c = DequantizeLinear(qb, sb, zb) y = Conv(x, v, c)"
    stored = {name: np.asarray(values) for name, values in arrays.items()}
    model = Model.from_proto(graph(SIGNATURE, body, stored, opset=21, ir=10))
    one = CorrectBias(
        reference=str(tmp_path / "reference.onnx"), inputs="images", images=str(pictures), preprocess="unit"
    )
    assert one.apply(model).modified
    x = np.load(pictures)["x"].transpose(0, 3, 1, 2).astype(np.float32) / 255
    means = [outputs(proto, {"x": x})[0].mean((0, 2, 3)) for proto in (reference, model.to_proto())]
    np.testing.assert_allclose(means[1], means[0], rtol=0, atol=1.2e-3)


def outputs(proto: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Of onnx's reference: onnxruntime has no bias with a zero point."""
    return list(onnx.reference.ReferenceEvaluator(proto).run(None, inputs))
