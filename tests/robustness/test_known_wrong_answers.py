"""What other tools get wrong silently, as small graphs, through every pass that claims to be exact."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.folding import Arrays, graph, norm, weight
from tests.robustness.matrix import RECIPES, check

IMAGE = "(float[2,4,7,6] x) => (float[2,4,H,W] y)"
TWO = "(float[2,4,7,6] x) => (float[2,4,H,W] z, float[2,4,H,W] y)"
BN = "BatchNormalization(c, g, b, m, v)"


def _w(*shape: int, seed: int = 0) -> np.ndarray:
    """Channels with ranges of their own."""
    ranges = np.exp(np.random.default_rng(seed).normal(size=(shape[0], *[1] * (len(shape) - 1))))
    return (weight(*shape, seed=seed) * ranges).astype(np.float32)


SIX: Arrays = {"zero": np.float32(0), "six": np.float32(0.5)}
CASES: dict[str, tuple[str, str, Arrays, int]] = {
    "a grouped ConvTranspose has its output channels on axis 1, group by group": (
        IMAGE,
        f"c = ConvTranspose<group = 2, strides = [2,1]>(x, w) n = {BN} r = Relu(n) "
        "y = ConvTranspose<group = 2>(r, u)",
        {"w": _w(4, 2, 3, 2), "u": _w(4, 2, 2, 2, seed=1), **norm(4)},
        8,
    ),
    "beta of a Gemm scales its offset": (
        "(float[4,3] x) => (float[4,4] y)",
        f"c = Gemm<beta = 3.0, alpha = 0.5>(x, w, d) n = {BN} r = Relu(n) y = Gemm<beta = 2.0>(r, u, d)",
        {"w": _w(3, 4), "u": _w(4, 4, seed=1), "d": weight(4, seed=2), **norm(4)},
        8,
    ),
    "an offset of a Gemm may be one number for each row": (
        "(float[4,3] x) => (float[4,4] y)",
        f"c = Gemm(x, w, d) n = {BN} r = Relu(n) y = Gemm(r, u, d)",
        {"w": _w(3, 4), "u": _w(4, 4, seed=1), "d": weight(4, 1, seed=2), **norm(4)},
        8,
    ),
    "auto_pad pads with zeros, which a shift before it would miss": (
        IMAGE,
        f"c = Identity(x) n = {BN} r = Conv<auto_pad = \"SAME_UPPER\">(n, w, d) "
        'p = Pad(r, pads) y = Conv<auto_pad = "SAME_LOWER">(p, u)',
        {"w": _w(4, 4, 3, 3), "u": _w(4, 4, 2, 2, seed=1), "d": weight(4), **norm(4),
         "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
        8,
    ),
    "a weight that two layers share is folded once for each": (
        TWO,
        f"c = Conv(x, w) y = {BN} e = Conv(x, w) z = BatchNormalization(e, g2, b2, m2, v2)",
        {"w": _w(4, 4, 3, 3), **norm(4), **norm(4, "2", seed=3)},
        8,
    ),
    "a bias that two layers share": (
        TWO,
        f"c = Conv(x, w, d) y = {BN} z = Conv(x, u, d)",
        {"w": _w(4, 4, 3, 3), "u": _w(4, 4, 1, 1, seed=1), "d": weight(4), **norm(4)},
        8,
    ),
    "IR 3 lists initializers as inputs": (
        IMAGE,
        f"c = Conv(x, w) n = {BN} r = Relu(n) y = Conv(r, u)",
        {"w": _w(4, 4, 3, 3), "u": _w(4, 4, 2, 2, seed=1), **norm(4)},
        3,
    ),
    "outputs keep their names and their order": (
        TWO,
        f"c = Conv(x, w) y = {BN} d = Conv(y, u) z = BatchNormalization(d, g, b, m, v)",
        {"w": _w(4, 4, 3, 3), "u": _w(4, 4, 1, 1, seed=1), **norm(4)},
        8,
    ),
    "a Clip to six is no Relu": (
        IMAGE,
        f"c = Conv(x, w) n = {BN} r = Clip(n, zero, six) y = Conv(r, u)",
        {"w": _w(4, 4, 3, 3), "u": _w(4, 4, 2, 2, seed=1), **norm(4), **SIX},
        8,
    ),
}  # fmt: skip
"""What has to be respected -> signature, body, initializers, IR version."""


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", CASES)
def test_outputs_stay(case: str, recipe: str) -> None:
    signature, body, arrays, ir = CASES[case]
    found = check(recipe, graph(signature, body, arrays, ir=ir, opset=17 if ir > 3 else 9))
    assert found is not None
    assert found.kind == "passed", found.why


def test_most_cases_give_a_pass_something_to_do() -> None:
    changed = [
        case
        for case, (signature, body, arrays, ir) in CASES.items()
        for proto in [graph(signature, body, arrays, ir=ir, opset=17 if ir > 3 else 9)]
        if any((one := check(r, proto)) and one.changed for r in ("fold-bn --copy-shared", "equalize"))
    ]
    assert set(CASES) - set(changed) <= {"auto_pad pads with zeros, which a shift before it would miss"}
