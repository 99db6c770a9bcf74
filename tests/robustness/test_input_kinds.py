"""Networks whose input, batch or shapes are unusual: passes that run them come out right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from onnxcompress.data.image_set import ImageSet, load_images
from onnxcompress.data.preprocess import PRESETS
from onnxcompress.errors import OptionError
from onnxcompress.evaluation.accuracy import logits
from onnxcompress.graph.shape_inference import tensor_types
from onnxcompress.model import Model, save
from onnxcompress.model.model_like import input_specs
from onnxcompress.optimize.block_drop.figures import DropBlocksFigures
from onnxcompress.optimize.calibration import InputRequest, gather_inputs
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.open_batch import images_at_once
from onnxcompress.optimize.synthesis.drawn_inputs import DrawnSet
from onnxcompress.passes.base import Pass, run
from onnxcompress.passes.calibrate import Calibrate
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.drop_blocks import DropBlocks
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.quantize import Quantize
from onnxcompress.quantization.qdq_plan import Bits, make_plan
from onnxcompress.runtime.inference import run as run_model
from onnxcompress.runtime.inference import unread_feeds
from onnxcompress.sensitivity.analysis import sensitivity
from tests.helpers.folding import Arrays, graph, norm, weight
from tests.helpers.results import figures_of

HEAD = "c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c)"
TAIL = "d = Conv<pads=[1,1,1,1]>(r, v)"


def arrays(channels: int = 3, **more: Any) -> Arrays:
    """Weights of HEAD and TAIL, and further constants; lists become int64."""
    own = {"w": weight(8, channels, 3, 3), "v": weight(4, 8, 3, 3, seed=1)}
    return own | {n: np.array(v, np.int64) if isinstance(v, list) else v for n, v in more.items()}


SHUFFLE = f"""{HEAD} s = Shape(r) n = Slice(s, zero, one) k = Concat<axis=0>(n, split)
    t = Reshape(r, k) p = Transpose<perm=[0,2,1,3,4]>(t) l = Concat<axis=0>(n, whole)
    e = Reshape(p, l) y = Conv<pads=[1,1,1,1]>(e, v)"""
SHUFFLED = arrays(zero=[0], one=[1], split=[2, 4, 8, 8], whole=[8, 8, 8])

KINDS: dict[str, tuple[str, str, Arrays]] = {
    # a batch in the target of a Reshape
    "one": (
        "(float[1,3,8,8] x) => (float[1,4,64] y)",
        f"{HEAD} {TAIL} y = Reshape(d, s)",
        arrays(s=[1, 4, 64]),
    ),
    "four": (
        "(float[4,3,8,8] x) => (float[4,4,64] y)",
        f"{HEAD} {TAIL} y = Reshape(d, s)",
        arrays(s=[4, 4, 64]),
    ),
    "four, rest": (
        "(float[4,3,8,8] x) => (float[4,5] y)",
        f"{HEAD} {TAIL} f = Reshape(d, s) y = Gemm(f, z)",
        arrays(s=[4, -1], z=weight(256, 5, seed=2)),
    ),
    "open, but one": (
        "(float[N,3,8,8] x) => (float[1,5] y)",
        f"{HEAD} {TAIL} f = Reshape(d, s) y = Gemm(f, z)",
        arrays(s=[1, -1], z=weight(256, 5, seed=2)),
    ),
    "batch and places": (
        "(float[1,3,8,8] x) => (float[64,5] y)",
        f"{HEAD} {TAIL} t = Transpose<perm=[0,2,3,1]>(d) f = Reshape(t, s) y = MatMul(f, z)",
        arrays(s=[64, 4], z=weight(4, 5, seed=2)),
    ),
    "class token": (
        "(float[1,3,8,8] x) => (float[1,65,5] y)",
        f"{HEAD} {TAIL} f = Reshape(d, s) t = Transpose<perm=[0,2,1]>(f) o = Expand(k, e)"
        " a = Concat<axis=1>(o, t) y = MatMul(a, z)",
        arrays(s=[1, 4, 64], k=weight(1, 1, 4), e=[1, 1, 4], z=weight(4, 5, seed=2)),
    ),
    # tensors that are no floats
    "mask": (
        "(float[N,3,8,8] x) => (float[N,8,8,8] y)",
        f"{HEAD} g = Greater(r, t) y = Where(g, r, t)",
        arrays(t=np.float32(0.5)),
    ),
    "cast mask": (
        "(float[N,3,8,8] x) => (float[N,8,8,8] y)",
        f"{HEAD} g = Greater(r, t) f = Cast<to=1>(g) y = Mul(r, f)",
        arrays(t=np.float32(0.5)),
    ),
    "classes": (
        "(float[N,3,8,8] x) => (float[N,4,8,8] y)",
        f"{HEAD} {TAIL} i = ArgMax<axis=1>(d) j = Mul(i, two) f = Cast<to=1>(j) y = Add(d, f)",
        arrays(two=np.int64(0)),
    ),
    # dimensions that stand for open ones
    "minus one": (
        "(float[N,3,8,8] x) => (float[N,4,8,8] y)",
        f"{HEAD} y = Conv<pads=[1,1,1,1]>(r, v)",
        arrays(),
    ),
    # element types
    **{
        kind: (
            f"({kind}[N,3,8,8] x0) => (float[N,4,8,8] y)",
            f"f = Cast<to=1>(x0) x = Div(f, k) {HEAD} y = Conv<pads=[1,1,1,1]>(r, v)",
            arrays(k=np.float32(1 if "float" in kind or kind == "double" else 255)),
        )
        for kind in ("uint8", "int8", "int32", "float16", "double")
    },
    # shapes that are computed at run time
    "shuffle": ("(float[N,3,8,8] x) => (float[N,4,8,8] y)", SHUFFLE, SHUFFLED),
    "shuffle behind BatchNorm": (
        "(float[N,3,8,8] x) => (float[N,4,8,8] y)",
        SHUFFLE.replace("r = Relu(c)", "q = BatchNormalization(c, g, b, m, v0) r = Relu(q)"),
        SHUFFLED | {n if n != "v" else "v0": a for n, a in norm(8).items()},
    ),
    "as large as the input": (
        "(float[N,3,8,8] x) => (float[N,4,8,8] y)",
        """c = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w) q = BatchNormalization(c, g, b, m, v0) r = Relu(q)
        d = Conv<pads=[1,1,1,1]>(r, v) a = Relu(d) h = Shape(x) i = Slice(h, two, four) j = Shape(a)
        k = Slice(j, zero, two) l = Concat<axis=0>(k, i) y = Resize<mode="nearest">(a, , , l)""",
        arrays(zero=[0], two=[2], four=[4]) | {n if n != "v" else "v0": a for n, a in norm(8).items()},
    ),
    # no pictures
    "sequence": (
        "(float[N,1,64] x) => (float[N,4,64] y)",
        "c = Conv<pads=[1,1]>(x, w) r = Relu(c) y = Conv<pads=[1,1]>(r, v)",
        {"w": weight(8, 1, 3), "v": weight(4, 8, 3, seed=1)},
    ),
    "volume": (
        "(float[N,1,6,6,6] x) => (float[N,4,6,6,6] y)",
        "c = Conv<pads=[1,1,1,1,1,1]>(x, w) r = Relu(c) y = Conv<pads=[1,1,1,1,1,1]>(r, v)",
        {"w": weight(8, 1, 3, 3, 3), "v": weight(4, 8, 3, 3, 3, seed=1)},
    ),
    "six channels": (
        "(float[N,6,8,8] x) => (float[N,4,8,8] y)",
        f"{HEAD} y = Conv<pads=[1,1,1,1]>(r, v)",
        arrays(6),
    ),
    "vector": (
        "(float[N,16] x) => (float[N,5] y)",
        "c = Gemm(x, w) r = Relu(c) y = Gemm(r, v)",
        {"w": weight(16, 8), "v": weight(8, 5, seed=1)},
    ),
    # inputs that nothing reads
    "unread": (
        "(bool training, float[N,3,8,8] x) => (float[N,4,8,8] y)",
        f"{HEAD} y = Conv<pads=[1,1,1,1]>(r, v)",
        arrays(),
    ),
}

PASSES: dict[str, Pass] = {
    "quantize": Quantize(inputs="procedural", synthetic=24),
    "prune": Prune(inputs="procedural", synthetic=24, sparsity=0.2),
    "fp16": HalfPrecision(),
    "calibrate": Calibrate(inputs="procedural", synthetic=24),
}
LEAST = {"quantize": 18.0, "prune": 8.0, "fp16": 40.0, "calibrate": 100.0}
"""Signal to noise in decibels on other inputs than those that were learned from."""


def model_of(kind: str) -> Model:
    proto = graph(*KINDS[kind])
    if kind == "minus one":
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = -1
    return Model.from_proto(proto, kind)


def signal_to_noise(before: Model, after: Model) -> float:
    """Of the outputs in onnxruntime, on made inputs of another seed, one batch after the other."""
    spec = next(s for s in input_specs(before) if s.read)
    inputs = gather_inputs(before, InputRequest(inputs="procedural", synthetic=8, seed=7)).images
    batch = spec.shape[0] if spec.shape and isinstance(spec.shape[0], int) else 1
    feeds = [{spec.name: x} | unread_feeds(before) for x in inputs.batches(batch)]
    runs = [[run_model(model, feed)["y"] for feed in feeds] for model in (before, after)]
    a, b = (np.concatenate(parts).astype(np.float64) for parts in runs)
    return float(10 * np.log10(a.var() / max(float(np.square(a - b).mean()), 1e-30)))


@pytest.mark.parametrize("name", list(PASSES))
@pytest.mark.parametrize("kind", list(KINDS))
def test_network_comes_out_right(kind: str, name: str) -> None:
    before = model_of(kind)
    after = before.copy()
    (result,) = run([PASSES[name]], after)
    if (kind, name) == ("float16", "fp16"):
        assert "half precision already" in str(result.refusals)
        return
    assert result.modified
    assert signal_to_noise(before, after) >= LEAST[name]


BLOCK = (
    "c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) e = Conv<pads=[1,1,1,1]>(r, u) a = Add(e, r) q = Relu(a)"
)
BLOCKS: dict[str, tuple[str, str, Arrays]] = {
    "one": (
        "(float[1,3,8,8] x) => (float[1,4,64] y)",
        f"{BLOCK} d = Conv<pads=[1,1,1,1]>(q, v) f = Reshape(d, s) y = Sigmoid(f)",
        arrays(s=[1, 4, 64]),
    ),
    "four": (
        "(float[4,3,8,8] x) => (float[4,5] y)",
        f"{BLOCK} d = Conv<pads=[1,1,1,1]>(q, v) f = Reshape(d, s) y = Gemm(f, z)",
        arrays(s=[4, -1], z=weight(256, 5, seed=2)),
    ),
    "bytes": (
        "(uint8[N,3,8,8] b) => (float[N,4,8,8] y)",
        f"f = Cast<to=1>(b) x = Div(f, k) {BLOCK} d = Conv<pads=[1,1,1,1]>(q, v) y = Sigmoid(d)",
        arrays(k=np.float32(255)),
    ),
    "six channels": (
        "(float[N,6,8,8] x) => (float[N,4,8,8] y)",
        f"{BLOCK} d = Conv<pads=[1,1,1,1]>(q, v) y = Sigmoid(d)",
        arrays(6),
    ),
    "sequence": (
        "(float[N,1,64] x) => (float[N,4,64] y)",
        "c = Conv<pads=[1,1]>(x, w) r = Relu(c) e = Conv<pads=[1,1]>(r, u) q = Add(e, r)"
        " d = Conv<pads=[1,1]>(q, v) y = Sigmoid(d)",
        {"w": weight(8, 1, 3), "u": 0.1 * weight(8, 8, 3, seed=2), "v": weight(4, 8, 3, seed=1)},
    ),
    "open": (
        "(float[N,3,H,W] x) => (float[N,4,H2,W2] y)",
        f"{BLOCK} d = Conv<pads=[1,1,1,1], strides=[2,2]>(q, v) y = Sigmoid(d)",
        arrays(),
    ),
}


def block_model(kind: str) -> Model:
    signature, body, values = BLOCKS[kind]
    return Model.from_proto(graph(signature, body, {"u": 0.1 * weight(8, 8, 3, 3, seed=2)} | values), kind)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_clock")
@pytest.mark.parametrize("kind", list(BLOCKS))
@pytest.mark.filterwarnings("ignore::onnxcompress.errors.CompressWarning")
def test_block_is_dropped(kind: str) -> None:
    before = block_model(kind)
    after = before.copy()
    one = DropBlocks(blocks=1, synthetic=16, steps=5, threads=1, input_shape=None)
    (result,) = run([one], after)
    assert figures_of(result, DropBlocksFigures).blocks[0].dropped
    assert len(after.graph.nodes) < len(before.graph.nodes)
    assert signal_to_noise(before, after) > 3.0


@pytest.mark.parametrize("kind", ["one", "four", "uint8", "shuffle behind BatchNorm", "six channels"])
def test_layers_are_measured_and_biases_corrected(kind: str, tmp_path: Path) -> None:
    before = model_of(kind)
    request = InputRequest(inputs="procedural", synthetic=16)
    assert all(0 <= row.error < 1 for row in sensitivity(before, request, workers=1).rows)
    save(before, tmp_path / "before.onnx")
    after = before.copy()
    corrector = CorrectBias(reference=str(tmp_path / "before.onnx"), inputs="procedural", synthetic=32)
    run([Prune(inputs="procedural", synthetic=16, sparsity=0.5, reconstruct=False)], after)
    pruned = signal_to_noise(before, after)
    run([corrector], after)
    assert signal_to_noise(before, after) > pruned - 0.5


def test_several_images_go_through_a_graph_that_fixes_one() -> None:
    model = model_of("one")
    images = torch.rand(3, 3, 8, 8)
    assert images_at_once(model, images) is None
    executor = Executor.from_model(model)
    whole = executor.run({"x": images}, ["y"])["y"]
    alone = [executor.run({"x": image[None]}, ["y"])["y"] for image in images]
    assert torch.allclose(whole, torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "fixed"), [("class token", 1), ("batch and places", None), ("four", None)]
)
def test_graph_is_tried_before_its_batch_is_enlarged(kind: str, fixed: int | None) -> None:
    assert images_at_once(model_of(kind), torch.rand(12, 3, 8, 8)) == fixed


def test_batch_on_another_axis_is_not_enlarged() -> None:
    body = f"{HEAD} p = GlobalAveragePool(r) f = Flatten(p) y = Transpose<perm=[1,0]>(f)"
    proto = graph("(float[N,3,8,8] x) => (float[8,N] y)", body, arrays())
    assert images_at_once(Model.from_proto(proto), torch.rand(3, 3, 8, 8)) == 1


def test_run_may_start_behind_a_tensor_whose_shape_it_needs() -> None:
    model = model_of("as large as the input")
    executor = Executor.from_model(model)
    images = torch.rand(5, 3, 8, 8)
    whole = executor.run({"x": images}, ["r", "y"])
    assert torch.equal(executor.run({"r": whole["r"]}, ["y"])["y"], whole["y"])


def test_only_floats_are_quantized() -> None:
    for kind in ("mask", "cast mask", "classes"):
        model = model_of(kind)
        types = tensor_types(model)
        keys = make_plan(model, Bits(8, 8, 8)).quantizers
        assert keys
        assert {types[name] for name, _ in keys} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("size", [-1, 0])
def test_unset_size_is_an_open_one(size: int) -> None:
    proto = graph(*KINDS["one"])
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    model = Model.from_proto(proto)
    assert model.graph.inputs[0].shape[0] is None
    assert not model.to_proto().graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == size  # the caller's own


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("uint8", 0, 255), ("int8", -128, 127), ("int32", 0, 255), ("float16", -2, 3)]
)
def test_images_come_in_the_type_of_the_input(kind: str, low: float, high: float, tmp_path: Path) -> None:
    model = model_of(kind)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    pixels[0, 0, 0] = 0, 255, 255
    np.savez(tmp_path / "images.npz", x=pixels)
    for request in (
        InputRequest(inputs="procedural", synthetic=8),
        InputRequest(str(tmp_path / "images.npz")),
    ):
        x = gather_inputs(model, request).images.array()
        assert x.dtype == np.dtype(kind)
        assert low <= x.min() < x.max() <= high
    if kind in ("uint8", "int32"):
        assert np.array_equal(x, pixels.transpose(0, 3, 1, 2))
    if kind == "int8":
        assert np.array_equal(x + np.float32(128), pixels.transpose(0, 3, 1, 2))


def test_fractions_for_an_input_of_integers_are_refused() -> None:
    request = InputRequest(inputs="procedural", preprocess="imagenet", synthetic=2)
    with pytest.raises(OptionError, match="takes uint8 pixels; use --preprocess 'raw'"):
        gather_inputs(model_of("uint8"), request)
    sized = InputRequest(inputs="procedural", preprocess="size=8", synthetic=2)
    images = gather_inputs(model_of("uint8"), sized).images
    assert isinstance(images, ImageSet)
    assert images.preprocess.scale == PRESETS["raw"].scale


def test_inputs_are_drawn_where_no_picture_fits() -> None:
    inputs = gather_inputs(model_of("six channels"), InputRequest(synthetic=64))
    assert isinstance(inputs.images, DrawnSet)
    assert inputs.shown is None
    assert inputs.sources[0].source == "drawn"
    x = inputs.images.array()
    assert x.shape == (64, 6, 8, 8)
    assert abs(x.mean()) < 0.1
    assert abs(x.std() - 1) < 0.1
    again = gather_inputs(model_of("six channels"), InputRequest(synthetic=64)).images.array()
    assert np.array_equal(x, again)


def test_drawn_inputs_follow_the_record_and_what_is_said_of_pixels() -> None:
    model = model_of("six channels")
    said = gather_inputs(model, InputRequest(synthetic=64, preprocess="unit")).images.array()
    assert 0 <= said.min() < 0.2 < 0.8 < said.max() <= 1
    codes = graph("(int64[N,5] x) => (float[N,5,3] y)", "y = Gather(t, x)", {"t": weight(8, 3)})
    x = gather_inputs(Model.from_proto(codes), InputRequest(synthetic=64)).images.array()
    assert x.dtype == np.int64
    assert 0 <= x.min() < x.max() < 8


def test_a_constant_in_place_of_a_second_input_is_one_of_the_network() -> None:
    fixed = graph(
        "(float[N,3,8,8] x) => (float[N,8,8,8] y)", f"{HEAD} y = Add(r, z)", arrays(z=weight(1, 8, 8, 8))
    )
    run([Quantize(synthetic=8)], Model.from_proto(fixed))


def test_images_are_evaluated_beside_an_input_that_nothing_reads(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", x=np.zeros((5, 8, 8, 3), np.uint8))
    body = f"{HEAD} p = GlobalAveragePool(r) y = Flatten(p)"
    proto = graph("(bool training, float[N,3,8,8] x) => (float[N,8] y)", body, arrays())
    images = load_images(tmp_path / "images.npz", preprocess=PRESETS["unit"])
    assert logits(proto.SerializeToString(), images).shape == (5, 8)
