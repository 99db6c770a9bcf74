"""Layers that share a weight get copies of their own: where that is cheap, or asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.evaluation.equivalence import difference
from onnxcompress.graph.shared_weights import copy_shared_weights
from onnxcompress.model import Model
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.quantize import Quantize
from onnxcompress.runtime.inference import random_feeds
from tests.helpers.folding import graph, weight

SIGNATURE = "(float[N,4,8,8] x) => (float[N,4,8,8] y)"
TWICE = "a = Conv(x, w) r = Relu(a) b = Conv(r, w) y = Conv(b, v)"
CONSTANT = "k = Constant<value = float[4,4,1,1] {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}>()"
BODIES = {
    "two layers": (TWICE, 1),
    "a layer and its values elsewhere": ("a = Conv(x, w) s = ReduceSum(w) b = Add(a, s) y = Conv(b, v)", 1),
    "its shape elsewhere": ("a = Conv(x, w) s = Shape(w) f = Cast<to = 1>(s) q = ReduceSum(f) "
                            "b = Add(a, q) y = Conv(b, v)", 0),
    "a Constant": (f"{CONSTANT} a = Conv(x, k) b = Conv(a, k) c = Conv(b, w) y = Conv(c, v)", 1),
    "none": ("a = Conv(x, w) y = Conv(a, v)", 0),
}  # fmt: skip


def net(body: str) -> onnx.ModelProto:
    return graph(SIGNATURE, body, {"w": weight(4, 4, 1, 1), "v": weight(4, 4, 1, 1, seed=1)})


@pytest.mark.parametrize("case", BODIES)
def test_copies_are_made_where_they_are_asked_for_and_change_nothing(case: str) -> None:
    body, copies = BODIES[case]
    model = Model.from_proto(net(body))
    before = model.copy()
    assert not copy_shared_weights(model, asked=False)  # they are as large as a part of this network
    assert len(copy_shared_weights(model, asked=True)) == bool(copies)
    assert not copy_shared_weights(model, asked=True)
    extra = len(model.to_proto().graph.initializer) - len(before.to_proto().graph.initializer)
    assert extra == copies + (case == "a Constant")
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert difference(before, model, random_feeds(before)).max_abs == 0


def test_small_copies_are_made_unasked() -> None:
    arrays = {"w": weight(4, 4, 1, 1), "v": weight(4, 400, 1, 1), "u": weight(400, 4, 1, 1)}
    body = "a = Conv(x, w) r = Relu(a) b = Conv(r, w) c = Conv(b, u) y = Conv(c, v)"
    model = Model.from_proto(graph(SIGNATURE, body, arrays))
    assert len(copy_shared_weights(model, asked=False)) == 1


@pytest.mark.parametrize("asked", [False, True])
def test_passes_change_each_layer_on_its_own(asked: bool) -> None:
    few: dict[str, Any] = {"synthetic": 4, "inputs": "procedural", "copy_shared": asked}
    for pass_ in (Quantize(**few), Prune(**few, scope="layer", sparsity=0.3)):
        model = Model.from_proto(net(TWICE))
        previewed = pass_.preview(model)
        result = pass_.apply(model)
        refused = {r.node for r in result.refusals if "--copy-shared" in r.remedy}
        assert refused == {r.node for r in previewed} == (set() if asked else {"a", "b"})
        if asked and isinstance(pass_, Prune):
            zeros = [t.name for t in model.graph.tensors().values() if t.name[0] in "wv"
                     and (np.asarray(t.values) == 0).any()]  # fmt: skip
            assert len(zeros) == 3
