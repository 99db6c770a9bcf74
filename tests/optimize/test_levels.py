"""Places at which a student is matched with its teacher on the way to the features."""

from __future__ import annotations

import pytest

from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import find_blocks
from onnxcompress.model import Model
from onnxcompress.optimize.reconstruction.levels import feature_levels, pooled_features
from tests.helpers.folding import graph, weight

BODY = """a = Conv<pads=[1,1,1,1]>(x, w) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, v) d = Add(b, c)
    e = Conv<pads=[1,1,1,1], strides=[2,2]>(d, v) f = Relu(e) g = Conv<pads=[1,1,1,1], strides=[2,2]>(f, v)
    h = Relu(g) p = GlobalAveragePool(h) y = Flatten(p)"""
DEEP = "a0 = Relu(x)" + "".join(f" a{i} = Conv(a{i - 1}, {w})" for i, w in enumerate("wvvvvvvuz", 1))
DEEP += " p = GlobalAveragePool(a9) y = Flatten(p)"


def network(body: str = BODY) -> Model:
    arrays = {"w": weight(4, 3, 1, 1), "v": weight(4, 4, 1, 1), "u": weight(9, 4, 1, 1)}
    arrays["z"] = weight(4, 9, 1, 1)
    if body is BODY:
        arrays = {"w": weight(4, 3, 3, 3), "v": weight(4, 4, 3, 3)}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4] y)", body, arrays))


@pytest.mark.parametrize(
    ("feature", "levels"), [("h", "bdf"), ("f", "bd"), ("d", "b"), ("b", ""), ("c", "")]
)
def test_levels_lie_on_the_trunk_behind_activations(feature: str, levels: str) -> None:
    """None where the features do not lie on the trunk."""
    whole = network()
    assert feature_levels(whole, whole, feature) == tuple((name, name) for name in levels)


def test_levels_are_spread_evenly_over_the_narrow_tensors_of_a_resolution() -> None:
    """The input's have 3 channels, which the whole network cannot be brought to; a8 has 9."""
    whole = network(DEEP.replace("a0 = Relu(x)", "a0 = Conv(x, w)").replace("Conv(a0, w)", "Conv(a0, v)"))
    assert feature_levels(whole, whole, "a9") == (("a2", "a2"), ("a5", "a5"))


def test_what_stands_for_several_of_the_teachers_tensors_is_matched_with_the_last() -> None:
    whole = network()
    student = whole.copy()
    instead = drop_blocks(student, [find_blocks(student).blocks[0].exit])
    assert instead["d"] == "b"
    assert feature_levels(whole, student, "h", instead) == (("b", "d"), ("f", "f"))


@pytest.mark.parametrize(
    ("head", "feature", "pooled"),
    [
        ("p = GlobalAveragePool(h) y = Flatten(p)", "h", "p"),
        ("y = ReduceMean<axes=[2,3], keepdims=0>(h)", "h", "y"),
        ("p = MaxPool<kernel_shape=[2,2]>(h) y = Flatten(p)", "h", "p"),
        ("p = GlobalAveragePool(h) y = Flatten(p)", "f", ""),
        ("p = GlobalAveragePool(h) y = Flatten(p)", "p", ""),
        ("p = GlobalAveragePool(h) y = Flatten(p)", "y", ""),
        ("p = GlobalAveragePool(h) y = Flatten(p)", "c", ""),
        ("p = MaxPool<kernel_shape=[2,1]>(h) q = GlobalAveragePool(p) y = Flatten(q)", "h", ""),
        ("p = Flatten(h) y = Gemm(p, t)", "h", ""),
    ],
)
def test_the_pool_behind_the_features_is_found(head: str, feature: str, pooled: str) -> None:
    body = BODY.replace("p = GlobalAveragePool(h) y = Flatten(p)", head)
    arrays = {"w": weight(4, 3, 3, 3), "v": weight(4, 4, 3, 3), "t": weight(16, 4)}
    whole = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4] y)", body, arrays))
    assert pooled_features(whole, whole, feature, 200) == tuple((name, name) for name in pooled)
