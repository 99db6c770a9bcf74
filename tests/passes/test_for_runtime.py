"""quantize --for: what each runtime fuses and accepts; int8 over float16 by the rules of strong typing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.errors import CompressWarning, OptionError
from onnxcompress.model import Model, load
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.fp16.figures import ProviderRun
from onnxcompress.passes.quantize import Quantize
from onnxcompress.pipeline.recipe import parse_recipe
from onnxcompress.quantization.ort_fusion import fused_counts
from onnxcompress.quantization.runtimes import RULES
from onnxcompress.runtime.inference import random_feeds, run
from tests.helpers.folding import graph, weight
from tests.helpers.strong_typing import violations

FEW: dict[str, Any] = {"synthetic": 16, "inputs": "procedural", "effort": "fast"}
NETWORKS = ["resnet20-fashion", "mobilenetv2-fashion"]


def residual() -> Model:
    """Residual sums, a depthwise convolution, pools, a concatenation, a gate and a classifier."""
    body = """a = Conv<pads = [1,1,1,1]>(x, w0, b0) ra = Relu(a) b = Conv<pads = [1,1,1,1]>(ra, w1, b1)
        s = Add(b, ra) rs = Relu(s) c = Conv(rs, w2) d = Conv<group = 8>(rs, w3) t = Add(c, d)
        m = MaxPool<kernel_shape = [2,2], strides = [2,2]>(t) k = Concat<axis = 1>(m, m) q = Sigmoid(k)
        u = Mul(k, q) p = GlobalAveragePool(u) f = Flatten(p) y = Gemm(f, w4, b4)"""
    arrays = {
        "w0": weight(8, 3, 3, 3), "b0": weight(8), "w1": weight(8, 8, 3, 3, seed=1), "b1": weight(8),
        "w2": weight(8, 8, 1, 1, seed=2), "w3": weight(8, 1, 1, 1, seed=3), "w4": weight(16, 5, seed=4),
        "b4": weight(5),
    }  # fmt: skip
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,5] y)", body, arrays))


def quantizers(model: Model) -> dict[str, onnx.NodeProto]:
    return {n.input[0]: n for n in model.to_proto().graph.node if n.op_type == "QuantizeLinear"}


def integers(proto: onnx.ModelProto) -> list[bytes]:
    """The int8 constants."""
    kept = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    return [onnx.numpy_helper.to_array(t).tobytes() for t in kept]


@pytest.mark.parametrize("runtime", RULES)
def test_a_file_for_each_runtime_is_valid_and_near_the_original(runtime: Any) -> None:
    model = residual()
    before = model.copy()
    Quantize(for_runtime=runtime, **FEW).apply(model)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    feeds = random_feeds(before, batch=16)
    was, now = (run(one, feeds)["y"] for one in (before, model))
    assert 10 * np.log10(was.var() / np.square(was - now).mean()) > 20


def test_for_cpu_is_what_is_written_anyway() -> None:
    plain, chosen = residual(), residual()
    Quantize(**FEW).apply(plain)
    Quantize(for_runtime="cpu", **FEW).apply(chosen)
    assert plain.to_proto() == chosen.to_proto()
    assert fused_counts(chosen).in_float == {}


def test_for_cuda_activations_stay_floats() -> None:
    model = residual()
    pass_ = Quantize(for_runtime="cuda", **FEW)
    pass_.apply(model)
    assert not quantizers(model)
    assert "weights alone" in pass_.no_gain_on("cpu", 1)
    Quantize(for_runtime="cuda", activation_bits=4, **FEW).apply(given := residual())
    assert quantizers(given)  # what is said counts more


def test_for_qnn_all_operators_are_quantized_and_only_convolutions_by_channel() -> None:
    model = residual()
    Quantize(for_runtime="qnn", activation_bits=16, **FEW).apply(model)
    scales = {t.name: t.values for t in model.graph.tensors().values() if t.name.endswith("_scale")}
    assert scales["w0_scale"].shape == (8,)
    assert scales["w4_scale"].shape == ()
    read = [i for n in model.graph.nodes if n.op in ("Sigmoid", "Mul", "Add") for i in n.inputs]
    assert all(t.inputs and t.inputs[0].op == "DequantizeLinear" for t in read)


def test_for_tensorrt_quantizers_stand_where_it_fuses_them() -> None:
    model = residual()
    Quantize(for_runtime="tensorrt", **FEW).apply(model)
    proto = model.to_proto()
    assert violations(proto) == []
    made = {o: n.op_type for n in proto.graph.node for o in n.output}
    sums = [[made[i] for i in n.input] for n in proto.graph.node if n.op_type == "Add"]
    assert sums == [["Conv", "DequantizeLinear"], ["DequantizeLinear", "Conv"]]
    gates = [n for n in proto.graph.node if n.op_type in ("Sigmoid", "Mul")]
    assert not any(made.get(i) == "DequantizeLinear" for n in gates for i in n.input)
    assert not any(n.op_type == "Clip" for n in proto.graph.node)  # symmetric: the whole type is used
    assert {t.data_type for t in proto.graph.initializer if "bias" in t.name} <= {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("name", ["residual", *(pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS)])
def test_int8_over_float16_in_one_file(name: str, models: Path) -> None:
    model = residual() if name == "residual" else load(models / f"{name}.onnx")
    Quantize(for_runtime="tensorrt", **FEW).apply(model)
    before = model.copy()
    result = HalfPrecision(provider="cpu", threads=1).apply(model)
    proto = model.to_proto()
    assert violations(proto) == []
    floats = {t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    assert not floats  # no constant is float32
    assert sum(n.op_type == "Cast" for n in proto.graph.node) == 2  # at the ends
    opset = next(o.version for o in proto.opset_import if not o.domain)
    assert opset >= 19
    weights = {
        t.name: t for t in before.to_proto().graph.initializer if t.data_type == onnx.TensorProto.INT8
    }
    assert {
        t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8
    } == weights.keys()
    feeds = random_feeds(before, batch=16)
    (was, now) = (next(iter(run(one, feeds).values())) for one in (before, model))
    assert 10 * np.log10(was.var() / np.square(was - now).mean()) > 20
    assert result.modified
    assert not HalfPrecision().apply(model).modified


def test_for_tensorrt_no_layer_reads_floats_with_an_integer_weight() -> None:
    """Where others leave tensors in floats whose quantization costs an output most."""
    assert not Quantize(for_runtime="tensorrt").resolved().float_tensors
    assert Quantize(for_runtime="openvino").resolved().float_tensors


def test_what_breaks_the_rules_is_found() -> None:
    """The checker itself: a file for the CPU breaks most rules, float32 scales in half precision one."""
    model = residual()
    Quantize(**FEW).apply(model)
    broken = " ".join(violations(model.to_proto()))
    for words in ("not int8", "zero point", "bias is computed", "both inputs of a sum"):
        assert words in broken
    HalfPrecision(provider="cpu", threads=1, exclude=("op:DequantizeLinear", "op:Conv")).apply(model)
    assert "a Cast" in " ".join(violations(model.to_proto()))


def test_biases_of_a_cpu_file_become_floats_in_half_precision() -> None:
    model = residual()
    Quantize(**FEW).apply(model)
    before = model.copy()
    HalfPrecision(provider="cpu", threads=1).apply(model)
    int32 = [t for t in model.to_proto().graph.initializer if t.data_type == onnx.TensorProto.INT32]
    assert not int32
    feeds = random_feeds(before, batch=8)
    was, now = (run(one, feeds)["y"] for one in (before, model))
    assert np.abs(was - now).max() < 0.2 * was.std()


def test_an_optimizer_that_computes_something_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = residual()
    Quantize(for_runtime="tensorrt", **FEW).apply(model)
    monkeypatch.setattr(HalfPrecision, "_runtime", lambda *_: ProviderRun("cpu", 2.0))
    with pytest.warns(CompressWarning, match=r"error 200 %\).*WeightBiasQuantization"):
        HalfPrecision(provider="cpu", threads=1).apply(model)


def test_options_and_recipes_name_the_runtime() -> None:
    (pass_,) = parse_recipe("passes: [{quantize: {for_runtime: tensorrt}}]").passes
    assert isinstance(pass_, Quantize)
    assert pass_.resolved().symmetric
    assert pass_.options()["for_runtime"] == "tensorrt"
    with pytest.raises(OptionError, match="for_runtime"):
        parse_recipe("passes: [{quantize: {for_runtime: tensorflow}}]")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation_bits": 0}, "reads no 8-bit weights beside floats"),
        ({"activation_bits": 0, "weight_bits": 4}, "reads no 8-bit weights beside floats"),
        ({"weight_bits": 4, "small_types": True}, "reads no 4-bit weights beside 8-bit activations"),
        ({"size_budget": 0.1, "small_types": True}, "reads no 4-bit weights beside 8-bit activations"),
        ({"weight_type": "uint8"}, "reads int8 alone"),
    ],
)
def test_pairs_of_types_without_kernels_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        Quantize(for_runtime="tensorrt", **options).check()
    Quantize(for_runtime="openvino", **options).check()


def test_four_bit_weights_beside_floats_are_what_it_reads() -> None:
    Quantize(for_runtime="tensorrt", activation_bits=0, weight_bits=4, small_types=True).check()


def test_the_remedy_for_only_faster_is_one_that_exists() -> None:
    with pytest.raises(OptionError, match="has no kernels for 8-bit activations; leave it out, or --for"):
        Quantize(for_runtime="cuda", only_faster=True).check()
