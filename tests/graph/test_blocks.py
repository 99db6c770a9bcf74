"""Which blocks are found, which are not and why, and that each one offered can really be dropped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from onnxcompress.errors import OptionError
from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import Discovery, find_blocks
from onnxcompress.graph.edit import lift_weights
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model, load
from tests.helpers import zoo
from tests.helpers.paths import RESIDUAL


def parse(body: str) -> Model:
    """A model with the weights of `parse_proto`."""
    return Model.from_proto(parse_proto(body))


def parse_proto(body: str) -> onnx.ModelProto:
    """A model with 3×3 weights w and v (4 → 4 channels) and dw (1×1, depthwise)."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,4,8,8] x) => (float[N,4,8,8] y) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in {"w": (4, 4, 3, 3), "v": (4, 4, 3, 3), "dw": (4, 1, 1, 1)}.items():
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


CONV = "<pads = [1, 1, 1, 1]>"


def names(found: Discovery) -> list[tuple[str, str]]:
    return [(b.kind, b.exit) for b in found.blocks]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        pytest.param(
            f"a = Conv{CONV}(x, w) b = Conv{CONV}(x, v) y = Add(a, b)", "projection", id="projection"
        ),
        pytest.param(
            f"h = Relu(x) a = Conv{CONV}(h, w) s = Add(a, h) y = Mul(s, a)", "also read by Mul", id="read"
        ),
        pytest.param(
            "h = Relu(x) a = Sigmoid(h) s = Add(a, h) y = Relu(s)", "no layer with weights", id="weights"
        ),
        pytest.param(f"h = Relu(x) a = Conv{CONV}(h, w) y = Add(a, h)", "output of the graph", id="output"),
    ],
)
def test_a_near_miss_says_why(body: str, why: str) -> None:
    found = find_blocks(parse(body))
    assert not found.blocks
    assert why in " ".join(str(r) for r in found.near_misses)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("s = Add(x, x) y = Relu(s)", id="doubling"),
        pytest.param("y = Relu(x)", id="nothing"),
        pytest.param("a = Conv<group = 4>(x, dw) y = Relu(a)", id="depthwise on the trunk"),
        pytest.param(
            f"a = Conv{CONV}(x, w) s = GlobalAveragePool(a) t = Sigmoid(s) m = Mul(a, t) y = Relu(m)",
            id="gate",
        ),
    ],
)
def test_what_is_no_residual_is_not_offered(body: str) -> None:
    assert "residual" not in {b.kind for b in find_blocks(parse(body)).blocks}


def test_the_order_of_the_add_does_not_matter() -> None:
    for add in ("Add(a, h)", "Add(h, a)"):
        model = parse(f"h = Relu(x) a = Conv{CONV}(h, w) s = {add} y = Relu(s)")
        assert names(find_blocks(model)) == [("residual", "s")]


def test_a_projection_stays_when_its_branch_goes() -> None:
    """Whichever input of the Add it is, and whatever it is made of, as long as the branch is deeper."""
    branch = f"a = Conv{CONV}(h, w) b = Relu(a) c = Conv{CONV}(b, v)"
    for shortcut, left in (("p = Conv(h, o)", "Conv"), ("p = Neg(h)", "Neg")):
        for add in ("Add(c, p)", "Add(p, c)"):
            proto = parse_proto(f"h = Relu(x) {shortcut} {branch} s = {add} y = Relu(s)")
            proto.graph.initializer.append(
                onnx.numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32), "o")
            )
            model = Model.from_proto(proto)
            found = find_blocks(model)
            assert names(found) == [("projection", "s")]
            assert found["s"].macs == 2 * 4 * 4 * 9 * 64  # of the branch
            assert drop_blocks(model, ["s"]) == {"s": "p"}
            assert [n.op for n in model.graph.nodes] == ["Relu", left, "Relu"]
            onnx.checker.check_model(model.to_proto(), full_check=True)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            f"a = Conv{CONV}(h, w) b = Conv{CONV}(a, v) p = Conv{CONV}(h, w) q = Conv{CONV}(p, v) "
            "s = Add(b, q)",
            id="two branches",
        ),
        pytest.param(
            f"g = Conv{CONV}(h, w) a = Conv{CONV}(g, w) b = Conv{CONV}(a, v) p = Relu(g) t = Add(b, p) "
            "u = Sigmoid(h) s = Mul(t, u)",
            id="off the trunk",
        ),
    ],
)
def test_other_sums_have_no_projection(body: str) -> None:
    found = find_blocks(parse(f"h = Relu(x) {body} y = Relu(s)"))
    assert "projection" not in {block.kind for block in found.blocks}
    assert any("projection" in str(miss) for miss in found.near_misses)


def test_nested_residuals_are_both_offered() -> None:
    model = parse(
        f"h = Relu(x) a = Conv{CONV}(h, w) i = Conv{CONV}(a, v) b = Add(a, i) s = Add(b, h) y = Relu(s)"
    )
    assert names(find_blocks(model)) == [("residual", "b"), ("residual", "s")]


def test_an_idempotent_activation_goes_with_its_block() -> None:
    model = parse(f"h = Relu(x) a = Conv{CONV}(h, w) s = Add(a, h) r = Relu(s) y = Conv{CONV}(r, v)")
    drop_blocks(model, ["s"])
    assert [n.op for n in model.graph.nodes] == ["Relu", "Conv"]


def test_an_activation_that_does_something_stays() -> None:
    model = parse(f"h = Sigmoid(x) a = Conv{CONV}(h, w) s = Add(a, h) r = Relu(s) y = Conv{CONV}(r, v)")
    drop_blocks(model, ["s"])
    assert [n.op for n in model.graph.nodes] == ["Sigmoid", "Relu", "Conv"]


def with_body(body: str, read: str) -> Model:
    """The body's model, whose output `q` goes through an If that reads the tensor `read`."""
    model = parse(f"{body} c = Constant<value = bool {{1}}>() h0 = Relu(q) y = Relu(h0)").to_proto()
    branch = onnx.parser.parse_graph(f"b () => (float[N,4,8,8] z) {{ z = Relu({read}) }}")
    model.graph.node[-1].CopyFrom(
        onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    )
    return Model.from_proto(model)


def test_a_block_that_a_body_reads_is_none() -> None:
    found = find_blocks(with_body(f"h = Relu(x) a = Conv{CONV}(h, w) s = Add(a, h) q = Relu(s)", "s"))
    assert not found.blocks
    assert "inside the body" in str(found.near_misses[0])


def test_an_activation_that_a_body_reads_stays() -> None:
    model = with_body(f"h = Relu(x) a = Conv{CONV}(h, w) s = Add(a, h) q = Relu(s)", "q")
    assert drop_blocks(model, ["s"]) == {"s": "h"}
    onnx.checker.check_model(model.to_proto(), full_check=True)


def test_an_open_image_size_is_a_near_miss() -> None:
    proto = parse(f"h = Relu(x) a = Conv{CONV}(h, w) s = Add(a, h) y = Relu(s)").to_proto()
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.shape.dim[2].dim_param = "H"
    found = find_blocks(Model.from_proto(proto))
    assert not found.blocks
    assert "the shape is unknown" in str(found.near_misses[0])


def test_a_transposed_weight_is_a_parameter_of_its_block() -> None:
    proto = parse_proto("h = Relu(x) a = MatMul(h, t) s = Add(a, h) y = Relu(s)")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((8, 8), np.float32), "m"))
    proto.graph.node.insert(0, onnx.helper.make_node("Transpose", ["m"], ["t"], perm=[1, 0]))
    (block,) = find_blocks(Model.from_proto(proto)).blocks
    assert (block.parameters, block.macs) == (64, 4 * 8 * 8 * 8)


def test_weights_in_constant_nodes_become_initializers() -> None:
    proto = parse_proto(f"y = Conv{CONV}(x, c)")
    weight = onnx.numpy_helper.from_array(np.ones((4, 4, 3, 3), np.float32))
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["c"], value=weight))
    model = Model.from_proto(proto)
    lift_weights(model, "Conv")
    lifted = model.to_proto()
    onnx.checker.check_model(lifted, full_check=True)
    assert [n.op_type for n in lifted.graph.node] == ["Conv"]
    assert "c" in {t.name for t in lifted.graph.initializer}


def test_a_block_that_is_none_is_refused() -> None:
    model = parse(f"h = Relu(x) a = Conv{CONV}(h, w) s = Add(a, h) y = Relu(s)")
    with pytest.raises(OptionError, match="not a block"):
        drop_blocks(model, ["h"])


def test_the_trunk_is_where_all_paths_meet() -> None:
    model = parse(f"h = Relu(x) a = Conv{CONV}(h, w) s = Add(a, h) y = Relu(s)")
    assert [t.name for t in Topology(model).trunk()] == ["x", "h", "s", "y"]


def test_a_sorted_order_is_found_in_an_unsorted_file() -> None:
    model = parse(f"h = Relu(x) a = Conv{CONV}(h, w) s = Add(a, h) y = Relu(s)")
    model.graph.nodes.reverse()
    assert names(find_blocks(model)) == [("residual", "s")]


def all_dropped_runs(model: Model, found: Discovery, size: tuple[int, ...]) -> None:
    """Drop each kind of block alone, then all: the file must be valid and run with a dynamic batch."""
    each = {b.signature: b.exit for b in found.blocks}
    cases = [[exit] for exit in each.values()] + [[b.exit for b in found.blocks]]
    for exits in cases:
        pruned = model.copy()
        drop_blocks(pruned, exits)
        proto = pruned.to_proto()
        onnx.checker.check_model(proto)
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
        for batch in (1, 3):
            (out, *_) = session.run(
                None, {session.get_inputs()[0].name: np.zeros((batch, *size), np.float32)}
            )
            assert out.shape[0] == batch


@pytest.mark.zoo
@pytest.mark.parametrize("variant", zoo.parameters(zoo.VARIANTS))
def test_all_and_only_the_right_blocks_of_real_networks(variant: str) -> None:
    name = variant.split("-")[0]
    model = load(zoo.path(variant))
    found = find_blocks(model)
    assert len(found.blocks) == zoo.EXPECTED_BLOCKS[name]
    kinds = {"vgg16_bn": {"run"}, "shufflenet_v2_x1_0": {"unit"}, "densenet121": set()}
    projections = {"projection"} if zoo.PROJECTIONS.get(name) else set()
    assert {b.kind for b in found.blocks} == kinds.get(name, {"residual"}) | projections
    assert sum(b.kind == "projection" for b in found.blocks) == zoo.PROJECTIONS.get(name, 0)
    size = zoo.image_size(name)
    if "folded" not in variant:  # the same blocks
        all_dropped_runs(model, found, (3, size, size))


@pytest.mark.parametrize("file", RESIDUAL, ids=lambda p: p.stem)
def test_blocks_of_the_shipped_models(file: Path) -> None:
    model = load(file)
    found = find_blocks(model)
    assert len(found.blocks) == {"resnet20-fashion": 9, "mobilenetv2-fashion": 8}[file.stem]
    all_dropped_runs(model, found, (1, 28, 28))
