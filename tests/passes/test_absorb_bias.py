"""absorb-bias: what moves, where it goes, what must not move, and that the record follows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxcompress.errors import OptionError
from onnxcompress.evaluation.equivalence import difference_of
from onnxcompress.model import Model, load
from onnxcompress.passes.absorb_bias import AbsorbBias
from onnxcompress.passes.absorb_bias.absorb_bias import AbsorbBiasFigures
from onnxcompress.passes.base import PassResult
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.runtime.inference import run as outputs
from onnxcompress.statistics.record import ChannelStatistics, read_record, write_record
from tests.helpers.folding import BRANCH, Arrays, graph, ops, weight

IMAGE = "(float[N,4,7,6] x) => (float[N,C,H,W] y)"
VECTOR = "(float[N,4,7,6] x) => (float[N,C] y)"
CONV = {"w": weight(3, 4, 1, 1), "b": np.array([30.0, 0.5, -40.0], np.float32)}
READER = {"u": weight(5, 3, 1, 1, seed=1), "d": weight(5, seed=2)}
RECORD = ChannelStatistics(np.array([30, 0.5, -40], np.float32), np.array([2, 4, 1], np.float32))
"""Of z: only channel 0 is high, by 24; channel 2 is low by 37."""
X = {"x": np.random.default_rng(0).uniform(-1, 1, (2, 4, 7, 6)).astype(np.float32)}
"""|W x| is below 6, so channel 0 of z is always above 24, channel 2 always below 0."""


def absorb(
    body: str, arrays: Arrays, signature: str = IMAGE, record: ChannelStatistics = RECORD, **options: object
) -> tuple[Model, PassResult[AbsorbBiasFigures], float]:
    """Absorb, twice; returns the model, the result and the largest relative difference of the outputs."""
    proto = graph(signature, body, arrays)
    model = Model.from_proto(proto)
    write_record(model, {"z": record})
    one = AbsorbBias(**options)  # type: ignore[arg-type]
    result = one.apply(model)
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert not one.apply(model).modified
    assert model.to_proto() == after
    return model, result, difference_of(outputs(proto, X), outputs(after, X)).max_rel


def moved(model: Model) -> list[float]:
    """What the record says that each channel of z gave away."""
    return [float(v) for v in np.round(RECORD.mean - read_record(model)["z"].mean, 4)]


def stays(
    body: str, arrays: Arrays, reason: str, signature: str = IMAGE, *, approximate: bool = False
) -> None:
    model, result, _ = absorb(body, arrays, signature, approximate=approximate)
    assert not result.modified
    assert moved(model) == [0, 0, 0]
    (refusal,) = result.refusals
    assert reason in str(refusal)


def values(model: Model) -> Arrays:
    return {t.name: numpy_helper.to_array(t) for t in model.to_proto().graph.initializer}


def test_by_hand() -> None:
    arrays = {
        "w": np.ones((1, 1, 1, 1), np.float32),
        "b": np.array([10], np.float32),
        "u": np.array([2, -3], np.float32).reshape(2, 1, 1, 1),
        "d": np.array([1, 1], np.float32),
    }
    body = "z = Conv(x, w, b) r = Relu(z) y = Conv(r, u, d)"
    model = Model.from_proto(graph("(float[1,1,2,2] x) => (float[N,C,H,W] y)", body, arrays))
    known = ChannelStatistics(np.array([10], np.float32), np.array([2], np.float32))
    write_record(model, {"z": known, "r": known})
    result = AbsorbBias().apply(model)
    found = values(model)
    assert found["b"].tolist() == [6]  # 10 - (10 - 3 * 2)
    assert found["d"].tolist() == [9, -11]  # 1 + 2 * 4, 1 - 3 * 4
    assert {n: s.mean.tolist() for n, s in read_record(model).items()} == {"z": [6], "r": [6]}
    assert result.measured == AbsorbBiasFigures(layers=1, channels=1, largest=4.0, approximated=0)
    assert [(c.node, c.what) for c in result.changes] == [("z", "high biases given to 1 layer")]


@pytest.mark.parametrize(
    ("between", "std", "channels", "largest"),
    [
        ("Identity(z)", [2, 4, 1], 2, 37),  # 30 - 3 * 2 = 24, and -40 + 3 * 1
        ("Relu(z)", [2, 4, 1], 1, 24),
        ("Relu(z)", [9.9, 0.1, 1], 2, 0.3),  # 1 % of a mean is worth moving
        ("Relu(z)", [9.995, 4, 1], 0, 0),  # half a thousandth is not
    ],
)
def test_figures_count_channels_that_moved_and_by_how_much_at_most(
    between: str, std: list[float], channels: int, largest: float
) -> None:
    arrays = {"w": weight(3, 4, 1, 1), "b": np.array([30, 0.5, -40], np.float32)}
    arrays |= {"u": weight(2, 3, 1, 1, seed=1), "d": weight(2, seed=2)}
    model = Model.from_proto(graph(IMAGE, f"z = Conv(x, w, b) r = {between} y = Conv(r, u, d)", arrays))
    write_record(model, {"z": ChannelStatistics(RECORD.mean, np.array(std, np.float32))})
    found = AbsorbBias().apply(model).measured
    assert (found.layers, found.channels) == (int(channels > 0), channels)
    assert found.largest == pytest.approx(largest, rel=1e-4)


BETWEEN = {
    "relu": "r = Relu(z)",
    "leaky": "r = LeakyRelu(z)",
    "prelu": "r = PRelu(z, one)",
    "max": "r = Max(zero, z)",
    "clip below": "r = Clip(z, zero)",
    "clip": "r = Clip(z, zero, high)",
    "pools": "m = MaxPool<kernel_shape = [3,3], pads = [1,1,1,1]>(z) n = Relu(m) "
    "r = AveragePool<kernel_shape = [3,3], pads = [1,1,1,1]>(n)",
    "reflected": 'm = Relu(z) r = Pad<mode = "reflect">(m, pads)',
    "shuffled": "m = Gather<axis = 1>(z, order) n = Relu(m) r = Gather<axis = 1>(n, order)",
    "cut": "m = Relu(z) n, o = Split<axis = 1>(m, parts) r = Concat<axis = 1>(n, o)",
}
CONSTANTS: Arrays = {
    "one": np.array([0.25], np.float32),
    "zero": np.float32(0),
    "high": np.float32(36.5),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "order": np.array([2, 0, 1]),
    "parts": np.array([1, 2]),
    "some": np.array([0]),
    "k": weight(5, 1, 1, 1),
}


def constants(body: str) -> Arrays:
    words = set(body.replace(",", " ").replace("(", " ").replace(")", " ").split())
    return {k: v for k, v in CONSTANTS.items() if k in words}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_a_constant_passes(between: str) -> None:
    body = f"z = Conv(x, w, b) {BETWEEN[between]} y = Conv(r, u, d)"
    model, result, difference = absorb(body, CONV | READER | constants(body))
    assert not result.refusals
    assert moved(model) == [24, 0, 0]
    assert difference < 1e-6


def test_without_an_activation_negative_channels_move_too() -> None:
    model, _, difference = absorb("z = Conv(x, w, b) r = Identity(z) y = Conv(r, u, d)", CONV | READER)
    assert moved(model) == [24, 0, -37]
    assert difference < 1e-6


@pytest.mark.parametrize(
    ("body", "arrays", "signature"),
    [
        ("z = Conv(x, w, b) r = Relu(z) y = Conv(r, u)", {"u": weight(5, 3, 3, 3)}, IMAGE),
        (
            "z = Conv(x, w, b) r = Relu(z) y = Conv<group = 3>(r, u, d)",
            {"u": weight(6, 1, 3, 3), "d": weight(6)},
            IMAGE,
        ),
        ("z = Conv(x, w, b) r = Relu(z) y = ConvTranspose(r, u)", {"u": weight(3, 5, 1, 1)}, IMAGE),
        (
            "z = Conv(x, w, b) r = Relu(z) p = GlobalAveragePool(r) f = Flatten(p) "
            "y = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(f, u, d)",
            {"u": weight(5, 3), "d": weight(5)},
            VECTOR,
        ),
        ("z = Conv(x, w, b) r = Relu(z) f = Flatten(r) y = MatMul(f, u)", {"u": weight(126, 5)}, VECTOR),
        (
            "z = Conv(x, w, b) r = Relu(z) p = GlobalMaxPool(r) f = Flatten(p) "
            "m = MatMul(f, u) y = Add(m, d)",
            {"u": weight(3, 5), "d": weight(5)},
            VECTOR,
        ),
        (
            "z = Conv(x, w, b) r = Relu(z) c = Concat<axis = 1>(x, r) "
            "s = Conv(c, u) t = Conv(r, v) y = Add(s, t)",
            {"u": weight(5, 7, 1, 1), "v": weight(5, 3, 1, 1)},
            IMAGE,
        ),
        ("c = Conv(x, w) z = Add(c, a) r = Relu(z) y = Conv(r, u)", {"u": weight(5, 3, 3, 3)}, IMAGE),
    ],
    ids=["conv", "grouped", "transposed", "gemm", "matmul", "matmul with add", "two readers", "add"],
)
def test_every_kind_of_layer(body: str, arrays: Arrays, signature: str) -> None:
    own = {"w": CONV["w"]} | ({"b": CONV["b"]} if "w, b" in body else {"a": CONV["b"].reshape(3, 1, 1)})
    model, result, difference = absorb(body, own | arrays, signature)
    assert not result.refusals
    assert moved(model) == [24, 0, 0]
    assert difference < 1e-6
    assert ops(model.to_proto()).count("Add") == body.count("Add") + (
        "MatMul" in body and "Add" not in body
    )


def test_channels_that_are_clipped_from_above_stay() -> None:
    for clip, arrays in (
        ("r = Clip(z, zero, high)", {"zero": np.float32(0), "high": np.float32(35)}),
        ("r = Min(z, high)", {"high": np.array([35, 6, -1], np.float32).reshape(3, 1, 1)}),
        ("p = Relu(z) r = Min(p, high)", {"high": np.array([35, 6, 6], np.float32).reshape(3, 1, 1)}),
    ):
        model, result, _ = absorb(f"z = Conv(x, w, b) {clip} y = Conv(r, u, d)", CONV | READER | arrays)
        assert not result.modified
        assert not result.refusals
        assert moved(model) == [0, 0, 0]


def test_a_dead_channel_gives_all_it_has() -> None:
    arrays = {"w": CONV["w"].copy(), "b": CONV["b"]}
    arrays["w"][0] = 0
    record = ChannelStatistics(RECORD.mean, np.array([0, 4, 1], np.float32))
    body = "z = Conv(x, w, b) r = Relu(z) y = Conv(r, u, d)"
    model, _, difference = absorb(body, arrays | READER, record=record)
    assert moved(model) == [30, 0, 0]
    assert difference < 1e-6


def test_deviations() -> None:
    body = "z = Conv(x, w, b) r = Relu(z) y = Conv(r, u, d)"
    assert moved(absorb(body, CONV | READER, deviations=5.0)[0]) == [20, 0, 0]
    with pytest.raises(OptionError, match="--deviations -1"):
        AbsorbBias(deviations=-1).apply(Model.from_proto(graph(IMAGE, body, CONV | READER)))


PADDED = {"u": weight(5, 3, 3, 3, seed=1), "d": weight(5, seed=2)}


@pytest.mark.parametrize(
    "behind",
    [
        "r = Relu(z) y = Conv<pads = [1,1,1,1]>(r, u, d)",
        'r = Relu(z) y = Conv<auto_pad = "SAME_UPPER">(r, u, d)',
        "q = Relu(z) r = Pad(q, pads) y = Conv(r, u, d)",
    ],
)
def test_zero_padding(behind: str) -> None:
    """Refused; approximated, it is right wherever the kernel does not hang over, and only there."""
    body = f"z = Conv(x, w, b) {behind}"
    arrays = CONV | PADDED | constants(body)
    stays(body, arrays, "--approximate is wrong at the border only")
    model, result, _ = absorb(body, arrays, approximate=True)
    assert moved(model) == [24, 0, 0]
    assert result.measured.approximated == 1
    was, now = (outputs(p, X)["y"] for p in (graph(IMAGE, body, arrays), model.to_proto()))
    gap = np.abs(was - now) / np.abs(was).max()
    assert gap[:, :, 1:-1, 1:-1].max() < 1e-6
    assert gap[:, :, 0].max() > 0.01


FOLLOWED = "has outputs whose channels cannot be followed"
TWO = "(float[N,4,7,6] x) => (float[N,C,H,W] y, float[N,C,H,W] o)"


@pytest.mark.parametrize(
    ("body", "reason", "signature"),
    [
        ("z = Conv(x, w, b) o = Relu(z) y = Conv(o, u, d)", "'o' is an output of the model", TWO),
        ("z = Conv(x, w, b) r = Sigmoid(z) y = Conv(r, u, d)", "(Sigmoid) does not move", IMAGE),
        ("z = Conv(x, w, b) r = Clip(z, one) y = Conv(r, u, d)", "clips from below at 0.25", IMAGE),
        ("z = Conv(x, w, b) r = Relu(z) s = Add(r, r) y = Conv(s, u, d)", "(Add) does not move", IMAGE),
        ("z = Conv(x, w, b) r = Relu(z) s = Mul(r, high) y = Conv(s, u, d)", "(Mul) does not move", IMAGE),
        ("p = Conv(x, w, b) q = Relu(p) z = Add(q, p) y = Conv(z, u, d)", "adds two tensors", IMAGE),
        ("z = Conv(x, w, b) r = Relu(z) s = Gather<axis=0>(r, some) y = Conv(s, u, d)", FOLLOWED, IMAGE),
        ("z = Conv(x, w, b) r = Relu(z) s = Concat<axis=0>(r, r) y = Conv(s, u, d)", FOLLOWED, IMAGE),
        ("z = Conv(x, w, b) s = Concat<axis=2>(z, z) r = Relu(s) y = Conv(r, u, d)", FOLLOWED, IMAGE),
        ("z = Conv(x, w, b) s = Concat<axis=-1>(z, z) r = Relu(s) y = Conv(r, u, d)", FOLLOWED, IMAGE),
        ("z = Conv(x, w, b) s = Transpose<perm=[2,1,0,3]>(z) y = Conv(s, u, d)", FOLLOWED, IMAGE),
        ("z = Conv(x, w, b) s = ReduceMean<axes=[1]>(z) y = Conv(s, k)", "separate channels", IMAGE),
        ("z = Conv(x, w, b) r = AveragePool<kernel_shape = [2,2], pads = [1,1,0,0], "
         "count_include_pad = 1>(z) y = Conv(r, u, d)", "counts zeros", IMAGE),
    ],
)  # fmt: skip
def test_what_must_not_move(body: str, reason: str, signature: str) -> None:
    arrays = CONV | READER | constants(body)
    stays(body, {k: v for k, v in arrays.items() if f" {k}" in body}, reason, signature)


def test_more_that_must_not_move() -> None:
    body = "z = Conv(x, w, b) r = Relu(z) y = ConvTranspose<strides = [2,2]>(r, u)"
    stays(body, CONV | {"u": weight(3, 5, 2, 2)}, "does not apply all its taps", approximate=True)
    signature = "(float[N,4,7,6] x, bool k) => (float[N,C,H,W] y, float[N,C,H,W] o)"
    branches = BRANCH.format(then="p = Neg(r)", other="q = Relu(r)")
    body = f"z = Conv(x, w, b) r = Relu(z) y = Conv(r, u, d) o = If(k) <{branches}>"
    model = Model.from_proto(graph(signature, body, CONV | READER))
    write_record(model, {"z": RECORD})
    (refusal,) = AbsorbBias().apply(model).refusals
    assert "is read inside the body" in str(refusal)
    halves = {k: v.astype(np.float16) for k, v in (CONV | READER).items()}
    halves["u"] = np.full((5, 3, 1, 1), 6e4, np.float16)
    model = Model.from_proto(
        graph(
            "(float16[N,4,7,6] x) => (float16[N,C,H,W] y)",
            "z = Conv(x, w, b) r = Relu(z) y = Conv(r, u, d)",
            halves,
        )
    )
    write_record(model, {"z": RECORD})
    before = model.to_proto()
    (refusal,) = AbsorbBias().apply(model).refusals
    assert "would leave the range of its type" in str(refusal)
    assert model.to_proto() == before


@pytest.mark.parametrize("equalized", [False, True])
def test_a_real_network(models: Path, equalized: bool) -> None:
    """Means on data move as the record says, and nothing else does."""
    model = load(models / "mobilenetv2-fashion.onnx")
    FoldBatchNorm().apply(model)
    if equalized:
        Equalize(clip="per-channel").apply(model)
    before, known = model.to_proto(), read_record(model)
    result = AbsorbBias().apply(model)
    assert result.measured.channels > 20
    assert not AbsorbBias().apply(model).modified
    pixels = np.load(models / "fashion-tiny.npz")["x"][:64].astype(np.float32)
    feeds = {"input": ((pixels / 255 - 0.286) / 0.353).transpose(0, 3, 1, 2).astype(np.float32)}
    names = [n for n, s in read_record(model).items() if (s.mean != known[n].mean).any()]
    was, now = (outputs(_showing(p, names), feeds) for p in (before, model.to_proto()))
    assert difference_of({"y": was["logits"]}, {"y": now["logits"]}).max_rel < 2e-3
    moved = read_record(model)
    for name in names:
        gap = (was[name] - now[name]).mean((0, 2, 3))
        wanted = known[name].mean - moved[name].mean
        np.testing.assert_allclose(gap, wanted, atol=2e-3 * max(1.0, np.abs(wanted).max()))


def _showing(proto: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    shown = onnx.ModelProto.FromString(proto.SerializeToString())
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names)
    return shown
