"""fp16: what stays float32 is measured, the file is whole, and nothing is lost on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.account import Figures
from onnxcompress.cli.main import main
from onnxcompress.data.image_set import load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import ModelError, OptionError
from onnxcompress.evaluation.accuracy import agreement, logits
from onnxcompress.graph.constant_folding import constant_value
from onnxcompress.model import Model, load, save
from onnxcompress.passes.base import PassResult, run
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.fp16.candidates import HALF, candidates, element_types
from onnxcompress.passes.fp16.convert import convert
from onnxcompress.passes.fp16.error_search import Simulation, choose, relative_error
from onnxcompress.passes.fp16.figures import HalfPrecisionFigures, ProviderRun
from onnxcompress.runtime.inference import random_feeds
from onnxcompress.runtime.providers import full_name
from onnxcompress.runtime.session import cuda_devices, session
from tests.helpers.results import figures_of

NETWORKS = ["resnet20-fashion", "mobilenetv2-fashion"]
FLOAT = onnx.TensorProto.FLOAT


def parse(body: str, weights: dict[str, Any] | None = None, opset: int = 17, out: str = "N,4,6,6") -> Model:
    proto = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        net (float[N,3,6,6] x) => (float[{out}] y) {{ {body} }}
    """)
    rng = np.random.default_rng(0)
    known = {"w": rng.normal(0, 0.3, (4, 3, 3, 3)), "v": rng.normal(0, 0.3, (4, 4, 1, 1))} | (weights or {})
    read = {name for node in proto.graph.node for name in node.input}
    for name, value in known.items():
        if name in read:
            array = np.asarray(value, np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def apply(model: Model, **options: Any) -> PassResult[HalfPrecisionFigures | None]:
    return HalfPrecision(provider="cpu", threads=1, **options).apply(model)


def half_figures(result: PassResult[Figures | None]) -> HalfPrecisionFigures:
    return figures_of(result, HalfPrecisionFigures)


def run_of(result: PassResult[Figures | None]) -> ProviderRun:
    found = half_figures(result).runtime
    assert found is not None
    return found


CONV = "a = Conv<pads=[1,1,1,1]>(x, w)"

# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_error": 0.0}, "more than 0"),
        ({"max_error": 1.0}, "less than 1"),
        ({"threads": -1}, "--threads -1"),
        ({"inputs": "images"}, "name them with --images"),
        ({"provider": "cuda", "provider_options": ("x=1",)}, "no option 'x'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HalfPrecision(**options).check()


def test_what_is_half_already_stays() -> None:
    model = parse(f"{CONV} y = Relu(a)")
    assert apply(model).modified
    before = model.to_proto().SerializeToString(deterministic=True)
    again = apply(model)
    assert not again.modified
    assert "half precision already" in again.refusals[0].rule
    assert model.to_proto().SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("place", ["initializer", "Constant"])
def test_weights_that_are_only_stored_as_halves_are_computed_in_half(place: str) -> None:
    """The file computed in float32: nothing of it is in half precision."""
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]> net (float[N,3,6,6] x) => (float[N,4,6,6] y) {
        k = Cast<to=1>(h) a = Conv<pads=[1,1,1,1]>(x, k) y = Relu(a) }
    """)
    half = np.random.default_rng(0).normal(0, 0.3, (4, 3, 3, 3)).astype(np.float16)
    if place == "initializer":
        proto.graph.initializer.append(onnx.numpy_helper.from_array(half, "h"))
    else:
        value = onnx.numpy_helper.from_array(half)
        proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["h"], value=value))
    model = Model.from_proto(proto)
    result = apply(model)
    assert half_figures(result).converted == 2
    (conv,) = [node for node in model.graph.nodes if node.op == "Conv"]
    weight = constant_value(model, conv.inputs[1])
    assert weight is not None
    assert weight.dtype == np.float16
    np.testing.assert_array_equal(weight, half)
    assert [node.op for node in model.graph.nodes].count("Cast") == 2  # of the input and of the output


def test_bodies_are_refused() -> None:
    branch = "then_branch = t () => (float[N,4,6,6] p) { p = Relu(a) }"
    other = "else_branch = e () => (float[N,4,6,6] q) { q = Neg(a) }"
    body = parse(f"{CONV} m = ReduceSum<keepdims=0>(a) b = Cast<to=9>(m) y = If<{branch}, {other}>(b)")
    assert "bodies" in apply(body).refusals[0].rule


def test_operators_without_float16_stay_and_say_so() -> None:
    model = parse(f"{CONV} b = Max(a, a) y = Relu(b)")
    result = apply(model)
    assert "leaves Max in float32" in next(r.rule for r in result.refusals if r.node == "b")
    assert element_types(model.to_proto())["b"] in (FLOAT, HALF)
    assert [n.op for n in model.graph.nodes].count("Max") == 1


def test_several_inputs_are_an_error() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N,3] x, float[N,3] z) => (float[N,3] y) { y = Add(x, z) }
    """)
    with pytest.raises(ModelError, match=r"reads 2 \(x, z\)"):
        apply(Model.from_proto(proto))


# what is measured

OVERFLOW = f"{CONV} b = Mul(a, big) c = Relu(b) d = Mul(c, small) e = Conv(d, v) y = Relu(e)"
BIG = {"big": 1e5, "small": 1e-5}


def test_what_overflows_stays_float32() -> None:
    """1e5 times the activations is beyond 65504; onnxruntime's CPU kernels would not notice."""
    model = parse(OVERFLOW, BIG)
    exact = logits_of(model)
    result = apply(model)
    kept = {k.name for k in half_figures(result).kept_float32}
    assert half_figures(result).all_float16 == float("inf")
    assert {"b", "c", "d"} <= kept
    assert not {"a", "e", "y"} & kept
    assert half_figures(result).error <= 0.01
    assert relative_error([exact], [logits_of(model)]) < 0.01
    types = element_types(model.to_proto())
    assert (types["b"], types["c"], types["a"], types["e"]) == (FLOAT, FLOAT, HALF, HALF)


def logits_of(model: Model) -> np.ndarray:
    opened = session(model, provider="cpu", threads=1)
    (found,) = opened.run(None, random_feeds(model, batch=4))
    return np.asarray(found)


def test_a_tighter_bound_keeps_more() -> None:
    bounds = (0.5, 3e-4, 1e-4)
    kept = []
    for bound in bounds:
        model = parse(f"{CONV} b = Relu(a) c = Conv(b, v) y = Relu(c)")
        result = apply(model, max_error=bound)
        assert half_figures(result).error <= bound
        kept.append(len(half_figures(result).kept_float32))
    assert kept[0] == 0
    assert kept == sorted(kept)
    assert kept[-1] > 0


def test_nothing_changes_where_all_must_stay() -> None:
    model = parse(f"{CONV} y = Relu(a)")
    before = model.to_proto().SerializeToString(deterministic=True)
    result = apply(model, max_error=1e-9)
    assert not result.modified
    assert model.to_proto().SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", NETWORKS)
def test_the_simulation_is_torchs_half_precision(name: str, models: Path) -> None:
    """An independent float16: torch's own kernels, all nodes in half precision."""
    torch = pytest.importorskip("torch")
    from onnxcompress.optimize.executor import Executor

    model = load(models / f"{name}.onnx")
    proto = model.to_proto()
    (x,) = random_feeds(model, batch=8).values()
    nodes, _ = candidates(proto)
    simulation = Simulation(proto, nodes, [x], threads=1)
    simulated = simulation.error(range(len(nodes)))
    source, output = model.graph.inputs[0].name, model.graph.outputs[0].name
    with torch.no_grad():
        found = Executor.from_model(model, dtype=torch.float16).run({source: torch.from_numpy(x)}, [output])
    real = relative_error(simulation.exact[0], [found[output].float().numpy()])
    assert 0.5 < simulated / real < 2, (simulated, real)


# the file


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_shipped_network_keeps_all_but_its_precision(name: str, models: Path, tmp_path: Path) -> None:
    file, out = models / f"{name}.onnx", tmp_path / "half.onnx"
    before, model = load(file), load(file)
    (result,) = run([HalfPrecision(provider="cpu", threads=1)], model)
    save(model, out)
    made, original = onnx.load(out), onnx.load(file)
    onnx.checker.check_model(made, full_check=True)
    assert made.opset_import == original.opset_import
    assert made.graph.input == original.graph.input
    assert made.graph.output == original.graph.output
    for key, value in before.metadata.items():
        assert model.metadata[key] == value
    assert model.provenance()[-1]["pass"] == "fp16"
    assert {t.data_type for t in made.graph.initializer} <= {HALF, onnx.TensorProto.INT64}
    assert out.stat().st_size < 0.6 * file.stat().st_size
    kept = {n.name for n in original.graph.node if n.op_type != "BatchNormalization"}
    assert kept <= {n.name for n in made.graph.node}
    images = load_images(str(models / "fashion-test2k.npz"), preprocess=Preprocess.parse("fashion-mnist"))
    few = images.take(np.arange(512))
    scores = [logits(one, few, provider="cpu", threads=1, batch=100) for one in (file, out)]
    assert agreement(*scores) > 0.99
    assert run_of(result).provider == "cpu"
    assert 1e-4 < run_of(result).error < 0.01


def test_float16_at_the_ends_where_asked() -> None:
    model = parse(f"{CONV} y = Relu(a)")
    apply(model, float16_io=True)
    graph = model.to_proto().graph
    assert graph.input[0].type.tensor_type.elem_type == HALF
    assert graph.output[0].type.tensor_type.elem_type == HALF
    assert not [n for n in graph.node if n.op_type == "Cast"]


TANGLED = {
    # one tensor read by several nodes, one weight by two layers, an output in the middle, no names
    "shared": f"{CONV} b = Conv(a, v) c = Conv(a, v) d = Relu(a) e = Add(b, c) y = Add(e, d)",
    "scales": f"{CONV} r = Resize(a, , s) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r) y = Conv(p, v)",
    "reused": f"{CONV} b = Relu(a) y = Mul(b, b)",
    "constant": f"{CONV} k = Constant<value = float[1] {{2.0}}>() b = Mul(a, k) y = Conv(b, v)",
}


@pytest.mark.parametrize("which", list(TANGLED))
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_choice_of_nodes_gives_a_valid_file(which: str, data: st.DataObject) -> None:
    model = parse(TANGLED[which], {"s": [1, 1, 2, 2]})
    proto = model.to_proto()
    nodes, cannot = candidates(proto)
    assert not cannot
    half = data.draw(st.sets(st.sampled_from([c.index for c in nodes]), min_size=1))
    made = convert(proto, half, keep_io=True)
    onnx.checker.check_model(made, full_check=True)
    feeds = random_feeds(model, batch=2)
    runs = [ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)
            for m in (proto, made)]  # fmt: skip
    assert relative_error(runs[0], runs[1]) < 5e-3
    types = element_types(made)
    by_output = {n.output[0]: n for n in made.graph.node}
    for at, node in enumerate(proto.graph.node):  # each computes in the type that it was to have
        own = next(n for n in made.graph.node if n.op_type == node.op_type and _origin(n, node, by_output))
        if own.op_type != "Constant":
            assert types[own.output[0]] == (HALF if at in half else FLOAT)
    for node in made.graph.node:  # nothing goes to float16 and back between float32 nodes
        if node.op_type == "Cast" and node.attribute[0].i == FLOAT:
            origin = by_output.get(node.input[0])
            assert origin is None or origin.op_type != "Cast"


def _origin(node: onnx.NodeProto, original: onnx.NodeProto, by_output: dict[str, onnx.NodeProto]) -> bool:
    """Whether `node` still makes what `original` made, itself or through a Cast."""
    target = original.output[0]
    maker = by_output[target]
    return target in node.output or (maker.op_type == "Cast" and maker.input[0] in node.output)


def test_value_infos_have_the_new_types() -> None:
    proto = onnx.shape_inference.infer_shapes(parse(OVERFLOW, BIG).to_proto())
    model = Model.from_proto(proto)
    apply(model)
    found = {v.name: v.type.tensor_type.elem_type for v in model.to_proto().graph.value_info}
    assert set(found) == {v.name for v in proto.graph.value_info}
    assert (found["a"], found["c"]) == (HALF, FLOAT)


def test_the_converter_leaves_no_trace() -> None:
    """And onnxruntime's quantization, which wants a folder on the path, can be imported afterwards."""
    code = (
        "import sys; from onnxcompress.passes.fp16.candidates import blocked_operators\n"
        "before = list(sys.path); assert 'CumSum' in blocked_operators(); assert sys.path == before\n"
        "assert 'onnxruntime.transformers' not in sys.modules; import onnxruntime.quantization"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# the command


@pytest.mark.slow
def test_the_command_and_a_recipe(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, out = str(models / "resnet20-fashion.onnx"), str(tmp_path / "half.onnx")
    assert main(["fp16", net, out, "--provider", "cpu", "--max-error", "0.0004", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["measured"]
    assert found["kept_float32"]
    assert found["error"] <= 0.0004 < found["all_float16"]
    (tmp_path / "r.yaml").write_text("passes: [fold-bn, fp16: {max_error: 0.5}]")
    assert main(["run", str(tmp_path / "r.yaml"), net, out, "--no-cache"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "compute in float16, 0 stay float32" in text
    assert "a CPU computes it in float32" in text


@pytest.mark.gpu
@pytest.mark.skipif(cuda_devices() == 0, reason="there is no GPU")
@pytest.mark.parametrize("name", NETWORKS)
def test_cuda_computes_it_as_simulated(name: str, models: Path) -> None:
    model = load(models / f"{name}.onnx")
    result = HalfPrecision(provider="cuda").apply(model)
    assert run_of(result).provider.startswith("cuda")
    assert run_of(result).error < max(3 * half_figures(result).error, 2e-3)
    assert session(model, provider="cuda").get_providers()[0] == full_name("cuda")


@pytest.mark.parametrize("swapped", [False, True])
def test_the_error_is_that_of_the_worst_output(swapped: bool) -> None:
    exact = [np.array([0.0, 2.0, 4.0]), np.array([-1.0, 1.0])]  # deviations √(8/3) and 1
    found = [exact[0] + 0.5, exact[1] + 0.1]
    if swapped:
        exact, found = exact[::-1], found[::-1]
    assert relative_error(exact, found) == pytest.approx(0.5 / np.sqrt(8 / 3))


def test_a_constant_output_is_measured_by_its_size_and_one_that_is_nothing_by_nothing() -> None:
    assert relative_error([np.full(4, 2.0)], [np.full(4, 2.1)]) == pytest.approx(0.05)
    assert relative_error([np.zeros(4)], [np.zeros(4)]) == 0
    assert relative_error([np.zeros(4)], [np.full(4, 1e-9)]) == np.inf
    assert relative_error([np.ones(4)], [np.array([1, 1, np.nan, 1])]) == np.inf


@pytest.mark.parametrize("worst_first", [True, False])
def test_every_output_is_within_the_bound(worst_first: bool) -> None:
    """One output has a large offset, of which float16 leaves little; whichever comes first."""
    model = parse(f"{CONV} b = Add(a, k) y = Relu(b) z = Conv(a, v)", {"k": np.float32(300)})
    proto = model.to_proto()
    proto.graph.output.append(onnx.helper.make_tensor_value_info("z", FLOAT, ["N", 4, 6, 6]))
    if not worst_first:
        proto.graph.output.reverse()
    model = Model.from_proto(proto)
    result = apply(model, inputs="procedural", preprocess="unit", max_error=0.005)
    assert half_figures(result).all_float16 > 0.02
    assert half_figures(result).error <= 0.005
    assert run_of(result).error <= 0.01
    assert half_figures(result).kept_float32


def test_the_error_that_is_told_is_the_one_that_is_measured_apart(models: Path, tmp_path: Path) -> None:
    file, out = models / "resnet20-fashion.onnx", tmp_path / "half.onnx"
    model = load(file)
    pixels = models / "fashion-tiny.npz"
    one = HalfPrecision(images=str(pixels), count=32, preprocess="fashion-mnist", provider="cpu", threads=1)
    (result,) = run([one], model)
    save(model, out)
    images = load_images(str(pixels), preprocess=Preprocess.parse("fashion-mnist"), count=32)
    exact, half = (logits(path, images, provider="cpu", threads=1) for path in (file, out))
    apart = float(np.sqrt(np.square(exact - half).mean()) / exact.std())
    assert 1e-4 < apart < 0.01
    assert run_of(result).error == pytest.approx(apart, rel=0.15)
    assert apart < half_figures(result).error < 0.002  # every node in float16, which no CPU computes in


class Additive:
    """Candidates whose squared errors add up."""

    def __init__(self, *errors: float) -> None:
        self.nodes, self.errors = list(errors), errors

    def error(self, half: Any) -> float:
        return float(np.sqrt(sum(self.errors[i] ** 2 for i in half)))

    first_batch_error = error


def test_no_more_stays_float32_than_the_bound_asks_for() -> None:
    found = choose(Additive(0.01, 0.5, 0.02, 0.2, 0.08), 0.1, lambda *_: None)  # type: ignore[arg-type]
    assert found.kept == [1, 3]
    assert found.error == pytest.approx(np.sqrt(0.01**2 + 0.02**2 + 0.08**2))
    assert found.whole == pytest.approx(np.sqrt(0.2969), rel=1e-3)
    assert found.alone == dict(enumerate((0.01, 0.5, 0.02, 0.2, 0.08)))
    few = choose(Additive(0.07, 0.06, 0.05), 0.1, lambda *_: None)  # type: ignore[arg-type]
    assert few.kept == [0]
    assert choose(Additive(0.05, 0.05), 0.1, lambda *_: None).kept == []  # type: ignore[arg-type]
