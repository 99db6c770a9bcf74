"""Channels that are cut: which go together, what stays and why, and that all groups can really be cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxcompress.errors import ModelError
from onnxcompress.graph.channel_groups.cut_tracer import find_cut_groups
from onnxcompress.graph.channel_removal import cut_channels, kept_channels
from onnxcompress.model import Model, load
from onnxcompress.passes.opsets import converted
from tests.helpers import zoo
from tests.helpers.channel_cutting import cut_agrees, some_of, with_groups
from tests.helpers.folding import Arrays, graph, norm, weight
from tests.helpers.paths import MODELS

IMAGE = "(float[N,4,8,8] x) => (float[N,C,H,W] y)"
VECTOR = "(float[N,4,8,8] x) => (float[N,5] y)"
TWO = "(float[N,4,8,8] x) => (float[N,C,H,W] y, float[N,5] z)"
P = "pads = [1,1,1,1]"


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


ARRAYS: Arrays = {
    "w": weight(12, 4, 3, 3), "b": weight(12), "u": weight(12, 12, 3, 3, seed=1),
    "e": weight(12, seed=2), "v": weight(5, 12, 1, 1, seed=3), "o": weight(12, 12, 1, 1, seed=4),
    "wide": weight(5, 24, 1, 1, seed=5), "dw": weight(12, 1, 3, 3, seed=6),
    "doubled": weight(24, 1, 3, 3, seed=7), "grouped": weight(12, 3, 3, 3, seed=8),
    "third": weight(12, 4, 1, 1, seed=9), "up": weight(12, 6, 2, 2, seed=10),
    "six": weight(5, 6, 1, 1, seed=11), "half": weight(5, 3, 1, 1, seed=12),
    "flat": weight(5, 12 * 36, seed=13), "fc": weight(5, 12, seed=14),
    "squeeze": weight(6, 12, 1, 1, seed=15), "excite": weight(12, 6, 1, 1, seed=16),
    "c": weight(12, 1, 1), "last": weight(12, 8, seed=17), "back": weight(8, 12, seed=18),
    "row": weight(8, seed=19), "deep": weight(5, 48, 1, 1, seed=20),
    "grow": weight(6, 4, 3, 3, seed=21), "grow2": weight(6, 10, 3, 3, seed=22),
    "grown": weight(5, 16, 1, 1, seed=23), "w16": weight(16, 4, 3, 3),
    "grouped16": weight(16, 4, 3, 3, seed=8), "other16": weight(16, 4, 3, 3, seed=9),
    "shuffle": ints(0, 4, 4, 6, 6), "shuffled": ints(0, 16, 6, 6), "rows": ints(-1, 12 * 36),
    "parts": ints(5, 7), "from": ints(2), "to": ints(9), "axis": ints(1), "pick": ints(0, 3, 3, 11, -2),
    "seven": weight(5, 7, 1, 1), "picked": weight(5, 5, 1, 1), "pads": ints(0, 2, 0, 0, 0, 1, 0, 0),
    "padded": weight(5, 15, 1, 1), "roi": np.zeros(0, np.float32),
    "scales": np.array([1, 1, 2, 2], np.float32), "sizes": ints(1, 12, 12, 12), "spatial": ints(2, 3),
    "stripes": weight(1, 12, 1, 1), "one": weight(1, 12, 1, 1, seed=24), **norm(12, "n"),
}  # fmt: skip
STEM = "a = Conv(x, w, b) r = Relu(a)"
NETWORKS: dict[str, tuple[str, int, str]] = {  # signature, groups that can be cut, body
    "pair": (IMAGE, 1, f"{STEM} y = Conv(r, v)"),
    "vgg": (VECTOR, 2, f"""
        {STEM} d = Conv<{P}>(r, u) s = Relu(d) f = Flatten(s) y = Gemm<transB = 1>(f, flat)"""),
    "residual": (IMAGE, 1, f"""
        {STEM} d = Conv<{P}>(r, u, e) s = Add(r, d) t = Relu(s) y = Conv(t, v)"""),
    "batch norm": (IMAGE, 1, f"""
        {STEM} s = BatchNormalization(r, gn, bn, mn, vn) t = Sigmoid(s) y = Conv(t, v)"""),
    "instance norm": (IMAGE, 1, f"{STEM} s = InstanceNormalization(r, gn, bn) y = Conv(s, v)"),
    "prelu": (IMAGE, 1, "a = Conv(x, w, b) r = PRelu(a, c) y = Conv(r, v)"),
    "constants": (IMAGE, 1, f"{STEM} s = Mul(r, c) t = Max(s, one) y = Conv(t, v)"),
    "depthwise": (IMAGE, 1, f"""
        {STEM} d = Conv<group = 12, {P}>(r, dw, e) s = Clip(d) y = Conv(s, v)"""),
    "depthwise, doubled": (IMAGE, 1, f"{STEM} d = Conv<group = 12>(r, doubled) y = Conv(d, wide)"),
    "grouped": (IMAGE, 1, f"""
        {STEM} d = Conv<group = 4, {P}>(r, grouped, e) s = Relu(d) y = Conv(s, v)"""),
    "shuffled": (IMAGE, 2, f"""
        a = Conv(x, w16) d = Conv<group = 4, {P}>(a, grouped16) p = Reshape(d, shuffle) t =
        Transpose<perm = [0,2,1,3,4]>(p) q = Reshape(t, shuffled) g = Conv<group = 4, {P}>(q, other16)
        y = Conv(g, grown)"""),
    "dense": (IMAGE, 2, f"""
        a = Conv<{P}>(x, grow) b2 = Concat<axis = 1>(x, a) d = Conv<{P}>(b2, grow2) f = Concat<axis =
        1>(x, a, d) y = Conv(f, grown)"""),
    "u-net": (IMAGE, 2, f"""
        {STEM} m = MaxPool<kernel_shape = [2,2], strides = [2,2]>(r) d = Conv<{P}>(m, u, e) s =
        Relu(d) n = Resize<mode = "nearest">(s, roi, scales) k = Concat<axis = 1>(n, r) y = Conv(k,
        wide)"""),
    "resized to sizes": (IMAGE, 1, f"""
        {STEM} n = Resize<mode = "nearest">(r, , , sizes) y = Conv(n, v)"""),
    "squeeze and excite": (IMAGE, 2, f"""
        {STEM} p = GlobalAveragePool(r) s = Conv(p, squeeze) t = Relu(s) g = Conv(t, excite) h =
        HardSigmoid(g) m = Mul(r, h) y = Conv(m, v)"""),
    "spatial mask": (IMAGE, 1, f"""
        {STEM} m = Conv(r, stripes) s = Sigmoid(m) t = Mul(r, s) y = Conv(t, v)"""),
    "transposed convolution": (IMAGE, 2, f"""
        {STEM} d = ConvTranspose<strides = [2,2]>(r, up) y = Conv(d, six)"""),
    "pixel shuffle": (IMAGE, 1, f"{STEM} d = DepthToSpace<blocksize = 2>(r) y = Conv(d, half)"),
    "pixel shuffle by column": (IMAGE, 1, f"""
        {STEM} d = DepthToSpace<blocksize = 2, mode = "CRD">(r) y = Conv(d, half)"""),
    "space to depth": (IMAGE, 1, f"{STEM} d = SpaceToDepth<blocksize = 2>(r) y = Conv(d, deep)"),
    "split": (IMAGE, 2, f"{STEM} p, q = Split<axis = 1>(r, parts) y = Conv(q, seven)"),
    "slice": (IMAGE, 2, f"{STEM} q = Slice(r, from, to, axis) y = Conv(q, seven)"),
    "gather": (IMAGE, 2, f"{STEM} q = Gather<axis = 1>(r, pick) y = Conv(q, picked)"),
    "padded channels": (IMAGE, 1, f"{STEM} q = Pad(r, pads) y = Conv(q, padded)"),
    "reshape to a matrix": (VECTOR, 1, f"""
        {STEM} f = Reshape(r, rows) y = Gemm<transB = 1>(f, flat)"""),
    "mean of the image": (VECTOR, 1, f"""
        {STEM} m = ReduceMean<axes = [2, 3], keepdims = 0>(r) y = Gemm<transB = 1>(m, fc)"""),
    "shared weight": (IMAGE, 1, f"""
        {STEM} d = Conv<{P}>(r, u) s = Relu(d) f = Conv<{P}>(s, u) y = Conv(f, v)"""),
    "channels last": (IMAGE, 1, """
        t = Transpose<perm = [0,2,3,1]>(x) q = Transpose<perm = [0,3,1,2]>(t) a = Conv(q, w, b) l =
        Transpose<perm = [0,2,3,1]>(a) s = Relu(l) n = Mul(s, k) f = Transpose<perm = [0,3,1,2]>(n) y
        = Conv(f, v)"""),
    "matrix by the last axis": (IMAGE, 3, f"""
        a = Conv<{P}>(x, w, b) t = Transpose<perm = [0,2,3,1]>(a) h = MatMul(t, last) i = Add(h, row)
        g = Gelu(i) m = MatMul(g, back) f = Transpose<perm = [0,3,1,2]>(m) y = Conv(f, v)"""),
    "several outputs": (TWO, 2, f"""
        {STEM} y = Conv(r, v) d = Conv(r, o) p = GlobalAveragePool(d) f = Flatten(p) z = Gemm<transB =
        1>(f, fc)"""),
}  # fmt: skip


def maker(name: str) -> Callable[[], Model]:
    signature, _, body = NETWORKS[name]
    arrays = ARRAYS | {"k": weight(12)}
    used = {key: value for key, value in arrays.items() if any(f" {key}{end}" in body for end in ",)")}
    return lambda: Model.from_proto(graph(signature, body, used, opset=20 if "Gelu" in body else 17))


@pytest.mark.parametrize("name", NETWORKS)
def test_each_group_can_be_cut(name: str) -> None:
    """Cut alone, and all together, they leave what the network computes without reading them."""
    _, groups = with_groups(maker(name))
    free = [group.name for group in groups.free if group.width > 1]
    assert len(free) == NETWORKS[name][1], groups.all
    for group in free:
        cut_agrees(maker(name), [group])
    cut_agrees(maker(name))


MIXED = "is an operator without a rule for channels"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = Conv(x, w, b)", "is an output of the model"),
        (f"{STEM} s = Softmax<axis = 1>(r) y = Conv(s, v)", "(Softmax) mixes channels"),
        (f"{STEM} s = LRN<size = 3>(r) y = Conv(s, v)", f"(LRN) {MIXED}"),
        (f"{STEM} s = CumSum(r, zero) y = Conv(s, v)", f"(CumSum) {MIXED}"),
        (
            f"{STEM} s = ReduceMean<axes = [1]>(r) t = Mul(r, s) y = Conv(t, v)",
            "(ReduceMean) mixes channels",
        ),
        (f"{STEM} t = Conv(r, stripes) s = Mul(r, t) y = Conv(s, v)", "could only go all together"),
        (
            f"{STEM} q = Slice(r, from, to, axis, two) y = Conv(q, fourth)",
            "(Slice) takes channels in steps",
        ),
    ],
)
def test_what_stays_says_why(body: str, why: str) -> None:
    arrays = ARRAYS | {"zero": ints(1)[0], "two": ints(2), "fourth": weight(5, 4, 1, 1)}
    used = {key: value for key, value in arrays.items() if any(f" {key}{end}" in body for end in ",)")}
    groups = find_cut_groups(Model.from_proto(graph(IMAGE, body, used)))
    assert any(why in str(refusal) for refusal in groups.refusals), groups.refusals


def test_what_is_kept_of_each_tensor() -> None:
    _, groups = with_groups(maker("split"))
    first = groups.free[0]
    kept = kept_channels(groups.channels.tensors, first.group.labels[:2].tolist())
    assert kept["a"].index.tolist() == list(range(2, 12))
    assert kept["p"].index.tolist() == [2, 3, 4]
    assert "q" not in kept
    assert kept["a"].axis == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # parameters and multiply-accumulates: at 36 places, behind a convolution of 3x3 at 16
        ("pair", [(12 * 4 * 9 + 5 * 12, 36 * (12 * 4 * 9 + 5 * 12))]),
        ("depthwise", [(12 * 4 * 9 + 12 * 9 + 5 * 12, 36 * (12 * 4 * 9 + 12 * 9 + 5 * 12))]),
        (
            "depthwise, doubled",
            [(12 * 4 * 9 + 24 * 9 + 5 * 24, 36 * 12 * 4 * 9 + 16 * (24 * 9 + 5 * 24))],
        ),
        (
            "vgg",
            [
                (12 * 4 * 9 + 12 * 12 * 9, 36 * (12 * 4 * 9 + 12 * 12 * 9)),
                (12 * 12 * 9 + 5 * 12 * 36, 36 * 12 * 12 * 9 + 5 * 12 * 36),
            ],
        ),
        ("split", [(5 * 4 * 9, 36 * 5 * 4 * 9), (7 * 4 * 9 + 5 * 7, 36 * (7 * 4 * 9 + 5 * 7))]),
    ],
)
def test_parameters_and_work_of_a_group_are_those_that_go_with_it(
    name: str, expected: list[tuple[int, int]]
) -> None:
    """A layer that both reads and writes them belongs to them once."""
    _, groups = with_groups(maker(name))
    assert [(group.parameters, group.macs) for group in groups.free] == expected
    assert len({group.name for group in groups.all}) == len(groups.all)


def test_a_layer_that_reads_a_part_and_writes_all_belongs_to_the_channels_once() -> None:
    """It also reads four channels of the input, which stay: its rows go all the same."""
    arrays = {"w": ARRAYS["w"], "v": ARRAYS["v"], "u": weight(12, 16, 3, 3)}
    body = (
        f"a = Conv<{P}>(x, w) k = Concat<axis = 1>(x, a) d = Conv<{P}>(k, u) s = Add(a, d) y = Conv(s, v)"
    )
    (group,) = find_cut_groups(Model.from_proto(graph(IMAGE, body, arrays))).free
    assert group.parameters == 12 * 4 * 9 + 12 * 16 * 9 + 5 * 12


@pytest.mark.parametrize(
    ("sizes", "head", "tail", "expected"),
    [
        ((2, 8), "p = Reshape(a, to)", "y = Conv(q, v)", [("a", 8)]),
        ((8, 2), "p = Reshape(a, to)", "y = Conv(q, v)", [("a", 8)]),
        ((2, 8), f"d = Conv<group = 2, {P}>(a, g) p = Reshape(d, to)",
         f"e = Conv<group = 2, {P}>(q, h) y = Conv(e, v)", [("a", 8), ("d", 2)]),
    ],
)  # fmt: skip
def test_a_shuffle_is_cut_along_its_longer_axis(
    sizes: tuple[int, int], head: str, tail: str, expected: list[tuple[str, int]]
) -> None:
    """The same of eight channels goes in both groups; those of a convolution's group go together."""
    arrays = {"w": weight(16, 4, 3, 3), "g": weight(16, 8, 3, 3), "h": weight(16, 8, 3, 3, seed=1)}
    arrays |= {"v": ARRAYS["grown"], "to": ints(0, *sizes, 6, 6), "back": ints(0, 16, 6, 6)}
    body = f"a = Conv(x, w) {head} t = Transpose<perm = [0,2,1,3,4]>(p) q = Reshape(t, back) {tail}"

    def make() -> Model:
        return Model.from_proto(graph(IMAGE, body, arrays))

    assert [(group.name, group.width) for group in find_cut_groups(make()).free] == expected
    cut_agrees(make)


def test_initializers_that_are_listed_as_inputs_have_their_new_sizes() -> None:
    body = f"{STEM} y = Conv(r, v)"
    cut_agrees(lambda: Model.from_proto(graph(IMAGE, body, {k: ARRAYS[k] for k in "wbv"}, ir=3)))


def test_an_old_operator_set_is_refused() -> None:
    body = f"{STEM} y = Conv(r, v)"
    model = Model.from_proto(graph(IMAGE, body, {k: ARRAYS[k] for k in "wbv"}, opset=11))
    groups = find_cut_groups(model)
    with pytest.raises(ModelError, match="operator set 13"):
        cut_channels(model, groups, some_of(groups.free))


@pytest.mark.parametrize("file", sorted(MODELS.glob("*.onnx")), ids=lambda file: file.stem)
def test_channels_of_the_shipped_models(file: Path) -> None:
    cut_agrees(lambda: load(file))


@pytest.mark.zoo
@pytest.mark.parametrize("variant", zoo.parameters(zoo.VARIANTS))
def test_channels_of_real_networks(variant: str) -> None:
    file = zoo.path(variant)

    def make() -> Model:
        model = load(file)
        return model if model.opset >= 13 else converted(model, 13)

    cut_agrees(make, tolerance=1e-4)
