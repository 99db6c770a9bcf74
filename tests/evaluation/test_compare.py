"""MACs, parameters and the comparison of two models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnxcompress.cli.benchmark import benchmark as benchmark_command
from onnxcompress.cli.compare import compare as compare_command
from onnxcompress.data.image_set import ImageSet
from onnxcompress.data.input_shapes import parse_input_shapes
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import ModelError, OptionError
from onnxcompress.evaluation import compare as comparing
from onnxcompress.evaluation.compare import compare
from onnxcompress.graph.macs import count_macs, count_parameters, node_macs
from onnxcompress.graph.shape_inference import tensor_shapes
from onnxcompress.model import Model
from onnxcompress.model.model_like import model_bytes
from onnxcompress.runtime.latency import Timing


def parse(text: str, opset: int = 17) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')


def with_weights(proto: onnx.ModelProto, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


def classifier(width: int = 4, batch: str = "N") -> onnx.ModelProto:
    """Conv 3x3 on 3x8x8, global mean, Gemm to 5 classes."""
    proto = parse(f"""
        net (float[{batch},3,8,8] x) => (float[{batch},5] y) {{
            c = Conv<pads=[1,1,1,1]>(x, w)
            r = Relu(c)
            p = GlobalAveragePool(r)
            f = Flatten(p)
            y = Gemm<transB=1>(f, v, b)
        }}
    """)
    return with_weights(proto, w=(width, 3, 3, 3), v=(5, width), b=(5,))


CLASSIFIER_MACS = 4 * 8 * 8 * 3 * 9 + 4 * 5
CLASSIFIER_PARAMETERS = 4 * 27 + 20 + 5


# MACs and parameters


@pytest.mark.parametrize(
    ("inputs", "call", "weights", "expected"),
    [
        ("4,8,8] x", "Conv<group=4,pads=[1,1,1,1]>(x, w)", {"w": (4, 1, 3, 3)}, 4 * 64 * 9),
        ("4,9,9] x", "Conv<strides=[2,2]>(x, w)", {"w": (6, 4, 3, 3)}, 6 * 16 * 36),
        ("4,5,5] x", "ConvTranspose<strides=[2,2]>(x, w)", {"w": (4, 3, 2, 2)}, 4 * 25 * 12),
        ("7] x", "Gemm(x, w)", {"w": (7, 3)}, 21),
        ("7] x", "Gemm<transB=1>(x, w)", {"w": (3, 7)}, 21),
        ("K] x", "Gemm(x, w)", {"w": (7, 3)}, 21),
        ("K] x", "Gemm<transB=1>(x, w)", {"w": (3, 7)}, 21),
        ("6,7] x", "MatMul(x, w)", {"w": (7, 3)}, 6 * 21),
        ("2,6,7] x, float[N,2,7,5] z", "MatMul(x, z)", {}, 2 * 6 * 5 * 7),
        ("4,8,8] x", "Relu(x)", {}, 0),
    ],
)  # fmt: skip
def test_macs(inputs: str, call: str, weights: dict[str, tuple[int, ...]], expected: int) -> None:
    proto = parse(f"net (float[N,{inputs}) => (float[] y) {{ y = {call} }}")
    assert count_macs(Model.from_proto(with_weights(proto, **weights))) == expected


def test_macs_of_a_product_with_a_transposed_operand() -> None:
    """(7, 6)ᵀ times (7, 3): 18 sums over 7."""
    proto = parse("net (float[7,6] x) => (float[6,3] y) { y = Gemm<transA=1>(x, w) }")
    model = Model.from_proto(with_weights(proto, w=(7, 3)))
    assert node_macs(model.graph.nodes[0], tensor_shapes(model)) == 18 * 7


@pytest.mark.parametrize(
    ("inputs", "call", "weights", "work"),
    [
        ("4,8,8", "QLinearConv<pads=[1,1,1,1]>(x, s, z, w, s, z, s, z, b)", (6, 4, 3, 3), 6 * 64 * 36),
        ("4,8,8", "ConvInteger<pads=[1,1,1,1]>(x, w, z, z)", (6, 4, 3, 3), 6 * 64 * 36),
        ("5,7", "QLinearMatMul(x, s, z, w, s, z, s, z)", (7, 3), 5 * 7 * 3),
        ("5,7", "MatMulInteger(x, w, z, z)", (7, 3), 5 * 7 * 3),
    ],
)
def test_work_and_parameters_of_integer_operators(
    inputs: str, call: str, weights: tuple[int, ...], work: int
) -> None:
    """The bias counts, scales and zero points do not."""
    proto = parse(f"net (uint8[N,{inputs}] x) => (uint8[] y) {{ y = {call} }}")
    arrays: dict[str, np.ndarray] = {"w": np.ones(weights, np.uint8), "b": np.ones(6, np.int32)}
    arrays |= {"s": np.ones((), np.float32), "z": np.zeros((), np.uint8)}
    words = call.replace("(", " ").replace(")", " ").replace(",", " ").split()
    if "Integer" in call:
        proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT32
    for name in set(arrays) & set(words):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(arrays[name], name))
    model = Model.from_proto(proto)
    assert count_macs(model) == work
    assert count_parameters(model) == np.prod(weights) + (6 if "b" in words else 0)


def test_macs_are_for_one_image_whatever_the_fixed_batch() -> None:
    assert count_macs(Model.from_proto(classifier())) == CLASSIFIER_MACS
    assert count_macs(Model.from_proto(classifier(batch="8"))) == CLASSIFIER_MACS


def test_macs_of_an_open_image_size() -> None:
    proto = with_weights(parse("net (float[N,3,H,W] x) => (float[] y) { y = Conv(x, w) }"), w=(4, 3, 3, 3))
    with pytest.raises(ModelError, match=r"dimension 2 of 'y' .* is open"):
        count_macs(Model.from_proto(proto))


def test_parameters() -> None:
    model = Model.from_proto(classifier())
    assert count_parameters(model) == CLASSIFIER_PARAMETERS
    shapes = tensor_shapes(model)
    assert sum(node_macs(n, shapes) for n in model.graph.nodes) == CLASSIFIER_MACS


def test_a_shared_weight_counts_once() -> None:
    proto = with_weights(
        parse("net (float[N,4] x) => (float[N,4] y) { a = MatMul(x, w)  y = MatMul(a, w) }"), w=(4, 4)
    )
    model = Model.from_proto(proto)
    assert count_parameters(model) == 16


def test_weights_in_constant_nodes_and_quantized_weights_count() -> None:
    constant = parse("""
        net (float[N,2] x) => (float[N,2] y)
        { w = Constant<value=float[2,2] {1,2,3,4}>()  y = MatMul(x, w) }
    """)
    assert count_parameters(Model.from_proto(constant)) == 4
    quantized = parse("""
        net (float[N,2] x) => (float[N,2] y)
        <int8[2,2] q = {1,2,3,4}, float[2] s = {1,1}, int8[2] z = {0,0}>
        { w = DequantizeLinear<axis=1>(q, s, z)  y = MatMul(x, w) }
    """)
    assert count_parameters(Model.from_proto(quantized)) == 4


def test_shapes_scales_and_limits_are_no_parameters() -> None:
    proto = parse("""
        net (float[N,4] x) => (float[N,2,2] y)
        <int64[3] s = {0,2,2}, float low = {0}, float high = {6}>
        { c = Clip(x, low, high)  m = Mul(c, high)  y = Reshape(m, s) }
    """)
    assert count_parameters(Model.from_proto(proto)) == 0


# comparing


def test_a_model_and_itself() -> None:
    found = compare(classifier(), classifier(), runs=3, threads=1)
    assert (found.difference.max_abs, found.agreement) == (0, 1)
    assert (found.a.macs, found.a.parameters) == (CLASSIFIER_MACS, CLASSIFIER_PARAMETERS)
    assert found.a.name != found.b.name
    assert found.inputs == "32 random inputs, N(0, 1)"
    values = json.loads(json.dumps(found.as_dict()))
    assert "samples_ms" not in values["a"]["timing"]


@pytest.mark.slow
def test_what_is_asked_for_reaches_timing_and_random_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def benchmark(models: Mapping[str, Any], **options: Any) -> dict[str, Timing]:
        seen.append(options)
        return {name: Timing(name, 1, 1, 1, 1, 1, 3, 1, 1, "cpu", (1.0, 1.0, 1.0)) for name in models}

    monkeypatch.setattr(comparing, "benchmark", benchmark)
    asked: dict[str, Any] = {"provider": "cpu", "batch": 2, "threads": 1, "runs": 3, "seconds": 2.0}
    found = [
        compare(classifier(4), classifier(6), **asked, tolerance=0.05, seed=seed).difference.max_abs
        for seed in (3, 3, 4)
    ]
    assert found[0] == found[1] != found[2]
    for name, value in (asked | {"tolerance": 0.05, "seed": 3}).items():
        assert seen[0][name] == value


def test_outputs_are_compared_on_different_images() -> None:
    """The difference is that of the image on which it is largest: the last of three."""
    x = np.zeros((3, 8, 8, 3), np.uint8)
    x[2] = 255
    images = ImageSet(x, None, ("",) * 3, Preprocess())
    mean = "ReduceMean<axes=[2,3],keepdims=0>(x)"
    own = parse(f"net (float[N,3,8,8] x) => (float[N,3] y) {{ y = {mean} }}")
    other = parse(f"""
        net (float[N,3,8,8] x) => (float[N,3] y) <float two = {{2}}> {{ m = {mean} y = Mul(m, two) }}
    """)
    assert compare(own, other, images=images, runs=3, threads=1).difference.max_abs == pytest.approx(1)


def test_two_models_on_labelled_images() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (10, 8, 8, 3)).astype(np.uint8)
    images = ImageSet(x, rng.integers(0, 5, 10), tuple("abcdefghij"), Preprocess())
    found = compare(classifier(4), classifier(6), images=images, runs=3, threads=1)
    assert found.difference.max_abs > 0
    assert found.agreement is not None
    assert 0 <= found.agreement <= 1
    assert found.a.top1 is not None
    assert found.inputs == "10 images"
    fixed = compare(classifier(), classifier(batch="4"), images=images, runs=3, threads=1, batch=4)
    assert fixed.difference.max_abs == pytest.approx(0, abs=1e-5)
    assert fixed.agreement == 1


def one_image_at_a_time() -> onnx.ModelProto:
    """The classifier, with an open batch and the batch of 1 that its Reshape holds."""
    proto = classifier()
    flatten = proto.graph.node[3]
    flatten.op_type = "Reshape"
    flatten.input.append("shape")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 4]), "shape"))
    return proto


@pytest.mark.parametrize("labelled", [True, False])
def test_an_open_batch_of_which_only_one_image_runs(labelled: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (10, 8, 8, 3)).astype(np.uint8)
    images = ImageSet(x, rng.integers(0, 5, 10), tuple("abcdefghij"), Preprocess()) if labelled else None
    found = compare(classifier(), one_image_at_a_time(), images=images, runs=3, threads=1)
    assert found.agreement == 1
    assert found.difference.max_abs == pytest.approx(0, abs=1e-5)


def test_inputs_of_other_names_go_by_order() -> None:
    renamed = classifier()
    renamed.graph.input[0].name = "image"
    renamed.graph.node[0].input[0] = "image"
    assert compare(classifier(), renamed, runs=3, threads=1).difference.max_abs == 0


def test_outputs_of_another_form() -> None:
    other = parse("net (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match=r"shapes .* differ"):
        compare(classifier(), other, runs=3)


def test_inputs_of_another_form() -> None:
    other = parse("net (float[N,3,9,9] x) => (float[N,5] y) { y = ReduceMean<axes=[2,3],keepdims=0>(x) }")
    with pytest.raises(ModelError, match=r"input 'x' takes Nx3x9x9, the other model's 32x3x8x8"):
        compare(classifier(), other, runs=3)


def test_bytes_count_external_data(tmp_path: Path) -> None:
    proto = classifier(64)
    whole = len(proto.SerializeToString())
    assert model_bytes(proto) == model_bytes(proto.SerializeToString()) == whole
    path = tmp_path / "net.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="net.data", size_threshold=0)
    files = (tmp_path / "net.data").stat().st_size + path.stat().st_size
    assert model_bytes(path) == files
    with pytest.raises(ModelError, match="no such file"):
        model_bytes(tmp_path / "none.onnx")


# the commands


@pytest.mark.parametrize("text", ["x", "x=", "=1x2", "x=1xa", "x=0x2", "1x2,x=1x2"])
def test_bad_shapes(text: str) -> None:
    with pytest.raises(OptionError, match=r"expected NAME=DIMS|needs the input's name"):
        parse_input_shapes(text)


def test_shape_with_an_equals_sign_in_the_name() -> None:
    assert parse_input_shapes("a=b=1x3") == {"a=b": (1, 3)}


@pytest.mark.slow
def test_compare_command(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.onnx", "b.onnx")]
    for path, width in zip(paths, (4, 2), strict=True):
        onnx.save(classifier(width), path)
    options = ["--runs", "3", "--threads", "1", "--provider", "cpu"]
    result = CliRunner().invoke(compare_command, [*paths, *options, "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["b"]["parameters"] < found["a"]["parameters"] == CLASSIFIER_PARAMETERS
    assert result.stderr == ""
    table = CliRunner().invoke(compare_command, [*paths, *options], catch_exceptions=False)
    assert "top-1 agreement" in table.stdout


@pytest.mark.slow
def test_benchmark_command(tmp_path: Path) -> None:
    path = str(tmp_path / "a.onnx")
    onnx.save(classifier(), path)
    options = ["--runs", "3", "--threads", "1", "--provider", "cpu", "--batch", "2"]
    result = CliRunner().invoke(benchmark_command, [path, path, *options, "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert [one["batch"] for one in found["models"]] == [2, 2]
    assert len(found["ratios_to_first"]) == 1
    table = CliRunner().invoke(benchmark_command, [path, *options], catch_exceptions=False)
    assert "CPUExecutionProvider" in table.stdout
