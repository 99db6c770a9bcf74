"""Layer-wise inputs: what is drawn, what runs in between, and that better noise is better on a network."""

from __future__ import annotations

import math

import numpy as np
import onnx.parser
import pytest

from onnxcompress.graph.shape_inference import tensor_shapes
from tests.helpers.paths import MODELS

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from onnxcompress.data.image_set import load_images  # noqa: E402
from onnxcompress.data.preprocess import Preprocess  # noqa: E402
from onnxcompress.errors import CompressError, InputError, ModelError, OptionError  # noqa: E402
from onnxcompress.graph.conv_layers import conv_layers  # noqa: E402
from onnxcompress.graph.linear_layer import Linear  # noqa: E402
from onnxcompress.model import Model, load  # noqa: E402
from onnxcompress.optimize.synthesis.colored_noise import (  # noqa: E402
    COLOURED,
    WHITE,
    Noise,
    draw,
    draw_input,
    generator,
)
from onnxcompress.optimize.synthesis.layer_sampler import LayerSampler, map_layers, sample_layers  # noqa: E402
from onnxcompress.passes.fold_bn import FoldBatchNorm  # noqa: E402
from onnxcompress.statistics.record import ChannelStatistics, known_statistics  # noqa: E402
from tests.optimize.test_executor import model as filled  # noqa: E402

NOISES = [WHITE, COLOURED, Noise(depth=1), Noise()]
IDS = ["white", "coloured", "one level back", "from the input"]

RESIDUAL = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,12,12] x) => (float[N,5] y) <
        float[4,3,3,3] w1, float[4] g1, float[4] b1, float[4] m1, float[4] var,
        float[4,4,3,3] w2, float[4] g2, float[4] b2, float[4] m2,
        float[4,4,1,1] w3, float[8,8,3,3] w4, float[5,8] w5, int64[1] one = {1}, int64[1] zero = {0},
        int64[1] minus = {-1} >
    {
        c1 = Conv<pads=[1,1,1,1]>(x, w1)
        n1 = BatchNormalization(c1, g1, b1, m1, var)
        r1 = Relu(n1)
        c2 = Conv<pads=[1,1,1,1]>(r1, w2)
        n2 = BatchNormalization(c2, g2, b2, m2, var)
        s = Add(n2, r1)
        r2 = Relu(s)
        c3 = Conv(r2, w3)
        n3 = BatchNormalization(c3, g1, b2, m1, var)
        p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(n3)
        q = AveragePool<kernel_shape=[2,2], strides=[2,2]>(r2)
        k = Concat<axis=1>(p, q)
        c4 = Conv<pads=[1,1,1,1]>(k, w4)
        g = GlobalAveragePool(c4)
        size = Shape(x)
        n = Slice(size, zero, one)
        flat = Concat<axis=0>(n, minus)
        f = Reshape(g, flat)
        y = Gemm<transB=1>(f, w5)
    }
"""


@pytest.fixture(scope="module")
def residual() -> Model:
    return Model.from_proto(filled(RESIDUAL))


@pytest.fixture(scope="module")
def resnet() -> Model:
    return load(MODELS / "resnet20-fashion.onnx")


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    axes = [a for a in range(x.ndim) if a != 1]
    return x.double().mean(axes), x.double().std(axes, correction=0)


# --- the graph decides what is drawn ---


@pytest.mark.parametrize(
    ("tensor", "depth", "expected"),
    [
        ("n1", 0, ("n1",)),
        ("n1", 1, ("x",)),
        ("x", None, ("x",)),
        ("c1", 0, ("x",)),
        ("r2", 0, ("n1", "n2")),  # branch and shortcut
        ("k", 0, ("n1", "n2", "n3")),  # Concat, pools
        ("k", 1, ("x",)),  # n1 is needed one level back for r2, so it is not drawn for n3
        ("y", 0, ("n1", "n2", "n3")),  # the batch size is read off x, whose values are not needed
        ("y", None, ("x",)),
    ],
)
def test_sources(residual: Model, tensor: str, depth: int | None, expected: tuple[str, ...]) -> None:
    sampler = LayerSampler(residual, noise=Noise(depth=depth))
    assert sampler.sources(tensor) == expected
    shape = [6 if d == "N" else d for d in tensor_shapes(residual)[tensor]]
    assert list(sampler.sample(tensor, 6, 0).shape) == shape


def test_sources_of_several_tensors(residual: Model) -> None:
    assert LayerSampler(residual, noise=WHITE).sources(["n3", "r1"]) == ("n1", "n3")


def test_each_node_runs_once_however_many_branches_a_sum_has(resnet: Model) -> None:
    last = list(conv_layers(resnet).values())[-1].input_name
    stage = LayerSampler(resnet, noise=WHITE).sources(resnet.graph.outputs[0].name)
    assert len(stage) == 4  # three branches of the last stage and its projection
    plan = LayerSampler(resnet)._cut([last])
    run = [node.makes[0] for piece in plan.pieces for node in piece.nodes]
    assert len(run) == len(set(run))
    assert plan.drawn == ("input",)
    held: set[str] = set()
    most = 0
    for piece in plan.pieces:
        held.update(piece.feeds, piece.fresh, piece.outputs)
        most = max(most, len(held))
        held.difference_update(piece.done)
    assert most <= 4  # shortcut, a layer's input, its output, a projection
    assert not held


# --- values ---


@pytest.mark.parametrize("noise", NOISES, ids=IDS)
def test_recorded_tensors_have_their_statistics(residual: Model, noise: Noise) -> None:
    known = known_statistics(residual)
    for name, x in LayerSampler(residual, noise=noise).sample_all(list(known), 16, 3).items():
        mean, std = moments(x)
        np.testing.assert_allclose(mean, known[name].mean, atol=2e-5)
        np.testing.assert_allclose(std, known[name].std, atol=2e-5)


def test_a_relu_between_gives_rectified_moments(residual: Model) -> None:
    known = known_statistics(residual)["n1"]
    x = LayerSampler(residual, noise=WHITE).sample("r1", 400, 0)
    mean, std = moments(x)
    for channel, (m, s) in enumerate(zip(known.mean.tolist(), known.std.tolist(), strict=True)):
        below = 0.5 * math.erfc(m / s / math.sqrt(2))
        density = math.exp(-0.5 * (m / s) ** 2) / math.sqrt(2 * math.pi)
        expected = m * (1 - below) + s * density
        second = (m * m + s * s) * (1 - below) + m * s * density
        assert mean[channel].item() == pytest.approx(expected, abs=0.02 * s)
        assert std[channel].item() == pytest.approx(math.sqrt(second - expected**2), abs=0.02 * s)


@pytest.mark.parametrize("noise", NOISES, ids=IDS)
def test_joint_samples_are_consistent(residual: Model, noise: Noise) -> None:
    sampler = LayerSampler(residual, noise=noise)
    found = sampler.sample_all(["k", "r2", "n2", "r1", "s", "k"], 8, 1)
    assert list(found) == ["k", "r2", "n2", "r1", "s"]
    assert torch.equal(found["s"], found["n2"] + found["r1"])
    assert torch.equal(found["r2"], found["s"].relu())
    assert torch.equal(found["k"][:, 4:], torch.nn.functional.avg_pool2d(found["r2"], 2))
    if noise.depth is None:
        wanted = sampler.executor.run({"r1": found["r1"]}, ["n2"])["n2"]
        (mean, std), known = moments(wanted), sampler.statistics["n2"]
        scale = torch.tensor(known.std) / std
        z = (wanted - mean.reshape(-1, 1, 1)) * scale.reshape(-1, 1, 1)
        expected = z + torch.tensor(known.mean).reshape(-1, 1, 1)
        torch.testing.assert_close(found["n2"].double(), expected, rtol=1e-4, atol=1e-4)


def test_given_images_take_the_place_of_noise(residual: Model) -> None:
    images = torch.randn(10, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 3 + 1
    sampler = LayerSampler(residual, images=images)
    found = sampler.sample_all(["x", "n1", "c1"], 10, 0)
    assert sorted(found["x"][:, 0, 0, 0].tolist()) == sorted(images[:, 0, 0, 0].tolist())
    assert torch.equal(found["c1"], sampler.executor.run({"x": found["x"]}, ["c1"])["c1"])
    torch.testing.assert_close(moments(found["n1"])[0].float(), torch.tensor(sampler.statistics["n1"].mean))
    with pytest.raises(InputError, match="11 samples from 10 images"):
        sampler.sample("n1", 11, 0)


def test_a_channel_that_cannot_vary_is_its_mean() -> None:
    proto = filled(RESIDUAL)
    (weight,) = [t for t in proto.graph.initializer if t.name == "w2"]
    values = onnx.numpy_helper.to_array(weight).copy()
    values[1] = 0
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "w2"))
    sampler = LayerSampler(Model.from_proto(proto))
    mean, std = moments(sampler.sample("n2", 8, 0))
    assert std[1].item() == 0
    assert mean[1].item() == pytest.approx(float(sampler.statistics["n2"].mean[1]))


def test_folding_changes_no_sample_drawn_near(resnet: Model) -> None:
    names = [layer.input_name for layer in conv_layers(resnet).values()][3::5]
    folded = resnet.copy()
    FoldBatchNorm().apply(folded)
    assert not [node for node in folded.graph.nodes if node.op == "BatchNormalization"]
    before = LayerSampler(resnet, noise=COLOURED).sample_all(names, 4, 0)
    after = LayerSampler(folded, noise=COLOURED).sample_all(names, 4, 0)
    assert len(names) == 4
    assert all(torch.equal(before[name], after[name]) for name in names)


# --- noise ---


def spectrum(noise: Noise) -> tuple[np.ndarray, float]:
    """Power by distance from frequency 0, and the share of the variance that is between samples."""
    statistics = ChannelStatistics(np.full(4, 5.0, np.float32), np.full(4, 2.0, np.float32))
    x = draw((200, 4, 32, 32), statistics, noise, generator(0, "t", 200)) - 5
    power = torch.fft.fft2(x).abs().square().mean((0, 1))
    f = torch.fft.fftfreq(32) * 32
    radius = (f[:, None] ** 2 + f**2).sqrt().round().int()
    rings = np.array([power[radius == r].mean().item() for r in range(1, 15)])
    return rings, float(x.mean((2, 3)).square().mean()) / 4


def test_spectrum_and_offset_are_what_was_asked_for() -> None:
    white, between = spectrum(WHITE)
    assert white.std() < 0.05 * white.mean()
    assert between == pytest.approx(1 / 32**2, rel=0.1)
    rings, between = spectrum(Noise(exponent=2, offset=0.3))
    slope = np.polyfit(np.log(np.arange(1, 15)), np.log(rings), 1)[0]
    assert slope == pytest.approx(-2, abs=0.1)
    assert between == pytest.approx(0.3, rel=0.1)


def test_channels_of_the_input_are_alike_as_asked_for(residual: Model) -> None:
    x = LayerSampler(residual, noise=Noise(shared=0.8)).sample("x", 500, 0)
    correlation = torch.corrcoef(x.transpose(0, 1).flatten(1))
    assert correlation[0, 1].item() == pytest.approx(0.8, abs=0.05)
    assert moments(x)[1].numpy() == pytest.approx(np.ones(3), abs=1e-5)


def test_an_input_with_channels_last_is_drawn_as_one() -> None:
    x = draw_input(
        (300, 16, 12, 3), None, Noise(exponent=2, offset=0.3, shared=0.8), generator(0, "x", 300)
    )
    rows = x.reshape(-1, 3).T
    assert torch.corrcoef(rows)[0, 2].item() == pytest.approx(0.8, abs=0.05)
    assert rows.std(1, correction=0).numpy() == pytest.approx(np.ones(3), abs=1e-5)
    assert x.mean((1, 2)).square().mean().item() == pytest.approx(0.3, abs=0.05)


# --- the same bytes ---


@pytest.mark.parametrize("noise", NOISES, ids=IDS)
def test_values_depend_on_seed_and_tensor_alone(residual: Model, noise: Noise) -> None:
    names = ["r1", "r2", "k", "f"]
    alone = dict(sample_layers(LayerSampler(residual, noise=noise), names, 5, 7))
    sampler = LayerSampler(residual, noise=noise)
    for workers, order in ((1, names[::-1]), (3, names)):
        found = dict(sample_layers(sampler, order, 5, 7, workers))
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[n], alone[n]) for n in names)
    for name in names:
        torch.testing.assert_close(sampler.sample(name, 5, 7), alone[name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(sampler.sample(name, 5, 8), alone[name], atol=1e-2)


def test_work_on_layers_is_shared_among_workers(residual: Model) -> None:
    threads = torch.get_num_threads()
    sampler = LayerSampler(residual)
    expected = sampler.sample_all(["r1", "k"], 5, 0)

    def work(name: str, x: Tensor) -> tuple[str, float]:
        if name == "c4":
            raise InputError("stop")
        return name, float(x.square().mean())

    found = dict(map_layers(sampler, ["k", "r1"], 5, 0, work, 2))
    assert list(found) == ["r1", "k"]
    for name, (given, value) in found.items():
        assert given == name
        assert value == pytest.approx(float(expected[name].square().mean()), rel=1e-5)
    with pytest.raises(InputError, match="stop"):
        list(map_layers(sampler, ["r1", "c4"], 5, 0, work, 2))
    assert torch.get_num_threads() == threads


# --- refusals ---

NO_INPUT = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,2] x) => (float[N,2] y) '


@pytest.mark.parametrize(
    ("text", "tensor", "message"),
    [
        (NO_INPUT + "<float[2] w> { c = Neg(w)  y = Add(x, c) }", "c", "'c' cannot be drawn: no input"),
        (NO_INPUT + "{ y = Neg(x) }", "z", "'z' cannot be drawn: there is none"),
        (RESIDUAL.replace("12,12", "H,12"), "c1", "'x' cannot be drawn, its shape is Nx3xHx12"),
        (NO_INPUT.replace("float[N,2] x", "int64[N,2] x") + "{ y = Cast<to=1>(x) }", "y", "it is int64"),
    ],
    ids=["constant", "no tensor", "open size", "integers"],
)  # fmt: skip
def test_what_cannot_be_drawn_is_named(text: str, tensor: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        LayerSampler(Model.from_proto(filled(text))).sample(tensor, 6, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("noise", [WHITE, Noise()], ids=["drawn", "standardized"])
def test_statistics_of_another_network_are_refused(residual: Model, noise: Noise) -> None:
    wrong = {"n1": ChannelStatistics(np.zeros(5, np.float32), np.ones(5, np.float32))}
    with pytest.raises(ModelError, match=r"'n1' has shape .*, its statistics are of 5 channels"):
        LayerSampler(residual, wrong, noise=noise).sample("r1", 4, 0)


def test_images_and_options_are_checked(residual: Model) -> None:
    with pytest.raises(InputError, match=r"input 'x' takes .*, the images are \[4, 3, 8, 8\]"):
        LayerSampler(residual, images=torch.zeros(4, 3, 8, 8))
    for bad in ({"offset": 1.5}, {"shared": -1}, {"exponent": -1}, {"depth": -1}):
        with pytest.raises(OptionError, match=f"noise: {next(iter(bad))}"):
            Noise(**bad)
    assert issubclass(OptionError, CompressError)


# --- a real network ---


def test_better_noise_predicts_real_outputs_better(resnet: Model) -> None:
    """Second moments of what 3x3 convolutions compute: white noise has too little energy for them."""
    layers = [v for v in conv_layers(resnet).values() if v.weight.shape[2:] == (3, 3)][2::3]
    preprocess = Preprocess.parse("fashion-mnist")
    images = load_images(MODELS / "fashion-tiny.npz", preprocess=preprocess, count=100)
    sampler = LayerSampler(resnet, noise=WHITE)
    names = [layer.input_name for layer in layers]
    real = sampler.executor.run({"input": torch.from_numpy(images.array())}, names)
    errors = []
    for noise in (WHITE, COLOURED, Noise()):
        sampler.noise = noise
        drawn = sampler.sample_all(names, 64, 0)
        ratios = [
            energy(sampler, v, drawn[v.input_name]) / energy(sampler, v, real[v.input_name]) for v in layers
        ]
        errors.append(torch.stack([ratio.log().abs().mean() for ratio in ratios]))
    white, coloured, deep = errors
    assert (coloured < white).all()
    assert coloured.mean() < 0.85 * white.mean()
    assert deep.mean() < 0.5 * coloured.mean()


def energy(sampler: LayerSampler, layer: Linear, x: Tensor) -> Tensor:
    """Variance of each output channel of the convolution."""
    y = sampler.executor.run({layer.input_name: x}, [layer.output_name])[layer.output_name]
    return y.var((0, 2, 3))
