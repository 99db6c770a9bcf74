"""The executor on small graphs and real networks, against onnxruntime without its graph optimizations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import Tensor

from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.executor.executor import ExecutionError, UnsupportedOp
from onnxcompress.optimize.executor.ops import supported_ops, unsupported
from tests.helpers.paths import MODELS

NETWORKS = sorted(MODELS.glob("*-fashion.onnx"))

RESIDUAL = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,5] y) <
        float[4,3,3,3] w1, float[4] b1, float[4] scale, float[4] bias, float[4] mean, float[4] var,
        float[4,4,3,3] w2, float[5,4] w3, float[5] b3 >
    {
        a = Conv<pads=[1,1,1,1]>(x, w1, b1)
        n = BatchNormalization<epsilon=0.001>(a, scale, bias, mean, var)
        r = Relu(n)
        c = Conv<pads=[1,1,1,1]>(r, w2)
        s = Add(c, r)
        p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(s)
        g = GlobalAveragePool(p)
        f = Flatten(g)
        y = Gemm<transB=1>(f, w3, b3)
    }
"""


def model(text: str, seed: int = 0) -> onnx.ModelProto:
    """Parse, and give each value that nothing computes and that is no input a random initializer."""
    proto = onnx.parser.parse_model(text)
    graph, rng = proto.graph, np.random.default_rng(seed)
    computed = {name for node in graph.node for name in node.output}
    given = {tensor.name for tensor in graph.initializer}
    for info in graph.value_info:
        if info.name not in computed | given:
            shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
            values = rng.uniform(0.5, 1.5, shape) if info.name == "var" else rng.normal(0, 0.5, shape)
            graph.initializer.append(
                onnx.numpy_helper.from_array(np.asarray(values, np.float32), info.name)
            )
    return proto


def executor(proto: onnx.ModelProto, **options: Any) -> Executor:
    return Executor(gs.import_onnx(proto), **options)


def runtime(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def images(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- real networks ---


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
def test_networks_agree_with_onnxruntime(path: Path) -> None:
    proto = onnx.load(path)
    entry = proto.graph.input[0]
    shape = [d.dim_value or 3 for d in entry.type.tensor_type.shape.dim]
    x = images(*shape)
    names = [output.name for output in proto.graph.output]
    found = executor(proto).run({entry.name: torch.from_numpy(x)}, names)
    for name, expected in zip(names, runtime(proto, {entry.name: x}), strict=True):
        assert np.abs(found[name].numpy() - expected).max() <= 5e-6 * np.abs(expected).max()


# --- what run and needed promise ---


def test_a_prefix_can_be_fed_and_only_the_rest_runs() -> None:
    net = executor(model(RESIDUAL))
    x = torch.from_numpy(images(2, 3, 8, 8))
    whole = net.run({"x": x}, ["y", "r"])
    rest = net.run({"r": whole["r"]}, ["y"])
    assert torch.equal(rest["y"], whole["y"])
    ops = [node.op for node in net.needed(["r"], ["y"])]
    assert ops == ["Conv", "Add", "AveragePool", "GlobalAveragePool", "Flatten", "Gemm"]


def test_any_tensor_can_be_asked_for() -> None:
    net = executor(model(RESIDUAL))
    x = torch.from_numpy(images(2, 3, 8, 8))
    assert [node.op for node in net.needed(["x"], ["n"])] == ["Conv", "BatchNormalization"]
    found = net.run({"x": x}, ["n", "x", "w2"])
    assert found["x"] is x
    assert torch.equal(found["w2"], net.parameters["w2"])
    assert torch.equal(found["n"].relu(), net.run({"x": x}, ["r"])["r"])


def test_parameters_are_the_float_initializers_and_can_be_replaced() -> None:
    net = executor(model(RESIDUAL))
    assert set(net.parameters) == {"w1", "b1", "scale", "bias", "mean", "var", "w2", "w3", "b3"}
    assert not any(p.requires_grad for p in net.parameters.values())
    x = torch.from_numpy(images(2, 3, 8, 8))
    before = net.run({"x": x}, ["y"])["y"]
    moved = net.run({"x": x}, ["y"], {"b3": net.parameters["b3"] + 1})["y"]
    torch.testing.assert_close(moved, before + 1)
    assert torch.equal(net.run({"x": x}, ["y"])["y"], before)


def test_gradients_are_those_of_finite_differences() -> None:
    net = executor(model(RESIDUAL), dtype=torch.float64)
    x = torch.from_numpy(images(2, 3, 8, 8)).double().requires_grad_()
    names = sorted(net.parameters)
    values = [net.parameters[name].clone().requires_grad_() for name in names]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return net.run({"x": x}, ["y"], dict(zip(names, values, strict=True)))["y"]

    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True)


POOLS = """
    <ir_version: 8, opset_import: ["" : 19]>
    pools (float[2,4,9,7] x) => (float[a,b,c,d] y, float[e,f,g,h] z, float[i,j,k,l] t) <
        float[4,3,3,2] w >
    {
        y = MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1, pads=[0,1,2,0]>(x)
        z = AveragePool<kernel_shape=[3,2], strides=[2,1], pads=[1,0,0,1], dilations=[1,2]>(x)
        t = ConvTranspose<strides=[2,2], pads=[0,1,1,0], output_padding=[1,0]>(x, w)
    }
"""


def test_gradients_through_asymmetric_pools_and_transposed_convolutions() -> None:
    net = executor(model(POOLS), dtype=torch.float64)
    x = torch.from_numpy(images(2, 4, 9, 7)).double().requires_grad_()
    w = net.parameters["w"].clone().requires_grad_()

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return tuple(net.run({"x": x}, ["y", "z", "t"], {"w": w}).values())

    assert torch.autograd.gradcheck(function, (x, w), fast_mode=True)


def test_bfloat16_holds_everywhere() -> None:
    proto = model(RESIDUAL)
    net, exact = executor(proto, dtype=torch.bfloat16), executor(proto)
    assert {p.dtype for p in net.parameters.values()} == {torch.bfloat16}
    x = torch.from_numpy(images(2, 3, 8, 8))
    found = net.run({"x": x}, ["y", "n"])
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    torch.testing.assert_close(found["y"].float(), exact.run({"x": x}, ["y"])["y"], rtol=0.05, atol=0.05)


def test_autocast_leaves_parameters_in_float32() -> None:
    net = executor(model(RESIDUAL))
    x = torch.from_numpy(images(2, 3, 8, 8))
    exact = net.run({"x": x}, ["y"])["y"]
    w = net.parameters["w1"].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = net.run({"x": x}, ["y", "a"], {"w1": w})
        fed = net.run({"a": found["a"]}, ["y"])["y"]
    assert found["a"].dtype == torch.bfloat16
    assert torch.equal(fed, found["y"])
    torch.testing.assert_close(found["y"].float(), exact, rtol=0.05, atol=0.05)
    found["y"].float().sum().backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None
    assert w.grad.dtype == torch.float32


def test_channels_last_is_kept_and_changes_nothing() -> None:
    net = executor(model(RESIDUAL))
    x = torch.from_numpy(images(2, 3, 8, 8))
    plain = net.run({"x": x}, ["y", "s"])
    found = net.run({"x": x.to(memory_format=torch.channels_last)}, ["y", "s"])
    assert found["s"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found["y"], plain["y"], rtol=1e-5, atol=1e-6)


SHAPES = """
    <ir_version: 8, opset_import: ["" : 17]>
    chain (float[N,C,H,W] x) => (float[a,b,c,d] y) <
        int64[4] dims = {2, 2, 1, 1}, int64[1] zero = {0}, int64[1] one = {1}, int64[2] tail = {1, -1},
        int64[1] two = {2}, int64[1] four = {4}, float scale = {257.0} >
    {
        k = Constant<value = int64[4] {0, 0, 0, 1}>()
        m = Mul(k, dims)
        pads = Concat<axis=0>(zero, zero, zero, zero, m)
        p = Pad(x, pads)
        s = Shape(p)
        hw = Slice(s, two, four, zero)
        f = Cast<to=1>(hw)
        big = Mul(f, scale)
        small = Div(big, scale)
        size = Cast<to=7>(small)
        nc = Slice(s, zero, two, zero)
        n = Slice(nc, zero, one, zero)
        shape = Concat<axis=0>(n, tail, size)
        r = Reshape(p, shape)
        y = Squeeze(r, one)
    }
"""


def test_constants_are_computed_once_and_shapes_exactly() -> None:
    """257 and its products do not exist in bfloat16, but shape arithmetic keeps the model's types."""
    proto = model(SHAPES)
    x = images(2, 3, 5, 6)
    expected = runtime(proto, {"x": x})[0]
    net = executor(proto)
    assert torch.equal(net.run({"x": torch.from_numpy(x)}, ["y"])["y"], torch.from_numpy(expected))
    low = executor(proto, dtype=torch.bfloat16).run({"x": torch.from_numpy(x)}, ["y", "size"])
    assert low["y"].shape == expected.shape
    assert low["size"].tolist() == [5, 7]
    names = {node.outputs[0].name for node in net.needed(["x"], ["y"])}
    assert names.isdisjoint({"k", "m", "pads"})
    for rows in (2, 4):  # the same plan serves any size
        found = net.run({"x": torch.from_numpy(images(rows, 3, 4, 4))}, ["y"])["y"]
        assert found.shape == (rows, 3, 4, 5)


def test_shape_arithmetic_does_not_read_the_device() -> None:
    """The meta device has no values to read: what runs there makes no accelerator wait, either."""
    net = executor(model(SHAPES), device="meta")
    found = net.run({"x": torch.from_numpy(images(2, 3, 5, 6))}, ["y", "size"])
    assert found["y"].device.type == "meta"
    assert found["y"].shape == (2, 3, 5, 7)
    assert found["size"].device.type == "cpu"


def test_shapes_of_weights_are_constants() -> None:
    """torch's dynamo exporter leaves a zero bias at each Conv, computed from the weight's shape."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N,3,8,8] x) => (float[N,4,6,6] y) <float[4,3,3,3] w>
        { s = Shape<start=0, end=1>(w)  b = ConstantOfShape(s)  y = Conv(x, w, b) }
    """
    net = executor(model(text))
    x = torch.from_numpy(images(1, 3, 8, 8))
    assert [node.op for node in net.needed(["x"], ["y"])] == ["Conv"]
    assert net.run({"x": x}, ["y"], {"w": net.parameters["w"] * 2})["y"].shape == (1, 4, 6, 6)
    with pytest.raises(ExecutionError, match=r"'w': shape \(5, 3, 3, 3\) cannot replace \(4, 3, 3, 3\)"):
        net.run({"x": x}, ["y"], {"w": torch.ones(5, 3, 3, 3)})


def test_a_constant_can_be_fed_or_replaced() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        scaled (float[2] x) => (float[2] y) < float gain = {2.0} >
        { g = Neg(gain)  y = Mul(x, g) }
    """
    net = executor(model(text))
    x, gain = torch.tensor([1.0, 3.0]), torch.tensor(5.0, requires_grad=True)
    assert net.run({"x": x}, ["y"])["y"].tolist() == [-2, -6]
    y = net.run({"x": x}, ["y"], {"gain": gain})["y"]
    assert y.tolist() == [-5, -15]
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert gain.grad is not None
    assert gain.grad.item() == -4
    assert net.run({"x": x, "g": torch.tensor(1.0)}, ["y"])["y"].tolist() == [1, 3]
    assert net.run({"x": x}, ["y"])["y"].tolist() == [-2, -6]


def test_planning_under_inference_mode_spoils_no_later_gradient() -> None:
    proto = model(RESIDUAL)
    x = torch.from_numpy(images(2, 3, 8, 8))
    with torch.inference_mode():
        net = executor(proto)
        net.run({"x": x}, ["y"])
    w = net.parameters["w2"].clone().requires_grad_()
    net.run({"x": x}, ["y"], {"w2": w})["y"].sum().backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None


def test_later_edits_of_the_graph_do_not_reach_the_executor() -> None:
    graph = gs.import_onnx(model(RESIDUAL))
    net = Executor(graph)
    x = torch.from_numpy(images(1, 3, 8, 8))
    graph.nodes[2].inputs[0] = graph.nodes[0].outputs[0]
    graph.nodes[0].attrs["pads"] = [0, 0, 0, 0]
    assert net.run({"x": x}, ["s"])["s"].shape == (1, 4, 8, 8)


def test_tensors_are_let_go_after_their_last_use() -> None:
    body = "a0 = Neg(x)" + "".join(f"  a{i} = Neg(a{i - 1})" for i in range(1, 50)) + "  y = Add(a49, a10)"
    text = f'<ir_version: 8, opset_import: ["" : 17]> chain (float[2] x) => (float[2] y) {{ {body} }}'
    plan = executor(model(text))._plan(["x"], ["y"])
    alive = {slot for _, slot, _ in plan.fed}
    most = 0
    for step in plan.steps:
        alive.update(step.outputs)
        most = max(most, len(alive))
        alive.difference_update(step.free)
    assert most == 3  # an argument, its result, and a10
    assert alive == {slot for _, slot in plan.outputs}


# --- refusals ---


def test_an_unknown_operator_is_named() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17, "com.acme" : 1]>
        odd (float[2] x) => (float[2] y) { a = Relu(x)  y = com.acme.Frob(a) }
    """
    proto = model(text)
    proto.graph.node[1].name = "frobnicate"
    net = executor(proto)
    assert torch.equal(net.run({"x": torch.ones(2)}, ["a"])["a"], torch.ones(2))
    with pytest.raises(UnsupportedOp, match=r"'frobnicate': Frob \(domain 'com.acme', opset 17\)"):
        net.run({"x": torch.ones(2)}, ["y"])
    assert [line.split(":")[0] for line in unsupported(gs.import_onnx(proto))] == ["node 'frobnicate'"]
    assert {"Conv", "LayerNormalization", "QuantizeLinear"} <= supported_ops()
    assert supported_ops().isdisjoint({"If", "Loop", "Scan", "LSTM", "SequenceInsert"})


def test_training_mode_is_refused() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[2,3] x, float[3] s) => (float[2,3] y)
        { y, m, v = BatchNormalization<training_mode=1>(x, s, s, s, s) }
    """
    with pytest.raises(UnsupportedOp, match="training mode"):
        executor(model(text)).run({"x": torch.ones(2, 3), "s": torch.ones(3)}, ["y"])


@pytest.mark.parametrize(
    ("feeds", "outputs", "message"),
    [
        ({}, ["y"], "tensor 'x' has no value"),
        ({"x": (1, 3, 8, 8)}, ["nowhere"], "no tensor of the graph is named 'nowhere'"),
        ({"x": (1, 3, 8, 8), "typo": (1,)}, ["y"], "no tensor of the graph is named 'typo'"),
        ({"x": (1, 2, 8, 8)}, ["y"], r"node 'a' \(Conv\).*\(1, 2, 8, 8\)"),
    ],
)
def test_wrong_feeds_are_told_in_one_line(
    feeds: dict[str, tuple[int, ...]], outputs: list[str], message: str
) -> None:
    net = executor(model(RESIDUAL))
    with pytest.raises(ExecutionError, match=message) as caught:
        net.run({name: torch.ones(shape) for name, shape in feeds.items()}, outputs)
    assert "\n" not in str(caught.value)
