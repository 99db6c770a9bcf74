"""quantize: the file computes what it says, onnxruntime fuses it, rounding beats rounding to nearest."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch

from onnxcompress.data.image_set import load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import ModelError, OptionError
from onnxcompress.evaluation.accuracy import agreement, logits
from onnxcompress.graph.query import read
from onnxcompress.model import Model, load
from onnxcompress.optimize.reconstruction.activation_range import fake, least_squares
from onnxcompress.optimize.reconstruction.gptq import nearest, reconstruct
from onnxcompress.optimize.reconstruction.range_equalization import find_channel_groups, stretch
from onnxcompress.optimize.reconstruction.ridge import LayerMoments
from onnxcompress.optimize.reconstruction.ridge import least_squares as target_and_hessian
from onnxcompress.optimize.reconstruction.saturation import SaturationBounds, partners
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.passes.base import run
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.drop_channels import DropChannels
from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
from onnxcompress.passes.quantize import Quantize
from onnxcompress.passes.quantize.figures import QuantizeFigures
from onnxcompress.quantization.affine_grid import activation_grid
from onnxcompress.quantization.qdq_plan import Bits, make_plan
from onnxcompress.runtime.inference import run as run_model
from tests.helpers.folding import Arrays, graph, norm, weight
from tests.helpers.results import figures_of

QUICK = Quantize(preprocess="fashion-mnist", inputs="layerwise", synthetic=32)

ENDS = ((0, 127), (-127, 0))
"""Integers of one sign."""

BODY = """p = Pad(x, pads, zero) c = Conv<kernel_shape=[3, 3], strides=[2, 2]>(p, w)
    n = BatchNormalization(c, g, b, m, v) r = Relu(n) d = Conv<group=5, pads=[1, 1, 1, 1]>(r, wd)
    a = Add(r, d) q = GlobalAveragePool(a) s = Shape(x) i = Gather(s, zero_index) u = Unsqueeze(i, axis)
    k = Concat<axis=0>(u, rest) f = Reshape(q, k) y = Gemm<transB=1>(f, wg, cg)"""


def small(opset: int = 17, body: str = BODY, **more: np.ndarray) -> Model:
    """A Pad, a BatchNorm, a depthwise layer beside a sum, a computed Reshape, as exporters leave them."""
    arrays: Arrays = {"w": weight(5, 3, 3, 3), **norm(5), "wd": weight(5, 1, 3, 3, seed=1)}
    arrays |= {"wg": weight(4, 5, seed=2), "cg": np.arange(4, dtype="f4"), "zero": np.zeros((), "f4")}
    arrays |= {"pads": np.array([0, 0, 1, 0, 0, 0, 0, 1]), "zero_index": np.array(0), "axis": np.array([0])}
    arrays |= {"rest": np.array([-1]), **more}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4] y)", body, arrays, opset=opset))


def images(models: Path, count: int) -> torch.Tensor:
    found = load_images(
        models / "fashion-test2k.npz", preprocess=Preprocess.parse("fashion-mnist"), count=count
    )
    return torch.from_numpy(found.array())


def test_preparing_changes_no_output() -> None:
    model = small()
    x = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    before = run_model(model.to_proto(), {"x": x})["y"]
    fold_and_canonicalize(model)
    assert {node.op for node in model.graph.nodes}.isdisjoint({"Pad", "BatchNormalization", "Shape"})
    np.testing.assert_allclose(run_model(model.to_proto(), {"x": x})["y"], before, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet20-fashion", "mobilenetv2-fashion"])
def test_eight_bits_fuse_and_agree_with_the_float_network(models: Path, network: str) -> None:
    model = load(models / f"{network}.onnx")
    metadata = model.metadata
    test = load_images(
        models / "fashion-test2k.npz", preprocess=Preprocess.parse("fashion-mnist"), count=300
    )
    exact, size = logits(model, test), model.to_proto().ByteSize()
    convolutions = sum(node.op == "Conv" for node in model.graph.nodes)
    (result,) = run([QUICK], model)
    runtime = figures_of(result, QuantizeFigures).runtime
    assert runtime.fused["QLinearConv"] == convolutions
    assert runtime.fused["QGemm"] == 1
    assert runtime.in_float == {}
    assert not result.refusals
    assert len(figures_of(result, QuantizeFigures).layers) == convolutions + 1
    assert agreement(exact, logits(model, test)) > 0.97
    assert model.to_proto().ByteSize() < 0.5 * size
    assert metadata.items() <= model.metadata.items()
    assert [entry["pass"] for entry in model.provenance()][-1] == "quantize"


@pytest.mark.slow
@pytest.mark.parametrize("activations", [4, 5])
def test_few_bits_are_what_the_file_computes(models: Path, activations: int) -> None:
    """Weights are 4-bit integers, and no tensor that a layer reads has more values than its bits allow."""
    model = load(models / "resnet20-fashion.onnx")
    one = replace(QUICK, weight_bits=4, activation_bits=activations, first_last=0, synthetic=8)
    run([one], model)
    proto = model.to_proto()
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    weights = [v for n, v in stored.items() if n.endswith("_quantized") and v.dtype == np.int8]
    assert len(weights) == sum(n.op_type in ("Conv", "Gemm") for n in proto.graph.node)
    assert min(w.min() for w in weights) == -8
    assert max(w.max() for w in weights) == 7
    makers = {n.output[0]: n for n in proto.graph.node}
    read = [n.input[0] for n in proto.graph.node if n.op_type in ("Conv", "Gemm")]
    assert all(makers[name].op_type == "DequantizeLinear" for name in read)
    proto.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(read)
    )
    found = run_model(proto, {"input": images(models, 16).numpy()})
    assert max(len(np.unique(found[name])) for name in read) == 2**activations


@pytest.mark.slow
@pytest.mark.parametrize(("depthwise", "expected"), [(8, 8), (0, 4)])
def test_depthwise_weights_alone_keep_their_bits(models: Path, depthwise: int, expected: int) -> None:
    model = load(models / "mobilenetv2-fashion.onnx")
    one = replace(QUICK, weight_bits=4, activation_bits=0, first_last=0, depthwise=depthwise, synthetic=8)
    (result,) = run([one], model)
    figures = figures_of(result, QuantizeFigures)
    assert not figures.channel_ranges
    bits = {row.name: row.weight_bits for row in figures.layers}
    assert {b for name, b in bits.items() if "depthwise" in name} == {expected}
    assert {b for name, b in bits.items() if "depthwise" not in name} == {4}


@pytest.mark.slow
def test_weights_alone_are_rounded_on_deep_inputs_unless_procedural_ones_are_asked_for(
    models: Path,
) -> None:
    one = replace(QUICK, weight_bits=4, activation_bits=0, synthetic=16)
    real = replace(one, inputs="images", images=str(models / "fashion-tiny.npz"), count=16)
    test = load_images(
        models / "fashion-test2k.npz", preprocess=Preprocess.parse("fashion-mnist"), count=300
    )
    cases = (
        (one, ["layerwise", "deep inputs"]),
        (real, ["images", "deep inputs"]),
        (replace(one, inputs="procedural"), ["procedural"]),
    )
    for case, sources in cases:
        model = load(models / "mobilenetv2-fashion.onnx")
        exact = logits(model, test)
        (result,) = run([case], model)
        assert [used.source for used in result.inputs] == sources
        assert agreement(exact, logits(model, test)) > 0.8


@pytest.mark.slow
def test_per_tensor_every_weight_has_one_scale(models: Path) -> None:
    model = load(models / "mobilenetv2-fashion.onnx")
    run([replace(QUICK, per_channel=False, synthetic=8)], model)
    scales = [t for n, t in model.graph.tensors().items() if n.endswith("_scale") and "weight" in n]
    assert scales
    assert {read(t).shape for t in scales} == {()}


def largest_pairs(models: Path, safe: bool) -> dict[bool, list[int]]:
    """Largest sums of pairs of weights of one sign in each convolution, by whether it is depthwise."""
    model = load(models / "mobilenetv2-fashion.onnx")
    run([replace(QUICK, synthetic=8, overflow_safe=safe)], model)
    proto = model.to_proto()
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    makers = {n.output[0]: n for n in proto.graph.node}
    found: dict[bool, list[int]] = {False: [], True: []}
    for node in proto.graph.node:
        if node.op_type == "Conv":
            integers = stored[makers[node.input[1]].input[0]].astype(int)
            assert np.abs(integers).max() == 127
            rows = np.moveaxis(integers, 1, -1).reshape(len(integers), -1)
            rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
            pairs = [np.abs(rows.clip(*ends).reshape(len(rows), -1, 2).sum(2)).max() for ends in ENDS]
            found[integers.shape[1] == 1].append(max(pairs))
    return found


@pytest.mark.slow
def test_pairs_of_weights_cannot_overflow_but_each_has_all_eight_bits(models: Path) -> None:
    """As kernels without VNNI add them; depthwise kernels add in 32 bits."""
    safe, free = (largest_pairs(models, one) for one in (True, False))
    assert max(safe[False]) == 128
    assert max(free[False]) > 128
    assert max(safe[True]) > 128


@pytest.mark.parametrize(("inputs", "taps"), [(3, 9), (4, 9), (5, 1), (16, 9), (1, 1)])
def test_pairs_are_neighbours_with_the_channels_last(inputs: int, taps: int) -> None:
    partner = partners(inputs, taps)
    at = np.arange(inputs * taps).reshape(inputs, taps).T.reshape(-1)
    wanted = {frozenset(pair) for pair in zip(at[::2].tolist(), at[1::2].tolist(), strict=False)}
    odd = {frozenset([int(at[-1])])} if len(at) % 2 else set()
    assert {frozenset((a, b)) for a, b in enumerate(partner.tolist())} == wanted | odd
    allowed = SaturationBounds(-127, 127, partner)
    values = 90 * torch.randn(2, 4, len(at), generator=torch.Generator().manual_seed(0))
    found = values.round().clamp(*allowed.bounds(values))
    alone = partner == torch.arange(len(at))
    assert not ((found + found[..., partner]).abs() > 128)[..., ~alone].any()
    plain = values.round().clamp(-127, 127)
    kept = ((plain + plain[..., partner]).abs() <= 128) | alone
    assert torch.equal(found[kept], plain[kept])


def test_rounding_keeps_pairs_small_and_makes_up_for_it() -> None:
    w = torch.randn(1, 16, 72, generator=torch.Generator().manual_seed(1))
    w[:, :4] = w[:, :4].abs()  # all of one sign: all pairs are full
    x = correlated(1, 72, 2000, 0)
    allowed = SaturationBounds(-127, 127, partners(8, 9))
    moments = moments_of(w, x, torch.zeros(1, 16, 2000))
    found, half = (
        reconstruct(w, moments, one, True, ridge=1e-4, target=float("inf"))
        for one in (allowed, SaturationBounds(-64, 64))
    )
    assert (found.integers + found.integers[..., allowed.partner]).abs().max() <= 128
    errors = [(one.weight @ x - w @ x).var(2)[0] for one in (found, half)]
    assert errors[0].mean() < 0.6 * errors[1].mean()
    assert (errors[0] < 1.5 * errors[1]).all()


def test_four_bit_types_halve_the_file_and_compute_the_same() -> None:
    one = Quantize(inputs="procedural", synthetic=8, weight_bits=4, activation_bits=4, first_last=0)
    x = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    found = []
    for types in (False, True):
        model = small(opset=21)
        run([replace(one, small_types=types)], model)
        kinds = {t.data_type for t in model.to_proto().graph.initializer if "weight" not in t.name}
        assert (onnx.TensorProto.INT4 in kinds, onnx.TensorProto.UINT4 in kinds) == (types, types)
        assert not types or not any(node.op == "Clip" for node in model.graph.nodes)
        found.append(run_model(model.to_proto(), {"x": x})["y"])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-4)
    old = small()
    run([replace(one, small_types=True)], old)
    assert old.opset == 21


@pytest.mark.slow
def test_weights_only_leave_activations_alone_and_give_the_mean_back(models: Path) -> None:
    model = load(models / "resnet20-fashion.onnx")
    x = images(models, 200).numpy()
    exact = run_model(model.to_proto(), {"input": x})["logits"]
    errors = []
    for reconstructed in (True, False):
        quantized = load(models / "resnet20-fashion.onnx")
        one = replace(QUICK, weight_bits=3, activation_bits=0, reconstruct=reconstructed, synthetic=16)
        run([one], quantized)
        assert not any(node.op == "QuantizeLinear" for node in quantized.graph.nodes)
        found = run_model(quantized.to_proto(), {"input": x})["logits"]
        errors.append(float(np.square(found - exact).mean() / exact.var()))
    assert errors[0] < 0.5 * errors[1]


def test_a_second_run_changes_nothing_and_a_seed_gives_the_same_bytes() -> None:
    one = Quantize(inputs="procedural", synthetic=8)
    first, second = small(), small()
    run([one], first)
    run([one], second)
    assert first.to_proto().SerializeToString(deterministic=True) == second.to_proto().SerializeToString(
        deterministic=True
    )
    before = first.to_proto()
    (result,) = run([one], first)
    assert not result.modified
    assert "quantized already" in result.refusals[0].rule
    assert first.to_proto() == before


@pytest.mark.parametrize(
    "one", [DropBlocks(blocks=1), DropChannels(macs_reduction=10)], ids=lambda p: p.name
)
def test_what_changes_weights_is_refused_before_it_learns(one: DropBlocks | DropChannels) -> None:
    quantized = small()
    run([Quantize(inputs="procedural", synthetic=8)], quantized)
    for attempt in (one.preview, one.apply):
        with pytest.raises(ModelError, match=r"it is quantized already: .* before quantizing"):
            attempt(quantized)


@pytest.mark.parametrize(
    ("ratios", "inputs", "source"),
    [
        ([3.0, 9.0], "auto", "procedural"),
        ([3.0, 2.0], "auto", "layerwise"),
        ([9.0], "auto", "layerwise"),
        ([3.0], "layerwise", "layerwise"),
    ],
)
def test_where_the_record_misleads_procedural_inputs_are_tried(
    monkeypatch: pytest.MonkeyPatch, ratios: list[float], inputs: Literal["auto", "layerwise"], source: str
) -> None:
    """The better of both results is written; what was asked for is not second-guessed."""
    left = iter(ratios)
    kept = "onnxcompress.passes.quantize.float_tensors.Judge.kept_db"
    monkeypatch.setattr(kept, lambda *_: next(left))
    model, alone = small(), small()
    (result,) = run([Quantize(inputs=inputs, synthetic=8, float_tensors=False)], model)
    assert [used.source for used in result.inputs] == [source]
    assert ("3.0 dB" in result.inputs[0].why) == (source == "procedural")
    assert next(left, None) is None
    monkeypatch.setattr(kept, lambda *_: 12.0)
    options: dict[str, Any] = {"inputs": source, "synthetic": 8}
    run([Quantize(**options)], alone)
    assert model.to_proto().graph == alone.to_proto().graph


@pytest.mark.parametrize(("bias", "source"), [(-9, "procedural"), (0, "layerwise")])
def test_procedural_inputs_are_taken_where_a_detector_finds_nothing_to_judge_by(
    bias: float, source: str
) -> None:
    """All answers are no, before and after: that says nothing of pictures in which there is something."""
    arrays = {"w": weight(8, 3, 3, 3), **norm(8, "n"), "v": weight(1, 8, 1, 1) / 99}
    arrays["b"] = np.full(1, bias, np.float32)
    body = """c = Conv(x, w) n = BatchNormalization(c, gn, bn, mn, vn) r = Relu(n)
        d = Conv(r, v, b) y = Sigmoid(d)"""
    model = Model.from_proto(graph("(float[N,3,16,16] x) => (float[N,1,14,14] y)", body, arrays))
    (result,) = run([Quantize(synthetic=8, effort="fast")], model)
    assert [used.source for used in result.inputs] == [source]
    assert ("finds nothing" in result.inputs[0].why) == (source == "procedural")


def test_what_cannot_be_quantized_is_refused_with_a_reason() -> None:
    body = """c = Conv(x, w) d = Conv<group=4>(c, wd) e = Conv<group=4>(d, wd) k = Exp(w2) z = Conv(e, k)
        f = GlobalAveragePool(z) y = Flatten(f)"""
    arrays: Arrays = {"w": weight(4, 3, 1, 1), "wd": weight(4, 1, 1, 1), "w2": weight(4, 4, 1, 1)}
    proto = graph("(float[N,3,8,8] x) => (float[N,4] y)", body, arrays)
    model = Model.from_proto(proto)
    (result,) = run([Quantize(inputs="procedural", synthetic=4)], model)
    rules = [refusal.rule for refusal in result.refusals]
    assert sum("shared" in rule for rule in rules) == 2
    assert any("not a constant" in rule for rule in rules)
    assert len(figures_of(result, QuantizeFigures).layers) == 1
    with pytest.raises(OptionError, match="--weight-bits 9"):
        Quantize(weight_bits=9).check()


def test_channel_ranges_are_equal_and_cost_nothing(models: Path) -> None:
    """A Relu network computes what it did."""
    x = images(models, 32)
    model = load(models / "resnet20-fashion.onnx")
    fold_and_canonicalize(model)
    plan = make_plan(model, Bits(8, 8, 8))
    before = run_model(model.to_proto(), {"input": x.numpy()})["logits"]
    places = find_channel_groups(model, plan)
    assert len(places) >= 9
    assert stretch(model, plan, x, StatisticsAlignment()) == len(places)
    np.testing.assert_allclose(
        run_model(model.to_proto(), {"input": x.numpy()})["logits"], before, rtol=1e-3, atol=1e-3
    )
    proto = model.to_proto()
    names = [name for place in places for name in place.read]
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    found = run_model(proto, {"input": x.numpy()})
    for place in places:
        largest = np.max([np.abs(found[name]).max((0, 2, 3)) for name in place.read], axis=0)
        alive = largest[largest > largest.max() / 64]
        assert len(alive) > 0.5 * len(largest)
        assert alive.max() < 1.01 * alive.min()


def moments_of(w: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> LayerMoments:
    moments = LayerMoments.empty(w)
    for part in torch.split(torch.arange(x.shape[2]), 100):
        moments.add(x[..., part], residual[..., part])
    return moments


def correlated(groups: int, fan: int, rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, fan, fan, generator=generator)
    return mix @ torch.randn(groups, fan, rows, generator=generator) + 2


@pytest.mark.parametrize(("groups", "outputs", "fan"), [(1, 16, 150), (7, 1, 9), (2, 3, 64)])
def test_rounding_beats_nearest_on_the_outputs(groups: int, outputs: int, fan: int) -> None:
    w = torch.randn(groups, outputs, fan, generator=torch.Generator().manual_seed(1))
    x = correlated(groups, fan, 2000, 0)
    wanted = w @ x
    found = reconstruct(
        w, moments_of(w, x, 0 * wanted), SaturationBounds(-8, 7), True, ridge=1e-4, target=float("inf")
    )
    plain = nearest(w, SaturationBounds(-8, 7), True)
    off = found.weight @ x + found.shift[..., None] - wanted
    assert off.mean(2).abs().max() < 1e-3 * wanted.std()  # the bias is corrected
    rough = plain.weight @ x - wanted
    assert off.square().mean() < 0.7 * rough.var(2, correction=0).mean()  # its bias corrected, too
    assert found.integers.min() >= -8
    assert found.integers.max() <= 7
    assert torch.equal(found.integers, found.integers.round())


def test_groups_that_read_nothing_or_a_constant_are_rounded() -> None:
    """A channel that is saturated at 6, and one that is dead, as depthwise layers have them."""
    w = torch.randn(3, 1, 9, generator=torch.Generator().manual_seed(1))
    x = torch.full((3, 9, 3000), 6.0)
    x[1] = 0
    x[2] += torch.randn(9, 3000, generator=torch.Generator().manual_seed(2))
    x[0, :, ::7] += 1e-5
    found = reconstruct(
        w, moments_of(w, x, torch.zeros(3, 1, 3000)), SaturationBounds(-8, 7), True, ridge=1e-2, target=1e-2
    )
    off = found.weight @ x + found.shift[..., None] - w @ x
    assert torch.isfinite(off).all()
    assert off.mean(2).abs().max() < 1e-2


def test_rounding_is_near_the_best_of_all_integers() -> None:
    w = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(3))
    x = correlated(1, 4, 500, 4)
    found = reconstruct(
        w,
        moments_of(w, x, torch.zeros(1, 6, 500)),
        SaturationBounds(-2, 1),
        True,
        ridge=1e-9,
        target=float("inf"),
    )
    centred = x - x.mean(2, keepdim=True)
    grid = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.float32)
    for row in range(6):
        every = (grid * found.scale[0, row] - w[0, row]) @ centred[0]
        own = (found.weight[0, row] - w[0, row]) @ centred[0]
        assert own.square().mean() <= 1.3 * every.square().mean(1).min() + 1e-6


def test_the_target_makes_up_for_what_the_layer_reads() -> None:
    """x̂ = A x: the least squares target undoes A; with the layer's own weight the error stays."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 4, 12, generator=generator)
    x = torch.randn(1, 12, 3000, generator=generator)
    read = (torch.eye(12) + 0.2 * torch.randn(12, 12, generator=generator)) @ x
    moments = moments_of(w, read, w @ x - w @ read)
    errors = []
    for target in (1e-6, float("inf")):
        found = reconstruct(w, moments, SaturationBounds(-127, 127), True, ridge=1e-6, target=target)
        errors.append(float((found.weight @ read + found.shift[..., None] - w @ x).square().mean()))
    assert errors[0] < 1e-3 * errors[1]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [False, True])
def test_ranges_by_least_squares_beat_the_ends(bits: int, signed: bool) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.relu()
    found = least_squares(x, bits, "uint8", False)
    ends = activation_grid(float(x.min()), float(x.max()), bits)
    errors = [float((fake(x, grid) - x).square().mean()) for grid in (found, ends)]
    assert errors[0] <= (1.0 if bits == 8 else 0.7) * errors[1]
    assert float(fake(torch.zeros(1), found)) == 0
    assert (found.zero_point == 0) == (not signed)
    assert found.narrow == (bits < 8)


def test_a_grid_that_ends_at_six_never_gives_more() -> None:
    """Else onnxruntime keeps the Clip of ReLU6, and the convolution is not fused."""
    for bits in range(2, 9):
        grid = activation_grid(0.0, 6.0, bits)
        assert grid.scale * np.float32(2**bits - 1) <= np.float32(6)
        assert grid.bounds[1] == pytest.approx(6, rel=1e-6)


def test_biases_have_the_scales_that_integer_kernels_expect() -> None:
    model = small()
    run([Quantize(inputs="procedural", synthetic=8)], model)
    tensors = model.graph.tensors()
    node = next(n for n in model.graph.nodes if n.op == "Conv" and n.attrs.get("group", 1) == 5)
    data, weights, bias = (tensor.inputs[0] for tensor in node.inputs)
    product = read(data.inputs[1]) * read(weights.inputs[1])
    np.testing.assert_array_equal(read(bias.inputs[1]), product.astype(np.float32))
    assert read(tensors[bias.inputs[0].name]).dtype == np.int32


def test_moments_of_parts_add_up_to_those_of_all() -> None:
    """Each part about a reference of its own: batches are summed beside each other."""
    w = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1))
    x = correlated(2, 12, 900, 0)
    residual = torch.randn(2, 3, 900, generator=torch.Generator().manual_seed(2))
    whole, merged = LayerMoments.empty(w), LayerMoments.empty(w)
    whole.add(x, residual)
    for places in torch.split(torch.arange(900), [250, 550, 100]):
        part = LayerMoments.empty(w)
        part.add(x[..., places], residual[..., places])
        merged.merge(part)
    assert merged.rows == whole.rows
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-5, atol=1e-5)
    (goal, h), (same_goal, same_h) = (
        target_and_hessian(w, m, ridge=0.01, target=1.0) for m in (whole, merged)
    )
    torch.testing.assert_close(same_h, h, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same_goal, goal, rtol=1e-4, atol=1e-4)
