"""Parts of a file that nothing needs, or that only outputs need: dead nodes, masks, inputs nobody reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from onnxcompress.evaluation.guard import Guard
from onnxcompress.graph.channel_groups.cut_tracer import find_cut_groups
from onnxcompress.graph.edit import set_values
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model, save
from onnxcompress.model.model_like import input_specs
from onnxcompress.optimize.executor.open_batch import images_at_once
from onnxcompress.passes.base import Pass, run
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.drop_channels import DropChannels
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.quantize import Quantize
from tests.helpers.folding import graph, norm, weight

ARRAYS = {"w": weight(8, 3, 3, 3), "v": weight(8, 8, 3, 3, seed=1), "z": weight(5, 8, seed=2)}
TAIL = """d = Conv<pads=[1,1,1,1]>(q, v)  e = Relu(d)
    g = GlobalAveragePool(e)  f = Flatten(g)  y = Gemm<transB=1>(f, z)"""
HEAD = "a = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(a)"
FEW: dict[str, Any] = {"effort": "fast", "synthetic": 8}
X = "float[N,3,8,8] x"


@pytest.mark.parametrize(
    ("node", "output"),
    [
        ("q, mask = Dropout(r)", "bool[N,8,8,8] mask"),
        ("q, at = MaxPool<kernel_shape=[2,2]>(r)", "int64[N,8,7,7] at"),
    ],
)
def test_channels_stay_where_a_second_output_leaves_the_network(node: str, output: str) -> None:
    proto = graph(f"({X}) => (float[N,5] y, {output})", f"{HEAD}  {node}  {TAIL}", ARRAYS)
    model = Model.from_proto(proto)
    assert [group.name for group in find_cut_groups(model).free] == ["d"]
    if "mask" not in output:  # indices are counted over the images of a batch, too
        return
    run([DropChannels(channels_kept=("d=4",), steps=0, effort="fast", synthetic=8)], model)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert model.graph.tensors()["w"].shape[0] == 8


def test_indices_stay_with_their_channels_where_something_reads_them() -> None:
    body = f"{HEAD}  q, at = MaxPool<kernel_shape=[2,2]>(r)  i = Cast<to=1>(at)  p = Mul(q, i)  {TAIL}"
    model = Model.from_proto(
        graph(f"({X}) => (float[N,5] y)", body.replace("Conv<pads=[1,1,1,1]>(q", "Conv(p"), ARRAYS)
    )
    assert [group.name for group in find_cut_groups(model).free] == ["d"]


def test_dead_nodes_do_not_end_the_trunk() -> None:
    body = f"{HEAD}  q = Identity(r)  {TAIL}"
    alive = Model.from_proto(graph(f"({X}) => (float[N,5] y)", body, ARRAYS))
    dead = Model.from_proto(
        graph(f"({X}) => (float[N,5] y)", f"{body}  o = Conv(r, v)  s = Shape(o)", ARRAYS)
    )
    trunks = [[t.name for t in model.analysis(Topology).trunk()] for model in (alive, dead)]
    assert trunks[0] == trunks[1]
    assert trunks[1][-2:] == ["f", "y"]


def test_biases_are_corrected_where_an_input_is_read_by_nothing(tmp_path: Path) -> None:
    signature = "(int64[K] nobody, float[N,3,8,8] x) => (float[N,5] y)"
    model = Model.from_proto(graph(signature, f"{HEAD}  q = Identity(r)  {TAIL}", ARRAYS))
    save(model, reference := tmp_path / "reference.onnx")
    weights = model.graph.tensors()["v"]
    set_values(weights, weights.values + np.float32(0.1))
    (result,) = run([CorrectBias(reference=str(reference), inputs="procedural")], model)
    assert any(change.what == "bias corrected" for change in result.changes)


def test_images_go_alone_where_a_recurrent_layer_has_the_state_of_one() -> None:
    body = """a = Flatten(x)  u = Unsqueeze(a, zero)  l, n = RNN<hidden_size=8>(u, s, o, , , h)
        j = Squeeze(n, zero)  y = Gemm<transB=1>(j, z)"""
    arrays = {"s": weight(1, 8, 12), "o": weight(1, 8, 8, seed=1), "h": weight(1, 1, 8, seed=2)}
    arrays |= {"z": ARRAYS["z"], "zero": np.array([0])}
    model = Model.from_proto(graph("(float[N,3,2,2] x) => (float[N,5] y)", body, arrays))
    assert images_at_once(model, torch.randn(6, 3, 2, 2)) == 1


def with_bias_of_two_rows() -> Model:
    body = "f = Flatten(x)  h = Gemm<transB=1>(f, a, b)  r = Relu(h)  y = Gemm<transB=1>(r, z, c)"
    arrays = {"a": weight(8, 48), "b": weight(2, 8, seed=1), "z": ARRAYS["z"], "c": weight(1, 5)}
    return Model.from_proto(graph("(float[N,3,4,4] x) => (float[N,5] y)", body, arrays))


@pytest.mark.parametrize(
    "pass_", [Quantize(**FEW), Prune(sparsity=0.2, scope="layer", **FEW), HalfPrecision()]
)
def test_a_bias_with_a_row_for_each_image_fixes_the_batch(pass_: Pass) -> None:
    model = with_bias_of_two_rows()
    assert input_specs(model)[0].shape == input_specs(model.to_proto())[0].shape == (2, 3, 4, 4)
    (result,) = run([pass_], model, guard=Guard())
    assert result.modified
    assert result.guard is not None
    assert result.guard.fidelity is not None
    assert model.to_proto().graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_a_bias_with_a_row_for_each_place_of_an_image_fixes_no_batch() -> None:
    body = "f = Reshape(x, rows)  h = Gemm<transB=1>(f, a, b)  y = Reshape(h, whole)"
    arrays = {"a": weight(8, 4), "b": weight(12, 8, seed=1), "rows": np.array([-1, 4])}
    proto = graph("(float[N,3,4,4] x) => (float[M,96] y)", body, arrays | {"whole": np.array([-1, 96])})
    assert input_specs(proto)[0].shape == ("N", 3, 4, 4)


@pytest.mark.parametrize(
    "pass_", [Quantize(**FEW), Prune(sparsity=0.2, scope="layer", **FEW), HalfPrecision()]
)
def test_an_input_that_is_an_output_too(pass_: Pass) -> None:
    body = f"a = Conv<pads=[1,1,1,1]>(x, w)  n = BatchNormalization(a, g1, b1, m1, v1)  q = Relu(n)  {TAIL}"
    arrays = {**ARRAYS, **norm(8, "1")}
    model = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,5] y, float[N,3,8,8] x)", body, arrays))
    (result,) = run([pass_], model, guard=Guard())
    assert result.modified
    assert [output.name for output in model.graph.outputs] == ["y", "x"]


def resized_one_by_one() -> Model:
    """A batch that is open, and a Resize to the sizes of one image: it runs with no other batch."""
    body = f'{HEAD}  u = Resize<mode="linear">(r, , , sizes)  q = Conv<pads=[1,1,1,1]>(u, t)  {TAIL}'
    arrays = {**ARRAYS, "t": weight(8, 8, 3, 3, seed=3), "sizes": np.array([1, 8, 4, 4])}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,5] y)", body, arrays))


def test_one_image_at_a_time_where_no_more_run(tmp_path: Path) -> None:
    save(resized_one_by_one(), reference := tmp_path / "reference.onnx")
    (half,) = run([HalfPrecision()], resized_one_by_one(), guard=Guard())
    assert half.modified
    model = resized_one_by_one()
    weights = model.graph.tensors()["v"]
    set_values(weights, weights.values + np.float32(0.1))
    (corrected,) = run([CorrectBias(reference=str(reference), inputs="procedural")], model)
    assert any(change.what == "bias corrected" for change in corrected.changes)
