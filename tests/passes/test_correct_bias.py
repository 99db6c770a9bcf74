"""correct-bias: means of windows and of activations, against onnxruntime and against samples; the pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxcompress.errors import OptionError
from onnxcompress.graph.channel_groups.tracer import find_channel_groups
from onnxcompress.graph.linear_layer import Linear, as_linear
from onnxcompress.graph.query import producer
from onnxcompress.model import Model, load
from onnxcompress.passes.base import PassResult
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.correct_bias.correct_bias import CorrectBiasFigures, bias_shift
from onnxcompress.passes.correct_bias.input_means import layer_window, recorded_means
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.runtime.inference import run as outputs
from onnxcompress.statistics.propagation import MomentPropagation, UnknownMoments
from onnxcompress.statistics.record import ChannelStatistics, read_record, write_record
from tests.helpers.folding import Arrays, feeds, graph, weight
from tests.helpers.results import figures_of

IMAGE = "(float[N,4,9,8] x) => (float[N,C,H,W] y)"
VECTOR = "(float[N,4] x) => (float[N,5] y)"


def coarse(values: np.ndarray, bits: int = 4) -> np.ndarray:
    """Rounded to one scale for the tensor."""
    scale = np.abs(values).max() / (2 ** (bits - 1) - 1)
    return np.asarray(np.round(values / scale) * scale).astype(values.dtype)


def linear(model: Model, name: str = "y") -> Linear:
    node = producer(model.graph.tensors()[name])
    assert node is not None
    found = as_linear(model, node, lambda t: None if t.shape is None else len(t.shape))
    assert isinstance(found, Linear)
    return found


# What taps see --------------------------------------------------------------------------------------------

LAYERS = {
    "conv": ("Conv", (5, 4, 3, 3)),
    "padded": ("Conv<pads = [1,0,2,1]>", (5, 4, 3, 3)),
    "strided": ("Conv<pads = [1,1,1,1], strides = [2,3]>", (5, 4, 3, 3)),
    "dilated": ("Conv<pads = [2,3,2,3], dilations = [2,3], strides = [2,1]>", (5, 4, 3, 3)),
    "same": ('Conv<auto_pad = "SAME_UPPER", strides = [2,2]>', (5, 4, 4, 4)),
    "same below": ('Conv<auto_pad = "SAME_LOWER", strides = [2,2]>', (5, 4, 4, 4)),
    "valid": ('Conv<auto_pad = "VALID", strides = [2,2]>', (5, 4, 4, 4)),
    "grouped": ("Conv<group = 2, pads = [1,1,1,1]>", (6, 2, 3, 3)),
    "depthwise": ("Conv<group = 4, pads = [2,2,2,2]>", (8, 1, 5, 5)),
    "transposed": ("ConvTranspose<strides = [2,2], pads = [1,0,0,1]>", (4, 5, 3, 3)),
    "transposed more": (
        "ConvTranspose<strides = [3,2], output_padding = [1,1], dilations = [2,1]>",
        (4, 5, 3, 2),
    ),
    "transposed grouped": ("ConvTranspose<group = 2, strides = [2,2]>", (4, 3, 2, 2)),
    "transposed to a shape": ("ConvTranspose<strides = [2,2], output_shape = [18,16]>", (4, 5, 3, 3)),
    "transposed same": ('ConvTranspose<strides = [2,2], auto_pad = "SAME_UPPER">', (4, 5, 3, 3)),
    "transposed same below": ('ConvTranspose<strides = [2,2], auto_pad = "SAME_LOWER">', (4, 5, 3, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_mean_of_a_layer_follows_from_what_its_taps_see(kind: str) -> None:
    op, shape = LAYERS[kind]
    arrays = {"w": weight(*shape)}
    before = graph(IMAGE, f"y = {op}(x, w)", arrays)
    after = graph(IMAGE, f"y = {op}(x, w)", {"w": coarse(arrays["w"])})
    model = Model.from_proto(before)
    _, window = layer_window(model, linear(model))
    for x in (feeds(before)["x"], np.broadcast_to(weight(1, 4, 1, 1, seed=3), (2, 4, 9, 8)).copy()):
        was, now = (outputs(p, {"x": x})["y"].mean((0, 2, 3), dtype=np.float64) for p in (before, after))
        found = bias_shift(linear(model), coarse(arrays["w"]), window.means(x))
        np.testing.assert_allclose(found, now - was, atol=1e-5 * np.abs(was).max())
    constant = x[0, :, 0, 0].astype(np.float64)[:, None] * window.coverage()
    np.testing.assert_allclose(bias_shift(linear(model), coarse(arrays["w"]), constant), found, atol=1e-6)


def test_a_gemm_with_alpha() -> None:
    for op, shape in (
        ("Gemm<alpha = 0.5, transB = 1>", (5, 4)),
        ("Gemm<alpha = 2.0>", (4, 5)),
        ("MatMul", (4, 5)),
    ):
        w = weight(*shape)
        protos = [graph(VECTOR, f"y = {op}(x, w)", {"w": v}) for v in (w, coarse(w))]
        model = Model.from_proto(protos[0])
        x = feeds(protos[0])["x"]
        was, now = (outputs(p, {"x": x})["y"].mean(0, dtype=np.float64) for p in protos)
        found = bias_shift(linear(model), coarse(w), layer_window(model, linear(model))[1].means(x))
        np.testing.assert_allclose(found, now - was, atol=1e-6)


# What the record tells ------------------------------------------------------------------------------------

MEAN = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
STD = np.array([1.0, 0.7, 0.5, 0.0], np.float32)
CHAINS = {
    "nothing": "t = Identity(z)",
    "relu": "t = Relu(z)",
    "relu6": "t = Clip(z, zero, two)",
    "clip": "t = Clip(z, low, two)",
    "clip below": "t = Clip(z, zero)",
    "leaky": "t = LeakyRelu<alpha = 0.3>(z)",
    "leaky by default": "t = LeakyRelu(z)",
    "prelu": "t = PRelu(z, four)",
    "hard sigmoid": "t = HardSigmoid(z)",
    "another hard sigmoid": "t = HardSigmoid<alpha = 0.6, beta = 0.3>(z)",
    "tanh": "t = Tanh(z)",
    "softplus": "t = Softplus(z)",
    "absolute": "t = Abs(z)",
    "multiplied": "t = Mul(z, four)",
    "divided": "t = Div(z, six)",
    "difference": "t = Sub(z, v)",
    "product": "t = Mul(z, v)",
    "subtracted": "a = Relu(z) t = Sub(v, a)",
    "relu and min": "a = Relu(z) t = Min(a, four)",
    "max": "t = Max(four, z)",
    "sigmoid": "t = Sigmoid(z)",
    "silu": "s = Sigmoid(z) t = Mul(z, s)",
    "hard swish": "t = HardSwish(z)",
    "hard swish in pieces": "a = Add(z, three) c = Clip(a, zero, six) d = Div(c, six) t = Mul(z, d)",
    "negative": "a = Neg(z) t = Relu(a)",
    "scaled": "a = Mul(z, four) b = Div(a, three) c = Sub(b, four) t = Relu(c)",
    "pooled": "a = Relu(z) p = GlobalAveragePool(a) t = Flatten(p)",
    "two": "a = Relu(z) b = Add(a, v) t = Relu(b)",
    "joined and cut": "a = Relu(z) c = Concat<axis = 1>(v, a) t = Gather<axis = 1>(c, order)",
    "padded": "t = Pad(z, pads)",
    "gated": "p = GlobalAveragePool(v) g = Sigmoid(p) t = Mul(z, g)",
}
CONSTANTS: Arrays = {
    "zero": np.float32(0),
    "low": np.float32(-0.5),
    "two": np.float32(2),
    "three": np.float32(3),
    "six": np.float32(6),
    "four": np.array([0.2, 0.5, -0.3, 1.0], np.float32).reshape(4, 1, 1),
    "order": np.array([4, 0, 5, 7]),
    "pads": np.array([0, 1, 0, 0, 0, 2, 0, 0]),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_moments_are_those_of_samples(chain: str) -> None:
    text = CHAINS[chain]
    words = set(text.replace(",", " ").replace("(", " ").replace(")", " ").split())
    used = {k: v for k, v in CONSTANTS.items() if k in words}
    shape = (
        "float[N,4]" if chain == "pooled" else "float[N,4,H,W]" if chain != "padded" else "float[N,7,H,W]"
    )
    signature = f"(float[N,4,64,64] z, float[N,4,64,64] v) => ({shape} t)"
    proto = graph(signature, text, used)
    model = Model.from_proto(proto)
    known = {"z": ChannelStatistics(MEAN, STD), "v": ChannelStatistics(-MEAN, STD / 2)}
    mean, variance = MomentPropagation(model, find_channel_groups(model), known).of(model.graph.outputs[0])
    rng = np.random.default_rng(0)
    drawn = {
        name: (s.mean[:, None, None] + s.std[:, None, None] * rng.normal(size=(16, 4, 64, 64))).astype(
            np.float32
        )
        for name, s in known.items()
    }
    values = outputs(proto, drawn)["t"].astype(np.float64)
    axes = tuple(a for a in range(values.ndim) if a != 1)
    limit = 0.08 if chain == "two" else 0.012  # a sum with what Relu gives is no Gaussian
    np.testing.assert_allclose(mean, values.mean(axes), atol=limit)
    if chain not in ("pooled", "gated"):
        np.testing.assert_allclose(np.sqrt(variance), values.std(axes), atol=limit)


def test_what_has_no_closed_form() -> None:
    for text, reason in (
        ("t = MaxPool<kernel_shape = [2,2]>(z)", "no closed form is known for MaxPool 't'"),
        ("a = Softmax(z) t = Relu(a)", "Softmax 'a'"),
        ("t = Max(z, v)", "compares two tensors"),
    ):
        model = Model.from_proto(
            graph("(float[N,4,8,8] z, float[N,4,8,8] v) => (float[N,4,H,W] t)", text, {})
        )
        known = {n: ChannelStatistics(MEAN, STD) for n in "zv"}
        with pytest.raises(UnknownMoments, match=reason):
            MomentPropagation(model, find_channel_groups(model), known).of(model.graph.outputs[0])


# The pass -------------------------------------------------------------------------------------------------


def correct(
    reference: onnx.ModelProto, twin: onnx.ModelProto, folder: Path, **options: object
) -> tuple[Model, PassResult[CorrectBiasFigures | None]]:
    """Correct a twin; a second run must change nothing."""
    onnx.save(reference, folder / "reference.onnx")
    model = Model.from_proto(twin)
    one = CorrectBias(reference=str(folder / "reference.onnx"), **options)  # type: ignore[arg-type]
    result = one.apply(model)
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert not one.apply(model).modified
    assert model.to_proto() == after
    return model, result


def rounded(proto: onnx.ModelProto, bits: int = 4, names: str = "") -> onnx.ModelProto:
    """The model with coarse weights."""
    twin = onnx.ModelProto.FromString(proto.SerializeToString())
    for tensor in twin.graph.initializer:
        if len(tensor.dims) > 1 and tensor.name.startswith(names):
            values = coarse(numpy_helper.to_array(tensor), bits)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return twin


@pytest.mark.parametrize(
    ("signature", "body", "arrays"),
    [
        (IMAGE, "y = Conv<pads = [1,1,1,1]>(x, w, b)", {"w": weight(5, 4, 3, 3), "b": weight(5)}),
        (IMAGE, "y = Conv<pads = [1,1,1,1]>(x, w)", {"w": weight(5, 4, 3, 3)}),
        (
            IMAGE,
            "p = Pad(x, pads) y = Conv(p, w)",
            {"w": weight(5, 4, 3, 3), "pads": np.array([0, 0, 1, 2, 0, 0, 3, 0])},
        ),
        (VECTOR, "y = Gemm<beta = 2.0>(x, w, b)", {"w": weight(4, 5), "b": np.array([0.3], np.float32)}),
        (VECTOR, "m = MatMul(x, w) y = Add(m, b)", {"w": weight(4, 5), "b": weight(5)}),
    ],
    ids=["conv", "no bias", "padded", "gemm", "matmul"],
)
def test_the_mean_output_becomes_the_references(
    signature: str, body: str, arrays: Arrays, tmp_path: Path
) -> None:
    reference = graph(signature, body, arrays)
    model = Model.from_proto(reference)
    write_record(model, {"x": ChannelStatistics(MEAN, STD)})
    reference = model.to_proto()
    twin = rounded(reference, names="w")
    corrected, result = correct(reference, twin, tmp_path)
    assert figures_of(result, CorrectBiasFigures).layers == 1
    assert figures_of(result, CorrectBiasFigures).left == 0
    shape = (1, 4, 9, 8) if signature is IMAGE else (1, 4)
    x = np.broadcast_to(MEAN.reshape(4, *[1] * (len(shape) - 2)), shape).copy()  # each channel at its mean
    axes = (0, 2, 3) if signature is IMAGE else (0,)
    means = [
        outputs(p, {"x": x})["y"].mean(axes, dtype=np.float64)
        for p in (reference, twin, corrected.to_proto())
    ]
    assert np.abs(means[1] - means[0]).max() > 1e-2
    np.testing.assert_allclose(means[2], means[0], atol=1e-5)


@pytest.fixture(scope="module")
def network(models: Path) -> onnx.ModelProto:
    model = load(models / "resnet20-fashion.onnx")
    FoldBatchNorm().apply(model)
    Equalize().apply(model)
    return model.to_proto()


@pytest.fixture(scope="module")
def images(models: Path) -> np.ndarray:
    pixels = np.load(models / "fashion-tiny.npz")["x"][:100].astype(np.float32)
    return np.asarray(((pixels / 255 - 0.286) / 0.353).transpose(0, 3, 1, 2), np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", ["record", "layerwise", "images"])
def test_a_real_network(
    inputs: str, network: onnx.ModelProto, images: np.ndarray, models: Path, tmp_path: Path
) -> None:
    """On images that no part of it saw, means of layers and outputs come nearer to the reference's."""
    sources: dict[str, dict[str, object]] = {
        "record": {},
        "layerwise": {"synthetic": 16},
        "images": {
            "images": str(models / "fashion-test2k.npz"),
            "preprocess": "fashion-mnist",
            "count": 32,
        },
    }
    twin = rounded(network, bits=5)
    corrected, result = correct(network, twin, tmp_path, inputs=inputs, **sources[inputs])
    assert figures_of(result, CorrectBiasFigures).layers >= 21  # the first one's input has mean 0
    assert not result.refusals
    record = read_record(Model.from_proto(network))
    assert {k: v.mean.tolist() for k, v in read_record(corrected).items()} == {
        k: v.mean.tolist() for k, v in record.items()
    }
    shown = [_showing(p, [*record]) for p in (network, twin, corrected.to_proto())]
    wanted, before, after = (outputs(p, {"input": images}) for p in shown)
    assert _error(after["logits"], wanted["logits"]) < 0.8 * _error(before["logits"], wanted["logits"])
    gaps = [
        np.mean(
            [
                np.abs((found[n] - wanted[n]).mean((0, 2, 3)) / record[n].std.clip(1e-3)).mean()
                for n in record
            ]
        )
        for found in (before, after)
    ]
    assert gaps[1] < (0.85 if inputs == "layerwise" else 0.5) * gaps[0]


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(((found - wanted) ** 2).mean())


def _showing(proto: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    shown = onnx.ModelProto.FromString(proto.SerializeToString())
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names)
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_file_that_onnxruntime_quantized(
    per_channel: bool, network: onnx.ModelProto, images: np.ndarray, tmp_path: Path
) -> None:
    """Weights int8 (narrowed to 4 bits here), biases int32 behind DequantizeLinear."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        left = iter([{"input": images[:16]}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    onnx.save(network, tmp_path / "net.onnx")
    quantize_static(
        tmp_path / "net.onnx",
        tmp_path / "q.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
    )
    twin = onnx.load(str(tmp_path / "q.onnx"))
    for tensor in twin.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1:
            values = numpy_helper.to_array(tensor)
            narrow = np.clip(np.round(values / 16.0) * 16, -112, 112).astype(np.int8)
            tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
    corrected, result = correct(network, twin, tmp_path)
    assert figures_of(result, CorrectBiasFigures).layers >= 21
    assert not result.refusals
    after = corrected.to_proto()
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in twin.graph.node]
    assert [t.data_type for t in after.graph.initializer] == [t.data_type for t in twin.graph.initializer]
    found = {t.name: numpy_helper.to_array(t) for t in after.graph.initializer}
    reference = Model.from_proto(network)
    means = recorded_means(
        reference, [linear(reference, n.outputs[0].name) for n in reference.graph.nodes if n.op == "Conv"]
    )
    for node in after.graph.node:
        if node.op_type != "Conv":
            continue
        makers = [next(n for n in after.graph.node if n.output[0] == name) for name in node.input[1:]]
        weight, bias = ([found[name].astype(np.float64) for name in m.input[:2]] for m in makers)
        original = next(n for n in reference.graph.nodes if n.name == node.name)
        layer = linear(reference, original.outputs[0].name)
        mean = means[original.outputs[0].name]
        assert isinstance(mean, np.ndarray)
        shift = bias_shift(layer, weight[0] * weight[1].reshape(-1, 1, 1, 1), mean)
        wanted = original.inputs[2].values - shift
        assert (np.abs(bias[0] * bias[1] - wanted) <= bias[1] / 2 + 1e-9).all()


# What is left alone ---------------------------------------------------------------------------------------


def left(reference: onnx.ModelProto, twin: onnx.ModelProto, folder: Path, reason: str) -> None:
    model, result = correct(reference, twin, folder)
    assert not result.modified
    assert model.to_proto() == twin
    (refusal,) = result.refusals
    assert reason in str(refusal)


def test_what_is_left_alone(tmp_path: Path) -> None:
    arrays = {"w": weight(5, 4, 3, 3), "u": weight(5, 5, 3, 3)}
    body = "c = Conv(x, w) r = Relu(c) y = Conv(r, u)"
    reference = graph(IMAGE, body, arrays)
    same = graph(IMAGE, body, arrays)
    _, result = correct(reference, same, tmp_path)
    assert not result.modified
    assert not result.refusals
    left(
        reference, graph(IMAGE, body.replace("c", "q"), arrays), tmp_path, "no Conv of the model makes 'c'"
    )
    wide = graph(IMAGE, body, {**arrays, "w": weight(5, 4, 5, 5)})
    left(reference, wide, tmp_path, "shape [5, 4, 5, 5], the reference's [5, 4, 3, 3]")
    left(
        reference,
        graph(IMAGE, body, {**arrays, "w": -3 * arrays["w"]}),
        tmp_path,
        "differ by more than their size",
    )
    pooled = "c = Conv(x, w) r = MaxPool<kernel_shape = [2,2]>(c) y = Conv(r, u)"
    reference = graph(IMAGE, pooled, arrays)
    left(
        reference,
        rounded(reference, names="u"),
        tmp_path,
        "no closed form is known for MaxPool 'r' (give it inputs",
    )
    signature = "(float[N,4,9,8] x, float[5] b) => (float[N,C,H,W] y)"
    reference = graph(signature, "y = Conv(x, w, b)", {"w": arrays["w"]})
    left(reference, rounded(reference), tmp_path, "bias is not a constant")
    reference = graph(VECTOR, "y = MatMul(x, w)", {"w": weight(4, 5)})
    left(reference, rounded(reference), tmp_path, "no Add of a constant follows the MatMul")


def test_an_equalized_twin_is_told_apart(network: onnx.ModelProto, models: Path, tmp_path: Path) -> None:
    model = load(models / "resnet20-fashion.onnx")
    FoldBatchNorm().apply(model)
    _, result = correct(model.to_proto(), network, tmp_path)
    assert result.refusals
    assert any("differ by more than their size" in r.rule for r in result.refusals)


def test_options(network: onnx.ModelProto) -> None:
    model = Model.from_proto(network)
    with pytest.raises(OptionError, match="--reference is needed"):
        CorrectBias().apply(model)
    with pytest.raises(OptionError, match="--inputs record uses no images"):
        CorrectBias(reference="net.onnx", images="x.npz").apply(model)


def test_recorded_means_of_an_open_image_size() -> None:
    proto = graph(
        "(float[N,4,H,W] x) => (float[N,C,A,B] y)",
        "y = Conv<pads = [1,1,1,1]>(x, w)",
        {"w": weight(5, 4, 3, 3)},
    )
    model = Model.from_proto(proto)
    (found,) = recorded_means(model, [linear(model)]).values()
    assert "the size of the image is open" in str(found)
