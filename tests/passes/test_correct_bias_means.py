"""correct-bias: means over batches of unlike size, draws that differ, integers with a zero point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.reference
import pytest

from onnxcompress.model import Model, load
from onnxcompress.optimize.calibration import InputRequest, gather_inputs
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.correct_bias.input_means import BATCH, _drawn, measured_means
from onnxcompress.passes.fold_bn import FoldBatchNorm
from tests.helpers.folding import graph, weight
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
    found = measured_means(model, [linear(model)], inputs, 0, lambda *_: None)
    assert BATCH == 16
    (mean,) = found.values()
    assert isinstance(mean, np.ndarray)
    wanted = np.load(pictures)["x"].astype(np.float64).mean((0, 1, 2)) / 255
    np.testing.assert_allclose(mean.reshape(-1), wanted, rtol=1e-5)
    assert len(inputs.images) == 20


def test_batches_of_drawn_inputs_differ_and_follow_the_seed(models: Path) -> None:
    model = load(models / "resnet20-fashion.onnx")
    FoldBatchNorm().apply(model)
    name = next(n.outputs[0].name for n in model.graph.nodes if n.op == "Relu")

    def drawn(seed: int) -> list[tuple[int, np.ndarray]]:
        batches, values_of = _drawn(model, [name], 2 * BATCH + 3, seed)
        return [(len(batch), values_of(batch)[name]) for batch in batches]

    first, again, other = drawn(0), drawn(0), drawn(7)
    assert [(count, len(values)) for count, values in first] == [(16, 16), (16, 16), (3, 3)]
    assert not np.array_equal(first[0][1], first[1][1])
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0][1], other[0][1])


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
