"""Places at which a student is matched with its teacher on the way to the features."""

from __future__ import annotations

import pytest

from onnxcompress.model import Model
from onnxcompress.optimize.reconstruction.levels import feature_levels
from tests.helpers.folding import graph, weight

BODY = """a = Conv<pads=[1,1,1,1]>(x, w) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, v) d = Add(b, c)
    e = Conv<pads=[1,1,1,1], strides=[2,2]>(d, v) f = Relu(e) g = Conv<pads=[1,1,1,1], strides=[2,2]>(f, v)
    h = Relu(g) p = GlobalAveragePool(h) y = Flatten(p)"""


def network() -> Model:
    arrays = {"w": weight(4, 3, 3, 3), "v": weight(4, 4, 3, 3)}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4] y)", BODY, arrays))


@pytest.mark.parametrize(
    ("feature", "levels"), [("h", ("d", "f")), ("f", ("d",)), ("d", ()), ("b", ()), ("c", ())]
)
def test_levels_are_the_last_tensors_of_larger_resolutions(feature: str, levels: tuple[str, ...]) -> None:
    assert feature_levels(network(), feature) == levels
